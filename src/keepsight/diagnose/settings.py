"""Settings of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from keepsight.errors import KeepsightError


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
        probe_images: at most so many images for the probe of latents (VisMem).
        memory: which memory to examine in a model that carries both: "auto" takes PVM.
        kind: which type of latent memory is formed where a text is only read: "auto" takes what the model would choose
            if its invocation tokens were trained, else the type that was trained.
        temperature: of the written outputs; default: 1 for the reference VLM, which repeats itself at 0, else 0.
        seed: of noise, choices, sampling and built-in images.
    """

    steps: int = 256
    every: int = 1
    layers: Literal["auto", "all"] | Sequence[int] = "auto"
    curves: int = 1
    samples: int = 32
    causal_steps: int = 64
    probe_images: int = 512
    memory: Literal["auto", "PVM", "VisMem"] = "auto"
    kind: Literal["auto", "short", "long"] = "auto"
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "every", "curves", "samples", "causal_steps", "probe_images"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise KeepsightError(f"{name}={value!r}: expected a whole number, 1 or more.")
        if self.memory not in ("auto", "PVM", "VisMem"):
            raise KeepsightError(f"memory={self.memory!r}: expected 'auto', 'PVM' or 'VisMem'.")
        if self.kind not in ("auto", "short", "long"):
            raise KeepsightError(f"kind={self.kind!r}: expected 'auto', 'short' or 'long'.")
        if self.temperature is not None and self.temperature < 0:
            raise KeepsightError(f"temperature={self.temperature}: expected 0 or more.")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        if not isinstance(found["layers"], str):
            found["layers"] = list(found["layers"])
        return found
