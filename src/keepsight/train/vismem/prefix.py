"""Prompts that are read once per step: their keys and values, for every teacher-forced pass over what follows them.

Nothing before a trajectory's first word depends on what VisMem trains (the memory; the special tokens' rows, none of
which stands in a prompt). So the trajectories of a group, with their memories, and the reference's texts without, all
begin with the same keys and values, the image's among them: prompt and image are read once per step, not once per
trajectory and pass, and no gradient runs through them.

Not where the policy itself is trained, nor under gradient checkpointing (which takes no cache), nor on models with
linear attention, whose state cannot be gone on from by several positions at once, nor beside a visual memory, whose own
states in the cache are not keys and values of the decoder: there, whole sequences are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from keepsight.backbone import Backbone
from keepsight.compat import cache_argument, find_output_cache
from keepsight.errors import KeepsightError
from keepsight.pvm import PvmConfig
from keepsight.train.vismem.rollout import Prompt
from keepsight.vismem.sequences import pad_left


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
    """The prompts of a step. Only those of the latest `take` are kept: trajectories come sorted by prompt.

    Args:
        model: carries VisMem; in eval mode.
        prompts: model inputs of one row each.

    Raises:
        KeepsightError: if the model's prompts cannot be gone on from.
    """

    def __init__(self, model: Any, prompts: Sequence[Prompt]):
        if not self.can_read(model):
            raise KeepsightError(
                "Keys and values alone do not stand for a prompt of this model: it has linear attention, or carries a "
                "PVM beside the latent memory. Leave prefixes out: log_probs(..., prefixes=None) reads whole sequences."
            )
        self.model, self.prompts = model, prompts
        self._kept: dict[int, Prefix] = {}

    @staticmethod
    def can_read(model: Any) -> bool:
        """Whether a model's prompts can be gone on from."""
        backbone = Backbone.of(model)
        others = getattr(backbone.model, "peft_config", {}).values()
        has_pvm = any(isinstance(config, PvmConfig) for config in others)
        return not has_pvm and all(Backbone.has_softmax_attention(layer) for layer in backbone.layers)

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
