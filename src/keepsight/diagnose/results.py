"""What a diagnosis found, as plain dataclasses and arrays, and as `results.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keepsight.checkpoints.atomic import write_text
from keepsight.diagnose.battery.invocation_results import Formed, InvocationResult
from keepsight.diagnose.battery.lengths import LengthResult
from keepsight.diagnose.battery.probe_results import LatentProbe
from keepsight.diagnose.battery.verdict import CausalResult
from keepsight.diagnose.instruments.attention_trace import AttentionTrace
from keepsight.diagnose.instruments.decay import DecayFit
from keepsight.diagnose.instruments.forming import FormingTrace
from keepsight.diagnose.instruments.lens import LensTrace
from keepsight.diagnose.instruments.retrieval import RetrievalTrace
from keepsight.errors import KeepsightError

SCHEMA = "keepsight.diagnose/2"


@dataclass
class Written:
    """One output and what was measured while it was written.

    Attributes:
        memory: whether the memory was on.
        ids: [n] int64, the tokens.
        words: n strings, what each token adds to the text.
        slots: [n] int64, positions after the prompt before each token: those of VisMem's memories count.
        memories: VisMem's memories in it.
        forming: where each of them looked while it was formed; empty if that was not watched.
        attention: one trace per sample that was measured; the first belongs to `ids`.
        decay: fit over all traces, mean over layers and heads; None if there is no visual mass to fit.
        decay_without_sink: the same with the first token left out of the normalisation.
        decay_by_layer: decoder layer -> fit.
    """

    memory: bool
    ids: np.ndarray
    words: list[str]
    slots: np.ndarray
    attention: list[AttentionTrace]
    memories: list[Formed] = field(default_factory=list)
    forming: list[FormingTrace | None] = field(default_factory=list)
    decay: DecayFit | None = None
    decay_without_sink: DecayFit | None = None
    decay_by_layer: dict[int, DecayFit] = field(default_factory=dict)


@dataclass
class Diagnosis:
    """All findings. Parts that were not measured (no memory, no references, stopped early) are None.

    Attributes:
        model: what was diagnosed: name, family, layers, memory and its layers, versions.
        settings: as asked for.
        prompt: of the first sample.
        images: PIL images of the first sample; videos as lists of PIL frames.
        written: the output with the memory as it is.
        written_off: the output with the memory switched off; None without a memory.
        lens: logit lens over the text of `written`.
        lens_off: the same text read with the memory switched off; None without a memory.
        retrieval: what the memory retrieved for each token of `written`.
        causal: the battery.
        causal_by_type: VisMem with both types trained: off and other image for each type by itself.
        invocations: VisMem: where memories were invoked in many outputs, and what followed.
        probes: VisMem: what the latents of each type hold.
        lengths: score by length.
        notes: what a reader should know, e.g. that the prompt has no image.
        interrupted: stopped by Ctrl-C; the rest is what was measured until then.
        seconds: wall-clock time.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    prompt: str = ""
    images: list[Any] = field(default_factory=list)
    written: Written | None = None
    written_off: Written | None = None
    lens: LensTrace | None = None
    lens_off: LensTrace | None = None
    retrieval: RetrievalTrace | None = None
    causal: CausalResult | None = None
    causal_by_type: dict[str, CausalResult] = field(default_factory=dict)
    invocations: InvocationResult | None = None
    probes: list[LatentProbe] = field(default_factory=list)
    lengths: LengthResult | None = None
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def headline(self) -> list[str]:
        """The findings in a few sentences."""
        lines = []
        if self.written is not None:
            if self.written.decay is not None:
                lines.append(self.written.decay.sentence)
            if self.written_off is not None and self.written_off.decay is not None:
                lines.append("With the memory off: " + self.written_off.decay.sentence)
        if self.causal is not None:
            verdict = self.causal.verdict
            lines.append(verdict.sentence if self.causal.method is None else verdict.on("Memory"))
        lines += [found.verdict.on(f"{kind.capitalize()} memory") for kind, found in self.causal_by_type.items()]
        if self.invocations is not None:
            lines.append(self.invocations.sentence)
        lines += [
            f"{probe.kind.capitalize()} memory. {sentence}" for probe in self.probes for sentence in probe.summary
        ]
        return lines + self.notes

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON. Not-a-number and infinity become None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "images"}
        plain = _plain(fields)
        for name in ("written", "written_off"):
            written = getattr(self, name)
            if written is not None:
                for entry, trace in zip(plain[name]["attention"], written.attention, strict=True):
                    entry["mass"] = _plain(trace.mass.mean(3))  # [S, L, B], for readers without log-sum-exps
        for entry, probe in zip(plain["probes"], self.probes, strict=True):
            entry |= {"near_constant": probe.near_constant, "sentences": probe.sentences}
        return {"schema": SCHEMA, **plain}

    def save(self, path: str | Path) -> None:
        """Write `results.json`."""
        write_text(Path(path), json.dumps(self.to_dict(), allow_nan=False))


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a `results.json` back, as plain dictionaries and lists.

    Raises:
        KeepsightError: if it is none, or of another version of the schema.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise KeepsightError(f"{path} is no results.json of `keepsight diagnose`: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        given = found.get("schema") if isinstance(found, dict) else None
        raise KeepsightError(f"{path} has schema {given!r}; this version of keepsight reads {SCHEMA!r}.")
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
