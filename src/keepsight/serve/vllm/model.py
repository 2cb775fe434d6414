"""What turns a VLM of vLLM into one with a visual memory: a mixin before vLLM's own class.

    embed_input_ids   runs eagerly before every forward pass: the visual rows become keys and values of every block
    layer i           hooks, as on the Hugging Face path
      norm              hook   takes the residual stream x
      mlp               hook   adds gate * out
    load_weights      the memory's tensors go to the blocks, all others to vLLM

Where an image is, `is_multimodal` says; token ids do not (a typed placeholder is no image, and injected prompt
embeddings are none either). Keys and values are taken before layer 0, whose fused norm may write into the embeddings in
place.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from keepsight.errors import BrokenAdapterError, KeepsightError
from keepsight.peft_method import config_from_adapter
from keepsight.pvm.config import PvmConfig
from keepsight.serve.vllm.check import UnsupportedVllmError, check_layer
from keepsight.serve.vllm.memory import PagedMemory
from keepsight.serve.vllm.names import CONFIG_KEY, MEMORY_MODULE

_LAYERS = "language_model.model.layers"
_OURS = re.compile(rf"\.layers\.(\d+)\.{MEMORY_MODULE}\.pvm_blocks\.(.+)$")


class WithMemory:
    """Mixin: `class KeepsightX(WithMemory, X)` is vLLM's model X with the memory that its config.json describes."""

    supports_pp = False
    rename_weights: tuple[str, str] | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = memory_config(vllm_config.model_config.hf_config)
        _refuse_what_would_break(vllm_config)
        if not config.causal:
            logging.getLogger("vllm.keepsight").warning(
                "This memory was trained with the published, non-causal rule and is served by the causal one: text "
                "before an image gets no memory of it. Answers differ from those of the Hugging Face path."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._visual = torch.zeros(_most_positions(vllm_config), 1, dtype=torch.bool)
        self._memories: dict[int, PagedMemory] = {}
        self._dirty = 0  # rows in which the last step left keys and values of images
        layers = self.language_model.model.layers  # type: ignore[attr-defined]
        for index in config.layers or ():
            layer = layers[index]
            check_layer(layer, f"Decoder layer {index}")
            name = f"{_LAYERS}.{index}.{MEMORY_MODULE}"
            memory = PagedMemory(config.block_shape, vllm_config, name, self._visual)
            layer.add_module(MEMORY_MODULE, memory)
            _apply(layer, memory, name, vllm_config)
            self._memories[index] = memory
        self._unloaded = {
            f"{_LAYERS}.{index}.{MEMORY_MODULE}.{name}"
            for index, memory in self._memories.items()
            for name, _ in memory.named_parameters()
        }

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: torch.Tensor | None = None
    ) -> torch.Tensor:
        """vLLM's own, and on the way the blocks learn what is visual in this step."""
        embeds = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        where = None
        if multimodal_embeddings is not None and len(multimodal_embeddings) and is_multimodal is not None:
            where = _visual_positions(is_multimodal, multimodal_embeddings)
        if where is not None or self._dirty:
            count = max(len(embeds), self._dirty)
            if where is not None:
                where = where.to(embeds.device, non_blocking=True)
            self._visual[:count] = False
            if where is not None:
                self._visual.index_fill_(0, where, True)
            for memory in self._memories.values():
                memory.remember(embeds, where, count)
            self._dirty = len(embeds) if where is not None else 0
        return embeds

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """vLLM's own, without the memory's tensors, which go to the blocks.

        Raises:
            BrokenAdapterError: if the memory's tensors are not all there, or of other shapes.
        """
        ours: set[str] = set()

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                match = _OURS.search(name)
                if match is None:
                    yield (re.sub(*self.rename_weights, name) if self.rename_weights else name), tensor
                else:
                    ours.add(self._load_memory(int(match[1]), f"block.{match[2]}", name, tensor))

        loaded = super().load_weights(others())  # type: ignore[misc]
        self._unloaded -= ours
        if self._unloaded:
            raise BrokenAdapterError(
                f"{len(self._unloaded)} tensors of the visual memory were not among the weights, the first: "
                f"{min(self._unloaded)}. Export the folder again: keepsight export vllm ADAPTER OUT."
            )
        return loaded | ours

    def _load_memory(self, index: int, local: str, name: str, tensor: torch.Tensor) -> str:
        """Load one tensor of a block; returns its name in this model."""
        memory = self._memories.get(index)
        parameter = None if memory is None else dict(memory.named_parameters()).get(local)
        if parameter is None or parameter.shape != tensor.shape:
            there = "no such tensor" if parameter is None else f"one of shape {tuple(parameter.shape)}"
            raise BrokenAdapterError(
                f"The weights hold {name} of shape {tuple(tensor.shape)}; config.json describes {there}. The two "
                "belong to different exports."
            )
        parameter.data.copy_(tensor)
        return f"{_LAYERS}.{index}.{MEMORY_MODULE}.{local}"


def memory_config(hf_config: Any) -> PvmConfig:
    """The memory's configuration, as the export wrote it into config.json.

    Raises:
        KeepsightError: if there is none.
    """
    saved = getattr(hf_config, CONFIG_KEY, None)
    if not isinstance(saved, dict):
        raise KeepsightError(
            f"config.json names an architecture of keepsight but has no {CONFIG_KEY!r} that describes the memory. "
            "Make the folder with: keepsight export vllm ADAPTER OUT."
        )
    return config_from_adapter(PvmConfig, saved)


def _refuse_what_would_break(vllm_config: VllmConfig) -> None:
    parallel, multimodal = vllm_config.parallel_config, vllm_config.model_config.multimodal_config
    whole = "keys and values of images are prepared for a whole batch on every rank. Tensor and data parallelism work"
    pruned = "pruned videos bring text among their embeddings, which would be remembered as if it were seen"
    refused = {
        ("pipeline parallelism (--pipeline-parallel-size)", whole): parallel.pipeline_parallel_size > 1,
        ("dual-batch overlap (--enable-dbo, --ubatch-size)", whole): parallel.use_ubatching,
        ("decode context parallelism (--decode-context-parallel-size)", whole): parallel.decode_context_parallel_size
        > 1,
        ("prefill context parallelism (--prefill-context-parallel-size)", whole): (
            parallel.prefill_context_parallel_size > 1
        ),
        ("sequence-parallel mixture of experts", whole): parallel.use_sequence_parallel_moe,
        ("video pruning (--video-pruning-rate)", pruned): multimodal.is_multimodal_pruning_enabled(),
    }
    for (what, why), asked in refused.items():
        if asked:
            raise UnsupportedVllmError(f"A visual memory does not work with {what}: {why}.")


def _overlaps(vllm_config: VllmConfig) -> bool:
    """Whether the engine's additional config asks for memories beside networks (beside.py)."""
    given: Any = vllm_config.additional_config
    ours = given.get("keepsight", {}) if isinstance(given, dict) else {}
    if not isinstance(ours, dict) or set(ours) - {"overlap"} or not isinstance(ours.get("overlap", False), bool):
        raise UnsupportedVllmError(
            f"--additional-config says of keepsight {ours!r}; expected nothing, or {{'overlap': true}}."
        )
    return ours.get("overlap", False)


def _most_positions(vllm_config: VllmConfig) -> int:
    """How many positions a step can have, padding for CUDA graphs and for ranks included."""
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    most = max(vllm_config.scheduler_config.max_num_batched_tokens, graphs)
    return most + vllm_config.parallel_config.tensor_parallel_size


def _visual_positions(is_multimodal: torch.Tensor, embeddings: Any) -> torch.Tensor | None:
    """Where images and videos are [m]; not where prompt embeddings were put in. None if nowhere."""
    where = is_multimodal.nonzero().squeeze(-1)
    if any(getattr(item, "modality", None) == "prompt_embeds" for item in embeddings):
        visual = [getattr(item, "modality", None) != "prompt_embeds" for item in embeddings for _ in range(len(item))]
        where = where[torch.tensor(visual, device=where.device)]
    return where if len(where) else None


def _apply(layer: nn.Module, memory: PagedMemory, name: str, vllm_config: VllmConfig) -> None:
    """Hook a block into its layer."""
    waiting: list[torch.Tensor] = []  # x, between norm and mlp of one call

    def take_residual(norm: nn.Module, args: tuple, output: Any) -> None:
        waiting.append(output[1])

    def add_update(mlp: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + memory(waiting.pop())

    layer.post_attention_layernorm.register_forward_hook(take_residual)  # type: ignore[union-attr]
    mlp: nn.Module = layer.mlp  # type: ignore[assignment]
    if _overlaps(vllm_config):
        from keepsight.serve.vllm.beside import run_beside  # what it stands on is younger than vLLM 0.32

        run_beside(mlp, memory, name, vllm_config, waiting.pop)
    else:
        mlp.register_forward_hook(add_update)
