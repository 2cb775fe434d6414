"""A warm start for VisMem before stage I: memory tokens regress onto the image's own visual embeddings.

**This is keepsight's own addition and is not in the paper.** In our digit laboratory stage I alone, which learns from
rewards only, never learnt to carry an image (docs/vismem.md, docs/evidence.md). The warm start needs no labels and no
answers: its target is what the base's own projector already made of the image, so a memory begins as a second copy of
the image where the text is, and stage I makes of it what pays.

    loss = mean over rows of |M - E|^2 / |E|^2

with M [N, D] a memory formed at the end of the row's text, and E [N, D] the row's visual embeddings, as they enter the
language model, brought to N by adaptive average pooling: over the image's grid where the row's visual tokens are one
whole image, in reading order otherwise (several images, tiles, videos). Where a memory has more tokens than the image,
nothing is averaged and embeddings are repeated. DeepStack features are not part of the target.

Two starting values are set first, where a memory was never trained: each gain, so that memories have the targets' root
mean square, and the short-term memory's slots, which become the mean patch (per place in the projector's square, where
the vision encoder keeps squares together) with a little noise.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError
from keepsight.train.run.checksums import checksums
from keepsight.train.run.preflight import Say
from keepsight.train.vismem.accounts import Accounts
from keepsight.train.vismem.moments import Moment, look, target
from keepsight.train.vismem.prompts import Prompt, QuestionOrder, Questions, padding_id, stack_prompts
from keepsight.train.vismem.settings import FormationSettings
from keepsight.vismem import VisMemBranch
from keepsight.vismem.tokens import LONG, SHORT, TYPES

OnWarmStep = Callable[[int, dict[str, float]], None]
"""Called as `on_log(step, {"short": relative error, "long": relative error, "lr": ..., "gradient_norm": ...})`."""

WARMUP = 10
"""Steps over which the learning rate rises; then it falls along a cosine to a tenth."""
SLOT_NOISE = 0.02
MAX_GRAD_NORM = 1.0


@dataclass
class WarmStartReport:
    """What a warm start did.

    Attributes:
        steps: optimiser steps taken.
        parameters: number of parameters trained.
        first: relative squared error of each type of memory in the first step (1 is as bad as a memory of zeros).
        last: the same, over the last tenth of the steps.
        rows_without_image: rows that had nothing to regress onto.
        seconds: wall time.
    """

    steps: int
    parameters: int
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    rows_without_image: int = 0
    seconds: float = 0.0


def distill(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    lr: float = 3e-3,
    on_log: OnWarmStep | None = None,
    kinds: tuple[str, ...] = TYPES,
    on_look: Callable[[Moment], None] | None = None,
) -> WarmStartReport:
    """Train the active VisMem's memory tensors to reproduce the images' visual embeddings.

    Changes the query builder, the two low-rank adapters, the slots, the gains and the map into the vision encoder;
    everything else keeps its bits, the special tokens' rows included (checked at the end).

    Args:
        model: a model that carries VisMem, on its device; the base may be in any dtype.
        batches: model inputs, one mapping per step (`input_ids` [B, T], `attention_mask`, `pixel_values`, ...), padded
            on either side. A memory is formed at the end of each row, from its visual states and from the states of
            the text behind its last visual token. Labels are ignored. Batches are taken in order; the iterable is
            begun again when it ends before `steps` (an iterator cannot be).
        steps: optimiser steps.
        lr: peak learning rate of AdamW.
        on_log: called after every step.
        kinds: the types of memory to train, both in every step.
        on_look: called in every step with what its memories are formed from.

    Returns:
        What was done.

    Raises:
        KeepsightError: if there is no VisMem, no batch, or no image in any of them; if a loss is not finite.
    """
    branch = VisMemBranch.of(model)
    memory = branch.active
    if memory is None:
        raise KeepsightError("No VisMem adapter is active, so there is nothing to warm up: model.set_adapter(name).")
    if steps < 1:
        raise KeepsightError(f"steps={steps}: a warm start takes at least one step. To skip it, do not call it.")
    if not kinds or set(kinds) - set(TYPES):
        raise KeepsightError(f"kinds={kinds!r}: expected some of {', '.join(map(repr, TYPES))}.")
    trained = _trained_parameters(memory, kinds)
    report = WarmStartReport(steps=steps, parameters=sum(p.numel() for p in trained))
    history: dict[str, list[float]] = {kind: [] for kind in kinds}
    begin = time.perf_counter()
    with _training(model, memory, trained) as optimizer:
        for step, inputs in enumerate(_repeated(batches, steps)):
            moment = look(branch, inputs)
            if on_look is not None:
                on_look(moment)
            report.rows_without_image += moment.rows - len(moment.formations)
            if step == 0:
                _set_starting_values(branch, memory, moment, kinds)
            if not moment.formations:
                continue
            losses = {kind: _relative_error(branch, kind, moment) for kind in kinds}
            rate = lr * pace(step, steps)
            norm = _step(optimizer, trained, sum(losses.values()), rate)
            if not math.isfinite(norm):
                raise KeepsightError(f"Warm start: the gradient of step {step + 1} is {norm}. Try a lower lr ({lr}).")
            values = {kind: float(loss.detach()) for kind, loss in losses.items()}
            for kind, value in values.items():
                history[kind].append(value)
            if on_log is not None:
                on_log(step + 1, values | {"lr": rate, "gradient_norm": norm})
    if not all(history.values()):
        raise KeepsightError("Warm start: no batch had an image, so there was nothing to regress memories onto.")
    report.first = {kind: values[0] for kind, values in history.items()}
    report.last = {kind: fmean(values[-max(1, len(values) // 10) :]) for kind, values in history.items()}
    report.seconds = time.perf_counter() - begin
    return report


def warm_up(
    model: Any, questions: Questions, settings: FormationSettings, say: Say, accounts: Accounts
) -> WarmStartReport:
    """The warm start as the first part of stage I, counted into `accounts`; every process does the same."""
    order = QuestionOrder(len(questions), settings.warm_start_batch, settings.seed + 1)
    pad = padding_id(Backbone.of(model).model)
    formers = VisMemBranch.of(model).formers()
    latents = {kind: formers.length(kind) for kind in TYPES}

    read: list[Prompt] = []

    def batches() -> Iterator[Mapping[str, Any]]:
        for step in range(settings.warm_start_steps):
            read[:] = [questions[i].inputs for i in order.batch(step)]
            yield stack_prompts(read, pad)

    say(f"warm start (latent distillation, ours, not in the paper): {settings.warm_start_steps} steps")

    def on_log(step: int, values: Mapping[str, float]) -> None:
        if step % settings.logging_steps == 0 and step < settings.warm_start_steps:
            errors = ", ".join(f"{kind} {values[kind]:.3f}" for kind in TYPES)
            say(f"warm start {step}/{settings.warm_start_steps}: relative squared error {errors}")

    def on_look(moment: Moment) -> None:
        accounts.warmed(read, moment, latents)

    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        report = distill(
            model, batches(), steps=settings.warm_start_steps, lr=settings.warm_start_lr, on_log=on_log, on_look=on_look
        )
    model.eval()
    errors = ", ".join(f"{kind} {report.first[kind]:.3f} -> {report.last[kind]:.3f}" for kind in report.last)
    say(f"warm start done in {report.seconds:.1f} s; relative squared error: {errors}")
    return report


def pace(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short rise, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / WARMUP) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _targets(branch: Any, kind: str, moment: Moment) -> torch.Tensor:
    count, side = branch.formers().length(kind), branch.backbone.merge_side
    return torch.stack(
        [target(e, count, f.sight, side) for e, f in zip(moment.embeddings, moment.formations, strict=True)]
    )


def _relative_error(branch: Any, kind: str, moment: Moment) -> torch.Tensor:
    wanted = _targets(branch, kind, moment)
    formed = branch.formers().form(kind, moment.formations).float()
    return ((formed - wanted).square().mean((1, 2)) / wanted.square().mean((1, 2)).clamp(min=1e-12)).mean()


@torch.no_grad()
def _set_starting_values(branch: Any, memory: Any, moment: Moment, kinds: tuple[str, ...]) -> None:
    if not moment.formations:
        return
    banks = {SHORT: memory.short_bank, LONG: memory.long_bank}
    gains = {SHORT: memory.short_gain, LONG: memory.long_gain}
    for kind in kinds:
        if not banks[kind].is_untrained:
            continue
        size = _targets(branch, kind, moment).square().mean().sqrt()
        gains[kind].copy_(size / memory.embedding_rms.float())
        if kind == SHORT:
            square = _mean_square(branch.backbone, [f.sight.patches.x for f in moment.formations if f.sight.patches])
            slots = square.repeat(len(memory.short_slots) // len(square), 1).to(memory.short_slots)
            memory.short_slots.copy_(slots + SLOT_NOISE * torch.randn_like(slots))


def _mean_square(backbone: Backbone, patches: list[torch.Tensor]) -> torch.Tensor:
    """The mean patch [s * s, d] at each place of a projector's square."""
    cells, everything = backbone.merge_side**2, torch.cat(patches).float()
    if not backbone.patches_are_in_order or len(everything) % cells:
        return everything.mean(0).expand(cells, -1)  # these encoders keep patches in rows, not in squares
    return everything.unflatten(0, (-1, cells)).mean(0)


def _trained_parameters(memory: Any, kinds: tuple[str, ...]) -> list[torch.nn.Parameter]:
    unused = {SHORT: ("short_", "to_vision"), LONG: ("long_",)}
    skipped = ("rows.", *(prefix for kind in TYPES if kind not in kinds for prefix in unused[kind]))
    return [p for name, p in memory.named_parameters() if not name.startswith(skipped)]


@contextlib.contextmanager
def _training(model: Any, memory: Any, trained: list[torch.nn.Parameter]) -> Iterator[torch.optim.Optimizer]:
    """Only `trained` requires gradients, the base is in eval mode; all is put back, and the rest is unchanged."""
    parameters = list(model.parameters())
    required = [p.requires_grad for p in parameters]
    was_training = model.training
    kept = {id(p) for p in trained}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in kept]
    before = checksums(model, skip=names)
    for parameter in parameters:
        parameter.requires_grad_(id(parameter) in kept)
    model.eval()
    memory.train()
    try:
        yield torch.optim.AdamW(trained, weight_decay=0.0, betas=(0.9, 0.99))
    finally:
        model.train(was_training)
        for parameter, value in zip(parameters, required, strict=True):
            parameter.requires_grad_(value)
            parameter.grad = None if id(parameter) in kept else parameter.grad
    assert before == checksums(model, skip=names), "only memory tensors may change"


def _step(optimizer: torch.optim.Optimizer, trained: list[torch.nn.Parameter], loss: Any, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _repeated(batches: Iterable[Mapping[str, Any]], steps: int) -> Iterator[Mapping[str, Any]]:
    """`steps` batches; an iterable that ends early is begun again."""
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            raise KeepsightError(
                f"Warm start: the batches ended after {done} of {steps} steps. Give a list or a data loader, which can "
                "be begun again, or fewer steps."
            )
