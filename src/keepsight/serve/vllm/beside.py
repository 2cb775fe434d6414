"""A memory beside its layer's feed-forward network in vLLM, on the auxiliary stream that its shared experts use.

    vllm serve FOLDER --additional-config '{"keepsight": {"overlap": true}}'      opt-in until a GPU has timed it

Network and memory become one operator, which torch.compile does not look into: it runs eagerly where vLLM cuts its
graphs (prompts), and whole, fork and all, in the CUDA graphs of decoding steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm.envs as envs
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.multi_stream_utils import maybe_execute_in_parallel
from vllm.utils.torch_utils import aux_stream, direct_register_custom_op

_library = torch.library.Library("keepsight", "FRAGMENT")


class Beside:
    """A network and the memory beside it, as the operator finds them.

    Args:
        network: the mlp's own forward, [n, D] -> [n, D].
        memory: the block of the same layer, [n, D] -> [n, D].
    """

    def __init__(self, network: Callable[[torch.Tensor], torch.Tensor], memory: nn.Module):
        self._network, self._memory = network, memory
        self._stream = aux_stream()  # None where there is no CUDA
        self._events: list[Any] = [torch.cuda.Event() if self._stream else None for _ in range(2)]

    def __call__(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """network(hidden) + memory(x), each [n, D]."""
        stream = self._stream if x.shape[0] <= envs.VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD else None
        out, update = maybe_execute_in_parallel(
            lambda: self._network(hidden), lambda: self._memory(x), *self._events, aux_stream=stream
        )
        return out + update


def run_beside(
    mlp: nn.Module, memory: nn.Module, name: str, vllm_config: VllmConfig, residual: Callable[[], torch.Tensor]
) -> None:
    """Let a layer's mlp and its memory run as one operator.

    Args:
        mlp: the network.
        memory: the block.
        name: of the memory, unique in the engine.
        vllm_config: of the engine, which gets to know the operator and what is behind it.
        residual: returns the residual stream x [n, D] of the call.
    """
    compilation = vllm_config.compilation_config
    compilation.static_forward_context[name] = Beside(mlp.forward, memory)
    cuts = compilation.splitting_ops
    if cuts and "keepsight::vllm_beside" not in cuts:  # attention is inside, and vLLM cuts its graphs there
        cuts.append("keepsight::vllm_beside")
    mlp.forward = lambda hidden: torch.ops.keepsight.vllm_beside(hidden, residual(), name)


def _beside(hidden: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[name](hidden, x)


def _fake(hidden: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(hidden)


direct_register_custom_op("vllm_beside", _beside, fake_impl=_fake, target_lib=_library)
