"""The teacher-forced pass: log-probabilities of written trajectories, memories spliced in, with gradients.

Stage I forms every memory again, all of them in parallel, from the hidden states that were recorded when it was
written; those are constants. So gradients reach the query builder, both formers, M_init and the gains, nothing else.
Stage II takes the recorded latents as constants of the trajectory; gradients reach what of the policy requires one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.train.vismem.grpo import token_log_probs
from keepsight.train.vismem.prefix import Prefixes, continued
from keepsight.train.vismem.rollout import Prompt, Trajectory, banned_ids, is_tokenwise, padding_id, stack_prompts
from keepsight.vismem import VisMemBranch, splice
from keepsight.vismem.memory import Formation, Sight
from keepsight.vismem.sequences import pad_right
from keepsight.vismem.tokens import TYPES


def recorded_latents(model: Any, trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """The latents as they were spliced in [m, D], in the order of their positions."""
    latents = [i.latents for t in trajectories for i in t.invocations]
    return torch.cat(latents) if latents else _nothing(model)


def formed_latents(model: Any, trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """The same memories formed anew [m, D], from the recorded hidden states, with gradients to what forms them."""
    formers = VisMemBranch.of(model).formers()
    invocations = [i for t in trajectories for i in t.invocations]
    latents: list[torch.Tensor | None] = [None] * len(invocations)
    for kind in TYPES:
        where = [n for n, i in enumerate(invocations) if i.kind == kind]
        if where:
            formed = formers.form(kind, [_constants(invocations[n].formation) for n in where])
            for n, memory in zip(where, formed, strict=True):
                latents[n] = memory
    found = [memory for memory in latents if memory is not None]
    return torch.cat(found) if found else _nothing(model)


def _constants(formation: Formation) -> Formation:
    sight = formation.sight
    patches = None if sight.patches is None else sight.patches.detach()
    return Formation(Sight(sight.visual.detach(), patches), formation.text.detach())


def _nothing(model: Any) -> torch.Tensor:
    base = Backbone.of(model)
    return torch.zeros(0, base.text_config.hidden_size, device=base.model.device)


def log_probs(
    model: Any,
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    latents: torch.Tensor,
    temperature: float = 1.0,
    prefixes: Prefixes | None = None,
) -> torch.Tensor:
    """Log-probabilities of what the model chose: [n, T], 0 elsewhere; T is the longest trajectory's.

    The distribution is the one the tokens were drawn from: tokens that could not be drawn have no share in it.

    Args:
        model: carries VisMem; in eval mode.
        prompts: as the trajectories were written after.
        trajectories: n of them.
        latents: their memories [m, D]; `recorded_latents` or `formed_latents`.
        temperature: of sampling.
        prefixes: the prompts' keys and values, if they need not be read again.
    """
    base = Backbone.of(model).model
    inputs: dict[str, Any]
    length, pad = max(len(t.ids) for t in trajectories), padding_id(base)
    if prefixes is None:
        own = [prompts[t.prompt] for t in trajectories]
        inputs = with_completions(own, trajectories, pad, base.device) | {"use_cache": False}
    else:
        ids, valid = completions(trajectories, pad)
        found = prefixes.take([t.prompt for t in trajectories])
        inputs = continued(base, found, ids.to(base.device), valid.to(base.device))
    with splice(model, inputs["input_ids"], latents):
        logits = model(**inputs, logits_to_keep=length + 1).logits[:, :-1]
    ids, chosen = inputs["input_ids"][:, -length:], chosen_mask(trajectories).to(base.device)
    admitted = pad_right([t.admitted for t in trajectories])
    tokens = VisMemBranch.of(model).tokens
    switched = [tokens.invoke[kind] for kind in TYPES]
    each = token_log_probs(logits / temperature, ids, banned_ids(model), switched, admitted)
    return torch.where(chosen, each, torch.zeros_like(each))


def log_probs_without_memory(
    model: Any,
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    temperature: float = 1.0,
    prefixes: Prefixes | None = None,
) -> torch.Tensor:
    """Log-probabilities [n, T] of the chosen words under the same policy had it never had a memory.

    This is the reference of stage I: the model as it is without us. Positions as in `log_probs`; chosen invocation
    tokens, which that model cannot write, are 0.
    """
    tokens = VisMemBranch.of(model).tokens
    keep = [~tokens.memory_mask(t.ids) for t in trajectories]
    plain = [
        dataclasses.replace(
            t, ids=t.ids[k], chosen=t.chosen[k.cpu()], admitted=t.admitted[k.cpu()] & False, invocations=[]
        )
        for t, k in zip(trajectories, keep, strict=True)
    ]
    found = log_probs(model, prompts, plain, _nothing(model), temperature, prefixes)
    result = found.new_zeros(len(trajectories), max(len(t.ids) for t in trajectories))
    for row, (values, kept) in enumerate(zip(found, keep, strict=True)):
        result[row, : len(kept)][kept] = values[: int(kept.sum())]
    return result


def with_completions(
    prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], pad: int, device: Any
) -> dict[str, torch.Tensor]:
    """Inputs of one uncached forward: prompts padded on the left, what was written after them on the right."""
    inputs = stack_prompts(prompts, pad)
    ids, valid = completions(trajectories, pad)
    more = {"input_ids": ids, "attention_mask": valid.long()}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    for name, value in inputs.items():
        if name in more or is_tokenwise(name, prompts):
            added = more.get(name, torch.zeros_like(more["input_ids"]))
            inputs[name] = torch.cat([value, added.to(value)], 1)
    return {name: value.to(device) for name, value in inputs.items()}


def completions(trajectories: Sequence[Trajectory], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What was written, padded on the right: ids [n, T], and where they are valid: bool [n, T]."""
    ids = pad_right([t.ids.cpu() for t in trajectories], pad)
    return ids, pad_right([torch.ones(len(t.ids), dtype=torch.bool) for t in trajectories])


def chosen_mask(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """Bool [n, T], where the model chose."""
    return pad_right([t.chosen for t in trajectories])
