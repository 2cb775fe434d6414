"""Intercept attention for the length of one call: a meter sees query and keys, the layer keeps its kernel.

transformers' layers look their attention function up by the name in their `config`. While layers are metered, their
`config` is a stand-in that gives our name; everything else it takes from the real one. Our function hands query and
keys to the meter and passes the layer's own kernel's result on untouched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

METERED = "keepsight_metered"

#: (row, query [B, H, T, d], key [B, H_kv, K, d], mask, other arguments): called for every metered layer's attention.
Look = Callable[[int, torch.Tensor, torch.Tensor, Any, dict], None]


class Metered:
    """The layers that are metered right now.

    Args:
        modules: their attention modules.
        look: what is told; `row` is the index into `modules`.
    """

    def __init__(self, modules: Sequence[Any], look: Look):
        self.modules, self.look = list(modules), look
        self._configs: list[Any] = []

    @property
    def is_on(self) -> bool:
        """Whether the stand-ins are in place."""
        return bool(self._configs)

    def on(self) -> None:
        """Put the stand-ins in place."""
        self._configs = [module.config for module in self.modules]
        for row, (module, config) in enumerate(zip(self.modules, self._configs, strict=True)):
            module.config = _Stand(config, self.look, row)

    def off(self) -> None:
        """Give the layers their configuration back."""
        for module, config in zip(self.modules, self._configs, strict=False):
            module.config = config
        self._configs = []


class _Stand:
    """A layer's configuration with one answer changed: which attention function to use."""

    def __init__(self, config: Any, look: Look, row: int):
        self._config, self._look, self._row = config, look, row

    @property
    def _attn_implementation(self) -> str:
        return METERED

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_config"), name)


def _metered_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """transformers' attention function for metered layers: the layer's own one, and a look at its query and keys."""
    stand = module.config
    module.config = stand._config  # kernels read their own name there
    name = stand._config._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        function = ALL_ATTENTION_FUNCTIONS[name]
    else:  # "eager" is a function of each modelling file
        function = sys.modules[type(module).__module__].eager_attention_forward
    stand._look(stand._row, query, key, attention_mask, kwargs)
    return function(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(METERED, _metered_attention)


def scores_of(query: torch.Tensor, key: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """Attention scores [B, H, T, K] float32 of query [B, H, T, d] and key [B, H_kv, K, d], before any mask."""
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # [B, H_kv, groups * T, d]
    scale = kwargs.get("scaling")
    scores = torch.matmul(grouped, key.transpose(2, 3)).float() * (width**-0.5 if scale is None else scale)
    if kwargs.get("softcap"):
        scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
    return scores.reshape(batch, heads, length, key.shape[2])
