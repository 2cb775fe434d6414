"""The blindfold warm-up: for the first training steps, the frozen backbone's text cannot see the image.

This is keepsight's own addition; it is not in the PVM paper. Plain fine-tuning gives a fresh memory little reason to
look: while outputs are short, the backbone's own attention already answers, and the branch settles for what a parallel
MLP can do. The look-up through the memory then forms late or never, as a phase transition that depends on the seed.
Under the blindfold every answer that needs the image is wrong unless the memory brings it, so the look-up forms within
some hundred cheap steps on short samples::

    with blindfold(model):
        loss = model(**short_batch).loss
        loss.backward()

What has formed can be lost again. When sight comes back at once and for good, the look-up is no longer needed for
samples of training length, the gates fall, and on some seeds the look-up fades where only long outputs would show it
(benchmarks/results/lab-curves). So sight comes back for a part of the steps only, and the look-up stays needed to the
end: `BlindfoldSchedule` says for which. `keepsight train pvm` does this unless told otherwise. Any other trainer of
transformers or TRL takes it as a callback::

    SFTTrainer(model=get_peft_model(vlm, PvmConfig()), callbacks=[blindfold_callback()], ...)

Nothing is kept on the model: the blindfold is a property of the calls made inside the `with` block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keepsight.backbone import Backbone
from keepsight.compat import find_cache
from keepsight.errors import KeepsightError
from keepsight.pvm import PvmConfig
from keepsight.train.run.settings import SftSettings

WARM_UP, SHARE = 3 / 8, 0.5
"""The laboratory's schedule (120 steps of 320, then every second one), with which the look-up formed and stayed."""

_visual: ContextVar[torch.Tensor | None] = ContextVar("keepsight_blindfold_visual", default=None)


class BlindfoldError(KeepsightError):
    """This model, or this call, cannot be blindfolded."""


@dataclass(frozen=True)
class BlindfoldSchedule:
    """Which optimiser steps are blindfolded: the first ones, and from then on an even share.

    A pure function of the step's number, so that a resumed run and every process of several agree without a word.

    Attributes:
        steps: the warm-up; all of so many first steps.
        share: of the steps behind the warm-up, from 0 (none) to below 1, spread evenly: 0.5 is every second one.
    """

    steps: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"{self.steps} blindfolded steps: expected 0 (no warm-up) or more.")
        if not 0 <= self.share < 1:
            raise ValueError(
                f"A blindfolded share of {self.share} of the steps: expected 0 to below 1. With 1 the memory would "
                "never learn beside what the base sees itself."
            )

    @classmethod
    def default(cls, total: int) -> BlindfoldSchedule:
        """The laboratory's, for a run of so many optimiser steps."""
        return cls(int(total * WARM_UP), SHARE)

    @classmethod
    def of(cls, settings: SftSettings, total: int) -> BlindfoldSchedule:
        """That of a run of so many optimiser steps: the default, where the settings say nothing else."""
        default = cls.default(total)
        steps = default.steps if settings.blindfold_steps is None else settings.blindfold_steps
        share = 0.0 if settings.blindfold_steps == 0 else default.share
        return cls(steps, share if settings.blindfold_share is None else settings.blindfold_share)

    def covers(self, step: int) -> bool:
        """Whether optimiser step `step` (from 0) is blindfolded."""
        after = step - self.steps
        return after < 0 or math.floor((after + 1) * self.share) > math.floor(after * self.share)

    def __bool__(self) -> bool:
        """Whether any step is ever blindfolded."""
        return self.steps > 0 or self.share > 0

    def __str__(self) -> str:
        """For people."""
        if not self:
            return "none"
        first = f"the first {f'{self.steps:,} steps' if self.steps > 1 else 'step'}, then " if self.steps else ""
        return f"{first}{self.share:.0%} of the steps (not in the paper)"


class SightLosses:
    """The losses of blindfolded and of sighted steps, apart, since the last look.

    Their distance is what the base's own sight still adds to the memory: a look-up that has formed, and has stayed,
    brings the blindfolded loss down to the sighted one.
    """

    def __init__(self) -> None:
        self._losses: dict[bool, dict[int, torch.Tensor]] = {True: {}, False: {}}

    def add(self, step: int, blindfolded: bool, loss: torch.Tensor) -> None:
        """Add a micro-batch's part, a scalar, to the loss of optimiser step `step`. Waits for no device."""
        losses = self._losses[blindfolded]
        losses[step] = losses.get(step, 0.0) + loss.detach()

    def take(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`blindfolded_loss` and `sighted_loss`, where there were such steps, and start anew.

        Args:
            mean: of a tensor over all processes; every process calls this.
        """
        found = {}
        for name, blindfolded in (("blindfolded_loss", True), ("sighted_loss", False)):
            if losses := self._losses[blindfolded]:
                found[name] = mean(torch.stack([*losses.values()]).mean()).item()
                losses.clear()
        return found


def blindfold_callback(schedule: BlindfoldSchedule | None = None) -> Any:
    """A callback that blindfolds the training steps of any trainer of transformers or TRL; evaluations see.

    Args:
        schedule: which steps; default: `BlindfoldSchedule.default` of the trainer's number of steps.

    Raises:
        BlindfoldError: when training starts, if the model cannot be blindfolded.
    """
    from transformers import TrainerCallback

    class Blindfold(TrainerCallback):
        def __init__(self) -> None:
            self.schedule, self.on = schedule, ExitStack()

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.schedule = self.schedule or BlindfoldSchedule.default(state.max_steps)
            self.on.close()  # of a training that was broken off
            with blindfold(model):  # raises where it cannot work
                pass

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if self.schedule is not None and self.schedule.covers(state.global_step):
                self.on.enter_context(blindfold(model))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on.close()

    return Blindfold()


@contextmanager
def blindfold(model: nn.Module) -> Iterator[None]:
    """While active, text positions of the decoder cannot attend to visual ones in self-attention.

    Visual positions still see each other and the text before them, and PVM's branch still sees the images: it reads
    the visual embeddings as they enter the decoder, by an attention of its own. The blindfold is a 4D mask put in
    front of the decoder, so it works with gradient checkpointing, left or right padding, and rows with any number of
    images. It acts on calls made in this thread (or task) only, and leaves nothing behind, also after an exception.

    Args:
        model: a supported VLM, PEFT-wrapped or not.

    Raises:
        UnsupportedModelError: for an unknown family.
        BlindfoldError: where no mask can hide the image: layers with linear attention, flash or flex attention, cached
            or packed sequences.
    """
    backbone = Backbone.of(model)
    if why := why_not_blindfold(backbone):
        raise BlindfoldError(why)
    here: ContextVar[bool] = ContextVar("keepsight_blindfold_here", default=False)

    def find_images(vlm: nn.Module, args: tuple, kwargs: dict) -> None:
        if here.get():
            _visual.set(backbone.visual_mask(_argument(args, kwargs, "input_ids", 0), kwargs.get("inputs_embeds")))

    def cover(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        visual = _visual.get()
        if not here.get() or visual is None:
            return None
        _visual.set(None)
        _check_call(args, kwargs)
        embeds = kwargs["inputs_embeds"]
        mask = blindfold_mask(visual, kwargs.get("attention_mask"), embeds.dtype)
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        backbone.vlm.register_forward_pre_hook(find_images, with_kwargs=True),
        backbone.decoder.register_forward_pre_hook(cover, with_kwargs=True),
    ]
    token = here.set(True)
    try:
        yield
    finally:
        here.reset(token)
        _visual.set(None)
        for handle in handles:
            handle.remove()


def blindfold_mask(visual: torch.Tensor, attention_mask: Any, dtype: torch.dtype) -> torch.Tensor:
    """The causal mask in which text cannot see images, as additive values for eager and SDPA attention.

    Args:
        visual: bool [B, T], true at image and video positions.
        attention_mask: None, a padding mask [B, T] (1 keeps), or a 4D mask [B, 1, T, T], boolean (true keeps) or
            additive.
        dtype: of the result.

    Returns:
        [B, 1, T, T], 0 where a row may look and the most negative number elsewhere. A row that may look nowhere
        (padding) looks at itself, so that no softmax is empty.
    """
    rows, size = visual.shape
    keep = torch.ones(size, size, dtype=torch.bool, device=visual.device).tril()[None].expand(rows, -1, -1)
    if attention_mask is not None and attention_mask.dim() == 2:
        keep = keep & attention_mask.to(visual.device).bool()[:, None, :]
    elif attention_mask is not None:
        given = attention_mask[:, 0, :, :size].to(visual.device)
        keep = keep & (given if given.dtype == torch.bool else given == 0)
    keep = keep & ~(~visual[:, :, None] & visual[:, None, :])
    keep = keep | torch.eye(size, dtype=torch.bool, device=visual.device)
    return torch.zeros(rows, size, size, dtype=dtype, device=visual.device).masked_fill(~keep, torch.finfo(dtype).min)[
        :, None
    ]


def _argument(args: tuple, kwargs: dict, name: str, index: int) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[index] if index < len(args) else None


def why_not_blindfold(backbone: Backbone, pvm: PvmConfig | None = None, attention: str | None = None) -> str | None:
    """Why training on this base cannot be blindfolded, and what to do; None if it can.

    Args:
        backbone: the base; its meta tensors will do.
        pvm: the memory.
        attention: the attention that it will run with; default: the one it was made with.
    """
    if pvm is not None and pvm.branch != "memory":
        return f"branch={pvm.branch!r} looks at no image, so under the blindfold nothing would."
    linear = [i for i, layer in enumerate(backbone.layers) if not Backbone.has_softmax_attention(layer)]
    if linear:
        return (
            f"{backbone.family.name} cannot be blindfolded: layers {linear} mix tokens by linear attention, which "
            "carries the image on in a running state that no mask can hide it from. Train the memory without the "
            "warm-up (0 blindfold steps)."
        )
    if backbone.has_sliding_windows:
        return (
            f"This {backbone.family.name} cannot be blindfolded: some of its layers have sliding windows, and the "
            "blindfold's one mask for all layers would open them. Train the memory without the warm-up (0 blindfold "
            "steps)."
        )
    attention = attention or backbone.decoder.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return (
            f"The blindfold is a 4D attention mask, and {attention!r} attention takes none. Load the model with "
            "attn_implementation='sdpa' for the warm-up (--attention sdpa), or train without it (0 blindfold steps)."
        )
    return None


def _check_call(args: tuple, kwargs: dict) -> None:
    cache = find_cache(args, kwargs)
    length = cache.get_seq_length() if cache is not None else 0
    if isinstance(length, torch.Tensor):
        length = int(length)
    if length:
        raise BlindfoldError(
            f"A blindfolded call must hold its whole sequence, and this one continues a cache of {length} tokens. "
            "The blindfold is for training steps; generate outside of the `with` block."
        )
    if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")):
        raise BlindfoldError("Several samples are packed into one row; blindfolded training needs one sample per row.")
    if isinstance(kwargs.get("attention_mask"), dict):
        raise BlindfoldError(
            "This call brings one attention mask per layer type (sliding windows or generation); the blindfold needs "
            "the plain "
            "padding mask [B, T]."
        )
