"""Stage (b): what the eye sees is answered in words, through the language model, at any distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from studies.eye import sequences
from studies.eye.drawings import brush
from studies.eye.drawings.pictures import Pictures
from studies.eye.drawings.scenes import Scenes
from studies.eye.making.stages import generator
from studies.eye.questions import TASKS, ask, tasks_of
from studies.eye.sizes import Size

_NEAR = 0.3
"""Share of the questions that follow the image at once."""
_NAMING = 5.0
"""How much more often than another task a name is asked for."""

BOLD = 0.5
"""Share of the images that are restyled where the tower has learnt from such: what is read must not rest on tokens as
sure as those of a known hand."""
_VARY = 0.5
"""How much the drawings vary here: the tower has seen them varied more, and what is new is reading them."""


class Alignment:
    """Trains projector, top of the tower and, where wanted, a LoRA on the language model.

    Args:
        model: a Qwen2.5-VL; its language model is put into `size.computing(device)` and frozen.
        tokenizer: its tokenizer.
        pictures: all drawings.
        size: of the eye.
    """

    def __init__(self, model: Any, tokenizer: Any, pictures: Pictures, size: Size):
        self.model, self.tokenizer, self.size = model, tokenizer, size
        self.scenes = Scenes(pictures, pictures.seen)
        model.model.language_model.to(size.computing(model.device.type))
        self.wrapped: Any = None
        if size.lora:
            torch.manual_seed(size.seed)
            self.wrapped = with_lora(model, size)
        tower = model.model.visual
        for name, value in model.named_parameters():
            value.requires_grad_("lora_" in name)
        for module in (tower.merger, *tower.blocks[len(tower.blocks) - size.top :]):
            module.requires_grad_(True)

    def parameters(self) -> dict[str, tuple[nn.Parameter, float]]:
        """What learns, by name, with its share of the learning rate."""
        return {
            name: (value, self.size.tower_lr if ".visual." in name else 1.0)
            for name, value in self.model.named_parameters()
            if value.requires_grad
        }

    def batch(self, step: int, bold_share: float = BOLD) -> tuple[torch.Tensor, list[list[sequences.Part]], int]:
        """Images, what is asked about each, and pictures along their side; drawn anew from the step's number."""
        size, draws = self.size, generator(self.size.seed, 2, step)
        often = torch.tensor(size.sides, dtype=torch.float)  # where to look is harder than what it is
        side = size.sides[int(torch.multinomial(often, 1, generator=draws))]
        images, rows = [], []
        for _ in range(size.align_batch):
            bold = bool(size.restyle_steps) and float(torch.rand(1, generator=draws)) < bold_share
            image, cells = self.scenes.image(side, size.cell, _VARY, draws, bold=bold)
            possible = [task for task in tasks_of(cells, side) if not (bold and task == "style")]
            weights = torch.tensor([_NAMING if task == TASKS[0] else 1.0 for task in possible])
            chosen = torch.multinomial(weights, size.questions, replacement=True, generator=draws)
            parts = []
            for number in chosen.tolist():
                near = float(torch.rand(1, generator=draws)) < _NEAR
                gap = 0 if near else int(torch.randint(size.max_gap + 1, (1,), generator=draws))
                parts.append(sequences.part(ask(possible[number], cells, side, draws), self.tokenizer, gap))
            images.append(image)
            rows.append(parts)
        return torch.cat(images), rows, side

    def loss(self, batch: tuple[torch.Tensor, list[list[sequences.Part]], int]) -> torch.Tensor:
        """Of one batch."""
        return sequences.loss(*answers(self.model, self.tokenizer, *batch, self.size)[1:])


def with_lora(model: Any, size: Size) -> Any:
    """Put a new LoRA on the attention of the language model, in place; returns PEFT's model around it."""
    from peft import LoraConfig, get_peft_model

    where = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
    return get_peft_model(model, LoraConfig(r=size.lora, lora_alpha=2 * size.lora, target_modules=where))


def answers(
    model: Any, tokenizer: Any, images: torch.Tensor, rows: list[list[sequences.Part]], side: int, size: Size
) -> tuple[sequences.Batch, torch.Tensor, torch.Tensor]:
    """The batch, its logits and its targets (see `sequences.answers`), computed in `size.computing(device)`.

    Args:
        model, tokenizer: as above.
        images: `[B, 3, S, S]` in [0, 1].
        rows: the parts that follow each image.
        side: pictures along the side of an image.
        size: of the eye.
    """
    device = model.device
    batch = sequences.lay_out(rows, side * size.tokens, model, tokenizer).to(device)
    pixels, grids = brush.patches(images, size.patch, size.merge)
    dtype = size.computing(device.type)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return batch, *sequences.answers(model, batch, pixels.to(device), grids.to(device))
