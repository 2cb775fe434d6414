"""Results of a probe of latents, and their sentences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from keepsight.diagnose.instruments.forming import FormingTrace
from keepsight.diagnose.statistics import Estimate

NEAR_CONSTANT = 0.05  # spread across images below which latents are called near-constant


@dataclass(frozen=True)
class Fact:
    """What a linear map reads out of one kind of vector.

    Attributes:
        name: the fact, e.g. "digit of each cell".
        classes: how many answers there are.
        latents: share of right answers from all latents of a memory.
        shuffled: the same with labels dealt out to other images, the control.
        visual: the same from the visual states that the memory is formed from: what there is to read.
        text: the same from the text states that it is formed from.
        majority: what always giving the most frequent answer reaches.
        by_question: [F] share of right answers from latents by question (cell, or digit).
    """

    name: str
    classes: int
    latents: Estimate
    shuffled: Estimate
    visual: Estimate
    text: Estimate
    majority: float
    by_question: np.ndarray

    @property
    def is_read(self) -> bool:
        """Clearly above both controls."""
        return self.latents.low > max(self.shuffled.high, self.majority)


@dataclass
class LatentProbe:
    """What latents of one type hold.

    Attributes:
        kind: "short" or "long".
        images: how many.
        trained: the former was ever trained.
        spread: variance of a latent across images as a share of its mean square, mean over the N latents: 0 for
            constants; None for fewer than three images.
        visual_spread: the same of the visual states that they are formed from.
        alike: mean cosine between different latents of one memory.
        words: per latent, its nearest words and their cosine, of the latents' mean over images.
        word_cosine: mean cosine of a latent to its nearest word, over latents and images.
        random_cosine: the same for random vectors, the control.
        image_cosine: mean cosine of a latent to the nearest visual embedding of its own image.
        other_cosine: the same with another image's, the control; None for a single image.
        facts: linear probes; empty where no facts are known.
        forming: where the latents of the first image looked while they were formed.
    """

    kind: str
    images: int
    trained: bool
    spread: float | None
    visual_spread: float | None
    alike: float
    words: list[list[tuple[str, float]]]
    word_cosine: float
    random_cosine: float
    image_cosine: float | None
    other_cosine: float | None
    facts: list[Fact] = field(default_factory=list)
    forming: FormingTrace | None = None

    @property
    def near_constant(self) -> bool | None:
        """Whether the latents hardly depend on the image; None for fewer than three images."""
        return None if self.spread is None else self.spread < NEAR_CONSTANT

    @property
    def summary(self) -> list[str]:
        """The two findings that matter most: do they differ between images, and what can be read from them?"""
        return [line for line in self.sentences if line.startswith(("Across", "A linear map"))][:2]

    @property
    def sentences(self) -> list[str]:
        """The findings in words."""
        lines = []
        if not self.trained:
            lines.append("This type was never trained; its figures are those of the base and of random queries.")
        if self.spread is not None and self.visual_spread is not None:
            what = "near-constant: they hardly depend on the image" if self.near_constant else "not constant"
            lines.append(
                f"Across {self.images} images the latents are {what} (spread {self.spread:.3f} of their mean square; "
                f"visual states {self.visual_spread:.3f}; below {NEAR_CONSTANT:g} counts as near-constant)."
            )
        verdict = "no nearer than" if self.word_cosine < self.random_cosine + 0.1 else "nearer than"
        lines.append(
            f"To words they are {verdict} random vectors: cosine {self.word_cosine:.2f} to the nearest word, random "
            f"vectors {self.random_cosine:.2f}."
        )
        if self.image_cosine is not None and self.other_cosine is not None:
            lines.append(
                f"To the nearest visual embedding of their own image the cosine is {self.image_cosine:.2f}, of another "
                f"image {self.other_cosine:.2f}."
            )
        for fact in self.facts:
            lines.append(
                f"A linear map {'reads' if fact.is_read else 'does not read'} the {fact.name} from them: "
                f"{fact.latents.value:.2f} right [{fact.latents.low:.2f}, {fact.latents.high:.2f}] of {fact.classes} "
                f"classes; shuffled labels {fact.shuffled.value:.2f}, from visual states {fact.visual.value:.2f}, "
                f"from text states {fact.text.value:.2f}."
            )
        if self.forming is not None:
            image = float(self.forming.image.mean())
            lines.append(
                f"While formed, they give the image {100 * image:.0f} % of their attention (evenly spread it would be "
                f"{100 * self.forming.uniform:.0f} %)."
            )
        return lines
