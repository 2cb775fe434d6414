"""Memory and fine-tuning on the frozen eye: the same questions behind real narrations, at equal lengths and parameters.

What differs is the method alone: images, questions, narrations and their lengths follow from seed and step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keepsight import PvmConfig
from keepsight.errors import KeepsightError
from keepsight.train.pvm.blindfold import BlindfoldSchedule, blindfold
from keepsight.train.run.settings import SftSettings
from studies.eye import sequences
from studies.eye.comparing.texts import Texts
from studies.eye.drawings.pictures import Pictures
from studies.eye.drawings.scenes import Scenes
from studies.eye.lengths import asked
from studies.eye.making.align import answers
from studies.eye.making.stages import Stage, generator
from studies.eye.questions import ask
from studies.eye.sizes import Size

NONE = "none"
"""The eye as it is, measured as the methods are."""
METHODS = {
    "lora": "a LoRA of PVM's number of parameters on the attention",
    "sft": "all weights of the language model",
    "mlp": "the parallel network of as many parameters as PVM",
    "pvm": "PVM by plain SFT",
    "pvm-warm": "PVM with the warm-up",
}
RATES = {"lora": 1e-3, "sft": 1e-4, "mlp": 2e-3, "pvm": 2e-3, "pvm-warm": 2e-3}
"""Highest learning rates. They may be chosen by trials for `validation` alone: another unseen style, other grids and a
narration of its own, so that the test stays unseen; the report says which were tried."""

HELD_OUT = 2
"""The last so many narrations serve as a test only; the one before them as a validation too."""

LOOK_UP_IMAGES = 8
"""Images of a step where the look-up is learnt on images alone: with two it does not form in 600 steps (LOG.md)."""

_LATER: dict[str, Any] = {"look_up_steps": 0, "text": False}
"""What the first trials did not tell, and what held of them; it is still not told where it holds."""

_LORA = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"


@dataclass(frozen=True)
class Trial:
    """One training of one method.

    Args:
        method: of `METHODS`.
        longest: tokens of narration in training: from 0 to so many.
        seed: of the start and of everything drawn.
        steps: of training.
        images: a step, with `questions // images` questions each; more of them are more to look at for as many answers.
        questions: a step, at most.
        look_up_steps: before them, so many of `LOOK_UP_IMAGES` images with no narration at all.
        rate: highest learning rate; None: of `RATES`.
        text: in every second step, what the model expects of a text behind an image is held to what it did without the
            method.
        validation: it is trained to choose settings by: one narration is kept from it, which it is measured on.
    """

    method: str
    longest: int
    seed: int
    steps: int = 120
    images: int = 2
    questions: int = 12
    look_up_steps: int = 0
    rate: float | None = None
    text: bool = False
    validation: bool = False

    def __post_init__(self) -> None:
        if self.text and self.method in (NONE, "sft"):
            raise KeepsightError(
                f"--text holds a method to the model without it, and {self.method} cannot be taken off. It is for "
                + ", ".join(method for method in METHODS if method != "sft")
                + "."
            )

    @property
    def name(self) -> str:
        """Of its checkpoint and its raw result."""
        name = self.method if self.method == NONE else f"{self.method}-{self.longest}-{self.seed}"
        name += "" if self.steps == Trial.steps else f"-steps-{self.steps}"
        name += "" if self.images == Trial.images else f"-images-{self.images}"
        name += f"-look-up-{self.look_up_steps}" if self.look_up_steps else ""
        name += "-text" if self.text else ""
        return name + ("" if self.rate is None else f"-rate-{self.rate:g}") + ("-validation" if self.validation else "")

    @property
    def look_up(self) -> Trial | None:
        """What is trained before: the same method on images alone."""
        if not self.look_up_steps:
            return None
        return replace(self, longest=0, steps=self.look_up_steps, images=LOOK_UP_IMAGES, look_up_steps=0)

    @property
    def lr(self) -> float:
        """Highest learning rate."""
        return RATES.get(self.method, 0.0) if self.rate is None else self.rate

    def told(self) -> dict[str, Any]:
        """As checkpoints and raw results have it, without what holds by `_LATER`."""
        return {name: value for name, value in vars(self).items() if name not in _LATER or value}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Trial:
        """What `told` wrote down, among other settings."""
        told = {**_LATER, **told}
        return cls(**{field.name: told[field.name] for field in fields(cls)})

    def narrations(self, every: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Of all narrations those to train on, and those to be measured on."""
        last = len(every) - HELD_OUT
        return (every[: last - 1], every[last - 1 : last]) if self.validation else (every[:last], every[last:])


def equipped(model: Any, trial: Trial) -> Any:
    """The model with the method on it, new from the trial's seed; nothing else learns."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(trial.seed)
    model.requires_grad_(False)
    if trial.method == "sft":
        model.model.language_model.requires_grad_(True)
        return model
    if trial.method != "lora":
        return get_peft_model(model, PvmConfig(branch="mlp" if trial.method == "mlp" else "memory"))
    found = []
    for config in (PvmConfig(), LoraConfig(r=1, target_modules=_LORA)):
        tried: Any = get_peft_model(model, config)
        found.append(learning(tried))
        model = tried.base_model.unload()
    rank = max(1, round(found[0] / found[1]))
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LORA))


def bare(model: Any) -> Any:
    """The language model with its eye that a method was put on, the method in it."""
    from peft import PeftModel

    return model.base_model.model if isinstance(model, PeftModel) else model


def learning(model: nn.Module) -> int:
    """How many parameters learn."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


class Lessons:
    """What a method is trained on: images of seen styles, the beginning of a narration, questions that hear it.

    Args:
        tokenizer: of the model.
        pictures: all drawings.
        size: of the eye.
        narrations: tokens of each, for training.
        trial: what is trained.
    """

    def __init__(
        self, tokenizer: Any, pictures: Pictures, size: Size, narrations: list[list[int]], trial: Trial, config: Any
    ):
        self.tokenizer, self.size, self.narrations, self.trial, self.config = tokenizer, size, narrations, trial, config
        self.scenes = Scenes(pictures, pictures.seen)
        self.texts = Texts(tokenizer, size, narrations, trial.seed) if trial.text else None
        self.schedule = BlindfoldSchedule.default(trial.steps) if trial.method == "pvm-warm" else BlindfoldSchedule()

    def batch(self, step: int) -> tuple[torch.Tensor, list[list[sequences.Part]], int, int]:
        """Images, parts, pictures along the side of an image, and the step; names alone are asked for."""
        draws = generator(self.trial.seed, 7, step)

        def whole(below: int) -> int:
            return int(torch.randint(below, (1,), generator=draws))

        side = self.size.sides[whole(len(self.size.sides))]
        images, rows = [], []
        for _ in range(self.trial.images):
            image, cells = self.scenes.image(side, self.size.cell, 0.5, draws)
            while all(cell.text for cell in cells):
                image, cells = self.scenes.image(side, self.size.cell, 0.5, draws)
            told = self.narrations[whole(len(self.narrations))][: whole(self.trial.longest + 1)]
            questions = [ask("name", cells, side, draws) for _ in range(self.trial.questions // self.trial.images)]
            along = side * self.size.tokens
            parts = [asked(one, "base", told, along, self.tokenizer, self.config) for one in questions]
            images.append(image)
            rows.append([sequences.Part(told, len(told)), *parts])
        return torch.cat(images), rows, side, step

    def loss(self, model: Any, batch: tuple[torch.Tensor, list[list[sequences.Part]], int, int]) -> torch.Tensor:
        """Of one batch; blindfolded where the schedule says so, but for a text."""
        images, rows, side, step = batch
        inner = bare(model)
        with blindfold(inner) if self.schedule.covers(step) else nullcontext():
            asked = sequences.loss(*answers(inner, self.tokenizer, images, rows, side, self.size)[1:])
        piece = self.texts.piece(step) if self.texts else []
        return asked + self.texts.apart(model, images[:1], side, piece) if self.texts and piece else asked


def train(
    model: Any,
    tokenizer: Any,
    pictures: Pictures,
    size: Size,
    narrations: list[list[int]],
    trial: Trial,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str, int, int, float], Any] = lambda *_: None,
) -> tuple[Any, Stage]:
    """Train the trial's method on the eye, or go on where it was.

    Args:
        model, tokenizer: the language model with its eye, without a method on it.
        pictures: all drawings.
        size: of the eye.
        narrations: tokens of each, for training.
        trial: what is trained.
        folder: of the checkpoint.
        stop: asked before every step whether to leave it at that for now.
        on_progress: called with the trial's name, step, steps and the mean loss of the last steps.

    Returns:
        The model with the method on it, and the stage: how far it is, and its CPU seconds.
    """
    before = None
    if trial.look_up is not None:
        equipped_model, before = train(
            model, tokenizer, pictures, size, narrations, trial.look_up, folder, stop, on_progress
        )
        if not before.done:
            return equipped_model, before
    else:
        equipped_model = equipped(model, trial)
    lessons = Lessons(tokenizer, pictures, size, narrations, trial, equipped_model.config)
    learnt = {name: value for name, value in equipped_model.named_parameters() if value.requires_grad}
    # as `keepsight train pvm` does: while a gate is shut nothing behind it learns
    faster = SftSettings.gate_lr_multiplier
    weights = {name: (value, faster if name.endswith(".gate") else 1.0) for name, value in learnt.items()}
    settings = {**size.settings(), **trial.told(), "lr": trial.lr, "gate_lr_multiplier": faster}
    stage = Stage(trial.name, folder, weights, trial.steps, trial.lr, settings)
    if before is not None and stage.step == 0:
        stage.cpu_seconds = before.cpu_seconds
    if not stage.done:
        stage.run(lessons.batch, partial(lessons.loss, equipped_model), stop, on_progress)
    return equipped_model, stage
