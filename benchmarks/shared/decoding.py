"""The models that `benchmarks/decode.py` compares, and one of them in the middle of a generation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration, StaticCache

import keepsight
from keepsight.backbone import Backbone
from keepsight.compat import cache_argument
from keepsight.pvm import replace_memory
from keepsight.pvm.cache import VisualCache
from keepsight.pvm.fused import fused, may_fuse
from keepsight.pvm.streams import overlap

IMAGE, VIDEO, START, END = 10, 11, 12, 13
GATE = 0.1  # any value but 0, at which the logits could not tell the variants apart


@contextlib.contextmanager
def few() -> Iterator[None]:
    """Few kernels; without Triton, which torch's builds for CPUs lack, pvm's own, which `Decoder.fuses` tells."""
    with fused() if find_spec("triton") else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def few_beside() -> Iterator[None]:
    """Few kernels, on a second stream."""
    with few(), overlap():
        yield


#: Variants of pvm whose steps run in a scope of their own: with --graph.
SCOPES = {"beside": overlap, "fused": few, "fused-beside": few_beside}


@dataclass(frozen=True)
class Shape:
    """Text model of a Qwen3-VL. 4b and 8b are the released models' own."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool


SHAPES = {
    "tiny": Shape(256, 4, 4, 2, 64, 768, 1024, True),
    "1b": Shape(2048, 16, 16, 8, 128, 6144, 151936, True),
    "4b": Shape(2560, 36, 32, 8, 128, 9728, 151936, True),
    "8b": Shape(4096, 36, 32, 8, 128, 12288, 151936, False),
}


class PrecomputedVision(nn.Module):
    """Stands where the vision tower stood: returns embeddings [M, D] that were made beforehand."""

    spatial_merge_size = 2

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.embeds: torch.Tensor | None = None

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        assert self.embeds is not None
        return BaseModelOutputWithDeepstackFeatures(pooler_output=self.embeds, deepstack_features=[self.embeds] * 3)


def build_models(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Any, Any]:
    """(base, base with PVM), sharing every base parameter; random weights."""
    config = Qwen3VLConfig(
        text_config=asdict(shape)
        | {
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20] if shape.head_dim == 128 else [12, 10, 10],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 1,
            "out_hidden_size": shape.hidden_size,
            "deepstack_visual_indexes": [],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            base = Qwen3VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    base.model.visual = PrecomputedVision(dtype)
    shared = {id(p): p for p in base.parameters()}
    wrapped = get_peft_model(copy.deepcopy(base, shared), keepsight.PvmConfig(), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".pvm_blocks." in name:
                assert parameter.dtype == dtype or parameter.is_meta  # dtype of the base, as keepsight.load does
                if name.endswith(".gate"):
                    parameter.fill_(GATE)
    return base, wrapped.get_base_model()  # generate() of the PEFT wrapper calls the model inside, so this is decoded


def blocks_of(model: Any) -> dict[str, Any]:
    """Name in the cache -> PVM block."""
    return {
        f"{index}.{name}": block
        for index, layer in enumerate(Backbone.of(model).layers)
        if hasattr(layer, "visual_memory")
        for name, block in layer.visual_memory.pvm_blocks.items()
    }


class Decoder:
    """One variant in the middle of a generation.

    Args:
        model: the model whose steps are timed.
        inputs: the prompt.
        embeds: visual embeddings [M, D].
        max_length: longest sequence (of a static cache).
        compiled: torch.compile mode, or None for eager.
        static: whether the KV cache has a fixed size.
        reproject: project all visual tokens again at every step.
        scope: what steps run in, of `SCOPES`.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        embeds: torch.Tensor,
        max_length: int,
        compiled: str | None,
        static: bool,
        reproject: bool = False,
        scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self.model = model
        self.cache: Any = (
            StaticCache(config=model.config, max_cache_len=max_length) if static else DynamicCache(config=model.config)
        )
        self.given = cache_argument(model, self.cache)  # not in `_forward`, which may be compiled
        remembered: list[torch.Tensor] = []

        def look(packed: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
            remembered.append(packed)
            return packed

        self.batch = len(inputs["input_ids"])
        model.model.visual.embeds = embeds.repeat(self.batch, 1)  # the same image in every row
        with torch.no_grad(), replace_memory(look):
            output = model(**inputs, **self.given, use_cache=True, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(-1)
        self.length = inputs["input_ids"].shape[1]
        self.max_length = max_length
        delta = int(model.model.rope_deltas.flatten()[0])
        positions = torch.arange(self.length, max_length, device=self.token.device) + delta
        # each [3, B, 1]
        self.positions = positions.view(-1, 1, 1, 1).expand(-1, 3, self.batch, -1).contiguous().unbind()
        self.start = self.length
        self.graphs = compiled == "reduce-overhead" and self.token.is_cuda

        self.memory = VisualCache.of(self.cache)
        self.blocks = blocks_of(model)
        assert bool(self.blocks) == (self.memory is not None)
        self.reproject, self.scope = reproject, scope
        self.packed = remembered[0] if remembered else None
        self.forward: Callable[..., Any] = self._forward
        if compiled is not None:
            self.forward = torch.compile(
                self._forward, mode=None if compiled == "default" else compiled, fullgraph=True, dynamic=False
            )

    def _forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        if self.reproject:
            assert self.memory is not None
            kept = self.memory.states
            self.memory.states = {name: block.project(self.packed) for name, block in self.blocks.items()}
        with self.scope():
            output = self.model(input_ids=token, position_ids=position, **self.given, use_cache=True, logits_to_keep=1)
        if self.reproject:
            self.memory.states = kept  # or the projections would be outputs of the compiled graph
        return output.logits

    @torch.no_grad()
    def fuses(self) -> bool:
        """Whether every block takes few kernels in a step; where none does, `fused` is pvm again."""
        if self.memory is None:
            return False
        with self.scope():
            return all(
                may_fuse(block, self.packed[:, :1], self.memory.states[name]) for name, block in self.blocks.items()
            )

    @torch.no_grad()
    def step(self, token: torch.Tensor | None = None) -> torch.Tensor:
        """Decode one token a row; returns the logits [B, 1, vocabulary] they were chosen from."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        logits = self.forward(self.token if token is None else token, self.positions[self.length - self.start])
        self.token = logits[:, -1:].argmax(-1)
        self.length += 1
        return logits


class GraphDecoder(Decoder):
    """A variant whose step is captured in a CUDA graph by hand: replaying it costs the host one launch.

    Token, position and the cache's length are tensors that the graph itself moves on, so a replay is a whole step. On a
    CPU, where there is nothing to capture, the same step runs as it is: a rehearsal, and no figure.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.position = self.positions[0].clone()
        self.graph: Any = None
        if self.token.is_cuda:
            stream = torch.cuda.Stream()  # what is loaded or chosen at a first call must not be captured
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(3):
                    self._advance()
            torch.cuda.current_stream().wait_stream(stream)
            self.length += 3
            self.graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(self.graph):
                self._advance()

    def _advance(self) -> None:
        self.logits = self._forward(self.token, self.position)
        self.token.copy_(self.logits[:, -1:].argmax(-1))
        self.position.add_(1)

    @torch.no_grad()
    def step(self, token: torch.Tensor | None = None) -> torch.Tensor:
        """Decode one token a row; returns the logits [B, 1, vocabulary], which the next step overwrites."""
        assert self.length < self.max_length, "the cache is full"
        if token is not None:
            self.token.copy_(token)
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()
        self.length += 1
        return self.logits


def make_prompt(visual_tokens: int, text_tokens: int, device: torch.device, batch: int = 1) -> dict[str, torch.Tensor]:
    """Words, one image of `visual_tokens` tokens, words: `text_tokens` words in all; the same in every row."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(20, 1000, (text_tokens,), generator=g).tolist()
    half = text_tokens // 2
    side = next(s for s in range(int(visual_tokens**0.5), 0, -1) if visual_tokens % s == 0)
    ids = torch.tensor([[*words[:half], START, *[IMAGE] * visual_tokens, END, *words[half:]]]).repeat(batch, 1)
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.zeros(batch, 1),  # the stand-in for the vision tower does not look at them
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * (visual_tokens // side)]]).repeat(batch, 1),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}
