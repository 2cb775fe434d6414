"""The whole diagnosis of one model, stage by stage, stoppable at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import transformers

import keepsight
from keepsight.diagnose.attention import AttentionMeter
from keepsight.diagnose.attention_trace import AttentionTrace
from keepsight.diagnose.cases import LONG_PROMPT, Case, Sample, lab_cases, speaks_lab, stand_in_images
from keepsight.diagnose.causal import Battery
from keepsight.diagnose.decay import DecayFit, fit_decay
from keepsight.diagnose.lengths import LengthScore
from keepsight.diagnose.lens import logit_lens
from keepsight.diagnose.memories import memory_of
from keepsight.diagnose.reader import Reader
from keepsight.diagnose.results import Diagnosis, Written
from keepsight.diagnose.retrieval import RetrievalMeter
from keepsight.errors import KeepsightError

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`."""

LAB_LENGTHS = (32, 128, 512, 1024, 2048)
LAB_CAUSAL_LENGTH = 4096


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        steps: tokens to write for the curves.
        every: measure every n-th of them.
        layers: decoder layers to meter: "auto" (up to twelve), "all", or indices.
        curves: outputs over which the decay is fitted; the first one is shown token by token.
        samples: at most so many samples for the battery and the score by length.
        causal_steps: tokens per sample that the battery writes where there are no references.
        temperature: of the written outputs; default: 1 for the reference VLM, which repeats itself at 0, else 0.
        seed: of noise, choices, sampling and built-in images.
    """

    steps: int = 256
    every: int = 1
    layers: Literal["auto", "all"] | Sequence[int] = "auto"
    curves: int = 1
    samples: int = 32
    causal_steps: int = 64
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "every", "curves", "samples", "causal_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise KeepsightError(f"{name}={value!r}: expected a whole number, 1 or more.")
        if self.temperature is not None and self.temperature < 0:
            raise KeepsightError(f"temperature={self.temperature}: expected 0 or more.")


def examine(
    model: Any,
    processor: Any,
    samples: Sequence[Sample] = (),
    settings: Settings | None = None,
    control: Any | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Diagnose a VLM: does it lose its image, and is its memory used?

    Args:
        model: a supported VLM, with or without adapters, in eval mode.
        processor: its processor.
        samples: what to ask. Default: the lab's digit grids for the reference VLM; elsewhere the built-in
            long-description prompt about a built-in picture.
        settings: how much to measure.
        control: a second model on the same base, fine-tuned on the memory's own data, for the score by length.
        progress: called after every step.

    Returns:
        What was found. After Ctrl-C (KeyboardInterrupt) it holds what was measured until then and says so.

    Raises:
        KeepsightError: for a model, a processor or samples that cannot be used.
    """
    begin = time.perf_counter()
    settings = settings or Settings()
    reader = Reader(model, processor)
    diagnosis = Diagnosis(model=_facts(model), settings=_plain_settings(settings))
    run = _Run(reader, diagnosis, settings, progress or (lambda stage, done, total: None))
    try:
        run.prepare(list(samples))
        run.curves()
        run.lens()
        run.battery()
        run.lengths(None if control is None else Reader(control, processor))
    except KeyboardInterrupt:
        diagnosis.interrupted = True
        diagnosis.notes.append("Stopped by Ctrl-C; this is what was measured until then.")
    diagnosis.seconds = time.perf_counter() - begin
    return diagnosis


class _Run:
    """The stages. Each writes what it finds into the diagnosis at once, so that stopping loses nothing."""

    def __init__(self, reader: Reader, diagnosis: Diagnosis, settings: Settings, progress: Progress):
        self.reader, self.diagnosis, self.settings, self.progress = reader, diagnosis, settings, progress
        self.memory = memory_of(reader.model)
        self.samples: list[Sample] = []
        self.cases: list[Case] = []
        self.by_length: list[Case] = []

    def prepare(self, samples: list[Sample]) -> None:
        """Samples as given, or built-in ones."""
        count, seed = self.settings.samples, self.settings.seed
        lab = speaks_lab(self.reader.processor)
        if not samples and lab:
            try:
                self.cases = lab_cases(self.reader.processor, min(count, 8), LAB_CAUSAL_LENGTH, seed)
                for length in LAB_LENGTHS:
                    self.by_length += lab_cases(self.reader.processor, min(count, 8), length, seed + 1)
                samples = [case.sample for case in self.cases]
                self.diagnosis.notes.append(
                    f"Images and references are the lab's: digit grids with unseen handwriting, answers near "
                    f"{LAB_CAUSAL_LENGTH:,} tokens of output for the causal table."
                )
            except ImportError:
                self.diagnosis.notes.append(
                    "scikit-learn is not installed, so the lab's digit grids and their references are not used: "
                    "pip install 'keepsight[lab]'."
                )
        if not samples:
            images = stand_in_images([_canvas()], 1, seed)[0]
            samples = [Sample("describe" if lab else LONG_PROMPT, tuple(images))]
            self.diagnosis.notes.append(
                "No image was given; a built-in colour field was used. Give --image or --dataset."
            )
        self.samples = samples[:count]
        if len(samples) > count:
            self.diagnosis.notes.append(f"Of {len(samples)} samples the first {count} were used (--samples).")
        answered = [sample for sample in self.samples if sample.answer is not None]
        if not self.cases and answered:
            if len(answered) < len(self.samples):
                self.diagnosis.notes.append(
                    f"{len(self.samples) - len(answered)} samples without an answer are left out of the causal table."
                )
            self.cases = [self.reader.case(sample) for sample in answered]
        first = self.samples[0]
        self.diagnosis.prompt = first.prompt
        self.diagnosis.images = [*first.images, *(_frames(video) for video in first.videos)]
        if not any(sample.sees for sample in self.samples):
            self.diagnosis.notes.append("No prompt has an image or video, so there is nothing that could be lost.")

    # -- curves and overlay ---------------------------------------------------------------------------------------
    def curves(self) -> None:
        """Write, with the meters on; then once more with the memory off."""
        many = self.samples[: self.settings.curves]
        states: list[tuple[str, AbstractContextManager[Any]]] = [("written", nullcontext())]
        if self.memory is not None:
            states.append(("written_off", self.memory.off()))
        for name, state in states:
            with state:
                written: Written | None = None
                try:
                    for number, sample in enumerate(many):
                        label = "writing" if name == "written" else "writing without the memory"
                        label += f" {number + 1}/{len(many)}" if len(many) > 1 else ""
                        ids, trace = self._write(sample, label, name == "written" and number == 0)
                        if trace is None:
                            continue
                        if written is None:
                            written = Written(name == "written", ids, self.reader.words(torch.as_tensor(ids)), [])
                            setattr(self.diagnosis, name, written)
                        written.attention.append(trace)
                finally:
                    if written is not None:
                        _fit(written)

    def _write(self, sample: Sample, label: str, overlay: bool) -> tuple[np.ndarray, AttentionTrace | None]:
        """One output with its trace; on Ctrl-C what there is of it is kept before the interrupt goes on."""
        settings = self.settings
        inputs = self.reader.inputs(sample)
        layers = None if settings.layers == "all" else settings.layers
        meter = AttentionMeter(self.reader.model, layers, settings.every, where=overlay)
        looks = RetrievalMeter(self.reader.model, settings.every) if overlay and self.memory and sample.sees else None
        stream = _Stream(lambda done: self.progress(label, done, settings.steps))
        heat = settings.temperature
        if heat is None:
            heat = 1.0 if speaks_lab(self.reader.processor) else 0.0
        try:
            with meter, looks or nullcontext(), torch.random.fork_rng(devices=_cuda(self.reader.model)):
                torch.manual_seed(settings.seed)
                self.reader.write(inputs, settings.steps, temperature=heat, streamer=stream)
        except KeyboardInterrupt:
            if overlay and meter.traces:
                ids = np.array(stream.ids, np.int64)
                words = self.reader.words(torch.as_tensor(ids))
                self.diagnosis.written = Written(True, ids, words, [meter.trace])
                _fit(self.diagnosis.written)
            raise
        finally:
            if looks is not None and looks.seen:
                self.diagnosis.retrieval = looks.trace
        return np.array(stream.ids, np.int64), meter.trace if meter.traces else None

    # -- lens -----------------------------------------------------------------------------------------------------
    def lens(self) -> None:
        """Read the written text once more, with every layer's prediction."""
        written = self.diagnosis.written
        if written is None or not len(written.ids):
            return
        self.progress("logit lens", 0, 2)
        text = torch.as_tensor(written.ids)
        inputs = self.reader.with_text(self.reader.inputs(self.samples[0]), text)
        every = max(self.settings.every, len(text) // 256, 1)
        self.diagnosis.lens = logit_lens(self.reader.model, inputs, len(text), every)
        self.progress("logit lens", 1, 2)
        if self.memory is not None:
            with self.memory.off():
                self.diagnosis.lens_off = logit_lens(self.reader.model, inputs, len(text), every)
        self.progress("logit lens", 2, 2)

    # -- battery and lengths --------------------------------------------------------------------------------------
    def battery(self) -> None:
        """The causal battery and the half-way swaps."""
        given: dict[str, Any] = {"cases": self.cases} if self.cases else {"samples": self.samples}
        battery = Battery(self.reader, **given, steps=self.settings.causal_steps, seed=self.settings.seed)
        self.progress("tampering", 0, len(battery))
        try:
            for done in battery.run():
                self.progress("tampering", done, len(battery))
        finally:
            self.diagnosis.causal = battery.result()

    def lengths(self, control: Reader | None) -> None:
        """The score by length, where there are references."""
        cases = self.by_length or (self.cases if any(case.sample.reply for case in self.cases) else [])
        free = [] if cases else [sample for sample in self.samples if sample.answer is not None]
        if not cases and not free:
            if control is not None:
                self.diagnosis.notes.append('The control has no effect without references ("answer" in the dataset).')
            return
        score = LengthScore(self.reader, cases, free, self.settings.steps, control)
        self.progress("score by length", 0, len(score))
        try:
            for done in score.run():
                self.progress("score by length", done, len(score))
        finally:
            self.diagnosis.lengths = score.result()


class _Stream:
    """Receives tokens from generate(), so that an interrupted output is not lost."""

    def __init__(self, tell: Callable[[int], None]):
        self.ids: list[int] = []
        self._tell, self._prompt = tell, True

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token by token."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        self._tell(len(self.ids))

    def end(self) -> None:
        """Nothing to flush."""


def _fit(written: Written) -> None:
    """Fit the decay over all traces of the same length."""
    steps = min((len(trace.steps) for trace in written.attention), default=0)
    if not steps:
        return
    text = np.concatenate([trace.text_tokens[:steps] for trace in written.attention], 1)

    def fit(mass: list[np.ndarray], layer: int | None = None) -> DecayFit | None:
        chosen = [m[:steps] if layer is None else m[:steps, layer : layer + 1] for m in mass]
        return fit_decay(text, np.concatenate([np.nanmean(m, (1, 3)) for m in chosen], 1))

    mass = [trace.mass for trace in written.attention]
    written.decay = fit(mass)
    if written.decay is not None:
        written.decay_without_sink = fit([trace.mass_without_sinks for trace in written.attention])
        fits = {int(index): fit(mass, row) for row, index in enumerate(written.attention[0].layers)}
        written.decay_by_layer = {index: found for index, found in fits.items() if found is not None}


def _facts(model: Any) -> dict[str, Any]:
    from keepsight.backbone import Backbone

    backbone, memory = Backbone.of(model), memory_of(model)
    softmax = [i for i, layer in enumerate(backbone.layers) if Backbone.has_softmax_attention(layer)]
    return {
        "name": str(getattr(backbone.model, "name_or_path", "") or type(backbone.model).__name__),
        "family": backbone.family.name,
        "layers": len(backbone.layers),
        "softmax_layers": softmax,
        "attention": getattr(backbone.text_config, "_attn_implementation", None),
        "memory": None if memory is None else memory.method,
        "memory_layers": [] if memory is None else memory.layers,
        "keepsight": keepsight.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(next(model.parameters()).device),
        "dtype": str(next(model.parameters()).dtype),
    }


def _plain_settings(settings: Settings) -> dict[str, Any]:
    found = asdict(settings)
    if not isinstance(found["layers"], str):
        found["layers"] = list(found["layers"])
    return found


def _cuda(model: Any) -> list[torch.device]:
    """The devices whose random state sampling uses."""
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


def _canvas() -> Any:
    from PIL import Image

    return Image.new("RGB", (448, 336))


def _frames(video: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in video]
