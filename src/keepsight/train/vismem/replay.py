"""The teacher-forced pass: log-probabilities of written trajectories, memories spliced in, with gradients.

Stage I forms every memory again, all of them in parallel, from the hidden states that were recorded when it was
written; those are constants. So gradients reach the query builder, both formers, M_init and the gains, nothing else.
Stage II takes the recorded latents as constants of the trajectory; gradients reach what of the policy requires one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from keepsight.backbone import Backbone
from keepsight.compat import cache_argument, find_output_cache
from keepsight.errors import KeepsightError
from keepsight.pvm import PvmConfig
from keepsight.train.vismem.grpo import token_log_probs
from keepsight.train.vismem.prompts import Prompt, is_tokenwise, padding_id, stack_prompts
from keepsight.train.vismem.rollout import Trajectory, banned_ids
from keepsight.vismem import VisMemBranch, splice
from keepsight.vismem.sequences import pad_left, pad_right
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
            formed = formers.form(kind, [invocations[n].formation.detach() for n in where])
            for n, memory in zip(where, formed, strict=True):
                latents[n] = memory
    found = [memory for memory in latents if memory is not None]
    return torch.cat(found) if found else _nothing(model)


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
        inputs = with_completions(own, trajectories, pad, Backbone.of(model)) | {"use_cache": False}
    else:
        ids, valid = completions(trajectories, pad)
        found = prefixes.take([t.prompt for t in trajectories])
        inputs = continued(base, found, ids.to(base.device), valid.to(base.device))
    with splice(model, inputs["input_ids"], latents):
        logits = model(**inputs, logits_to_keep=length + 1).logits[:, -length - 1 : -1]  # Qwen-Omni returns all
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
    prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], pad: int, backbone: Backbone
) -> dict[str, torch.Tensor]:
    """Inputs of one uncached forward: prompts padded on the left, what was written after them on the right."""
    inputs = stack_prompts(prompts, pad)
    ids, valid = completions(trajectories, pad)
    more = {"input_ids": ids, "attention_mask": valid.long()}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    for name, value in inputs.items():
        if name in more or is_tokenwise(name, prompts):
            added = more.get(name, torch.full_like(ids, backbone.value_behind(name)))
            inputs[name] = torch.cat([value, added.to(value)], 1)
    return {name: value.to(backbone.model.device) for name, value in inputs.items()}


def completions(trajectories: Sequence[Trajectory], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What was written, padded on the right: ids [n, T], and where they are valid: bool [n, T]."""
    ids = pad_right([t.ids.cpu() for t in trajectories], pad)
    return ids, pad_right([torch.ones(len(t.ids), dtype=torch.bool) for t in trajectories])


def chosen_mask(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """Bool [n, T], where the model chose."""
    return pad_right([t.chosen for t in trajectories])


@dataclass(frozen=True)
class Prefix:
    """A prompt without its last token, which is read again with what follows it.

    Attributes:
        states: keys and values of each layer, [1, H, P - 1, d].
        last: id of the last token.
        place: its position ids: [3], or [1] where the model knows one kind of position.
    """

    states: list[tuple[torch.Tensor, torch.Tensor]]
    last: int
    place: torch.Tensor

    @property
    def length(self) -> int:
        """P - 1."""
        return self.states[0][0].shape[2]


class Prefixes:
    """The prompts of a step, read once for every teacher-forced pass over what follows them.

    Nothing before a trajectory's first word depends on what VisMem trains (the memory; the special tokens' rows, none
    of which stands in a prompt). So the trajectories of a group, with their memories, and the reference's texts
    without, all begin with the same keys and values, the image's among them: prompt and image are read once per step,
    not once per trajectory and pass, and no gradient runs through them. Only those of the latest `take` are kept:
    trajectories come sorted by prompt.

    Not where the policy itself is trained, nor under gradient checkpointing (which takes no cache), nor on models with
    linear attention, whose state cannot be gone on from by several positions at once, nor with sliding windows, whose
    caches drop what lies before them, nor beside a visual memory, whose own states in the cache are not keys and values
    of the decoder: there, whole sequences are read.

    Args:
        model: carries VisMem; in eval mode.
        prompts: model inputs of one row each.

    Raises:
        KeepsightError: if the model's prompts cannot be gone on from.
    """

    def __init__(self, model: Any, prompts: Sequence[Prompt]):
        if not self.can_read(model):
            raise KeepsightError(
                "Keys and values alone do not stand for a prompt of this model: it has linear attention or sliding "
                "windows, or carries a PVM beside the latent memory. Leave prefixes out: log_probs(..., prefixes=None) "
                "reads whole sequences."
            )
        self.model, self.prompts = model, prompts
        self._kept: dict[int, Prefix] = {}

    @staticmethod
    def can_read(model: Any) -> bool:
        """Whether a model's prompts can be gone on from."""
        backbone = Backbone.of(model)
        others = getattr(backbone.model, "peft_config", {}).values()
        has_pvm = any(isinstance(config, PvmConfig) for config in others)
        if has_pvm or backbone.has_sliding_windows:
            return False
        return all(Backbone.has_softmax_attention(layer) for layer in backbone.layers)

    def take(self, rows: Sequence[int]) -> list[Prefix]:
        """The prefixes of some rows' prompts."""
        self._kept = {i: self._kept[i] if i in self._kept else self._read(self.prompts[i]) for i in dict.fromkeys(rows)}
        return [self._kept[i] for i in rows]

    @torch.no_grad()
    def _read(self, prompt: Prompt) -> Prefix:
        backbone = Backbone.of(self.model)
        inputs = {name: value.to(backbone.model.device) for name, value in prompt.items()}
        places: list[Any] = []
        note = backbone.decoder.register_forward_pre_hook(
            lambda decoder, args, kwargs: places.append(kwargs.get("position_ids")), with_kwargs=True
        )
        try:
            cache = find_output_cache(self.model(**inputs, use_cache=True, logits_to_keep=1))
        finally:
            note.remove()
        length = inputs["input_ids"].shape[1]
        place = torch.tensor([length - 1]) if places[0] is None else places[0][..., -1].flatten()[-3:]
        assert cache is not None
        states = [(layer.keys[:, :, :-1], layer.values[:, :, :-1]) for layer in cache.layers]
        return Prefix(states, int(inputs["input_ids"][0, -1]), place)


def continued(model: Any, prefixes: Sequence[Prefix], ids: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
    """Inputs of one forward over what follows some prompts.

    Args:
        model: whose inputs they are.
        prefixes: of n rows.
        ids: what follows [n, T], padded on the right.
        valid: bool [n, T].

    Returns:
        Model inputs; their `input_ids` are [n, 1 + T], from the last token of each prompt on.
    """
    longest, device = max(prefix.length for prefix in prefixes), ids.device
    cache = DynamicCache()
    for layer in range(len(prefixes[0].states)):
        cache.update(*(torch.cat([pad_left(p.states[layer][i], longest, 2) for p in prefixes]) for i in (0, 1)), layer)
    before = torch.tensor([prefix.length for prefix in prefixes], device=device)[:, None]
    seen = torch.arange(longest, device=device) >= longest - before
    own = torch.cat([valid.new_ones(len(ids), 1), valid], 1)
    last = torch.tensor([[prefix.last] for prefix in prefixes], device=device)
    steps = torch.arange(own.shape[1], device=device)
    kinds = max(len(prefix.place) for prefix in prefixes)  # a prompt without an image has one, and it stands for three
    place = torch.stack([prefix.place.to(device).expand(kinds) for prefix in prefixes], 1)[..., None] + steps
    return {
        "input_ids": torch.cat([last, ids], 1),
        "attention_mask": torch.cat([seen, own], 1).long(),
        "position_ids": place if kinds == 3 else place[0],
        "use_cache": True,
        **cache_argument(model, cache),
    }
