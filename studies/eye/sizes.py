"""Two sizes of the same recipe: one for two CPU cores, one for a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Size:
    """What is made and how long it is trained.

    Args:
        cell: side of one picture in pixels, a multiple of `patch * merge`.
        patch: side of a patch in pixels.
        merge: patches along a side that become one token.
        width, depth, heads: the tower's.
        sides: pictures along the side of an image; 1 is a single picture.
        pretrain_steps, pretrain_batch, pretrain_lr: the tower alone; the batch counts pictures.
        restyle_steps: of the tower alone after these, the drawings in bolder styles
            (`studies/eye/drawings/restyle.py`); 0 for none.
        muon_lr: of the matrices of the tower's blocks, which Muon trains; AdamW does the rest.
        others: share of the tower's pictures that show something else than the words to be named.
        align_steps, align_batch, align_lr: through the language model; the batch counts images.
        recall_steps, recall_lr: the same with text beside it, where there is a LoRA, so that the language stays; 0 for
            none.
        questions: questions about each image.
        tower_lr: share of `align_lr` for the tower and its projector; the LoRA has all of it.
        top: how many of the tower's last blocks learn through the language model, besides the projector.
        lora: rank of a LoRA on the language model, merged in at the end; 0 leaves it frozen.
        max_gap: largest distance, in positions, put between image and question in training.
        dtype: what training multiplies in; "auto" is what the device multiplies natively (`computing`).
    """

    cell: int = 48
    patch: int = 8
    merge: int = 2
    width: int = 192
    depth: int = 6
    heads: int = 6
    sides: tuple[int, ...] = (1, 2)
    pretrain_steps: int = 2400
    restyle_steps: int = 7500
    pretrain_batch: int = 64
    pretrain_lr: float = 1e-3
    muon_lr: float = 0.01
    others: float = 0.3
    align_steps: int = 1300
    align_batch: int = 4
    align_lr: float = 2e-3
    recall_steps: int = 480
    recall_lr: float = 1e-3
    questions: int = 6
    tower_lr: float = 0.05
    top: int = 0
    lora: int = 16
    max_gap: int = 2304
    dtype: str = "auto"
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens along the side of one picture."""
        return self.cell // (self.patch * self.merge)

    def settings(self, *without: str) -> dict[str, Any]:
        """As plain JSON, without those whose names begin so."""
        every = asdict(self) | {"sides": list(self.sides)}
        return {key: value for key, value in every.items() if not key.startswith(without)}

    def computing(self, device: str) -> torch.dtype:
        """What training multiplies in on a device of this type.

        A processor without matrix units for bfloat16 emulates it: 30 GFLOPS on a core where float32 has 140.
        """
        import torch

        if self.dtype != "auto":
            return cast("torch.dtype", getattr(torch, self.dtype))
        processor = torch.cpu.get_capabilities()
        native = torch.cuda.is_bf16_supported() if device == "cuda" else processor.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32


OF_ALIGNING = ("align_", "questions", "tower_lr", "top", "lora", "max_gap", "dtype")
OF_RESTYLING = ("restyle_",)
OF_RECALLING = ("recall_",)
"""Settings that an earlier stage knows nothing of, by the beginnings of their names."""

CPU = Size()
"""4.1 core-hours in float32; by what a step took, about half of that on a processor with matrix units (LOG.md)."""

QUICK = replace(CPU, pretrain_steps=1500, restyle_steps=0, others=0.0, align_steps=150, recall_steps=60)
"""A fifth of it, without other drawings."""

GPU = replace(
    CPU,
    cell=64,
    width=320,
    depth=10,
    heads=10,
    sides=(1, 2, 3),
    pretrain_steps=8000,
    restyle_steps=12000,
    pretrain_batch=256,
    align_steps=4700,
    align_batch=64,
    align_lr=7e-4,
    recall_lr=3.5e-4,
    questions=4,
    tower_lr=0.2,
    top=2,
)
"""About 300,000 images, each with four questions; 64 px, 4 x 4 tokens a picture. It has not been run yet."""

TINY = replace(
    CPU,
    width=32,
    depth=2,
    heads=2,
    pretrain_steps=4,
    restyle_steps=2,
    pretrain_batch=8,
    align_steps=3,
    align_batch=2,
    recall_steps=2,
    lora=2,
)
"""For tests."""

SIZES = {"cpu": CPU, "quick": QUICK, "gpu": GPU, "tiny": TINY}

PUBLISHED = "studies/eye/published/cpu"
"""In a clone: the eye of size `cpu` that was measured."""
