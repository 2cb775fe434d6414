"""The branch that holds a model's latent memories at run time: which one is active, its formers, its tokens, its loss.

It hangs *beside* the decoder's modules (`decoder.latent_memory`), never around one of them: the base model keeps every
module and parameter name it had.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError, MergeError
from keepsight.peft_method import MemoryBranch
from keepsight.vismem.config import VisMemConfig
from keepsight.vismem.formers import Formers
from keepsight.vismem.hooks import VisMemRoute
from keepsight.vismem.module import LatentMemory, LowRankBank, QueryBuilder
from keepsight.vismem.tokens import MemoryTokens, TokenRows
from keepsight.vismem.vision import bare

BRANCH = "latent_memory"  # name of the branch in the decoder; must not contain PEFT's prefix "vismem_"
CONTAINER = "vismem_memory"
GUARD = "latent_memory_guard"


def make_memory(config: VisMemConfig, backbone: Backbone) -> LatentMemory:
    """A new memory as a resolved config describes it."""
    assert config.base_hidden_size is not None, "resolve() comes first"
    assert config.query_width is not None
    assert config.base_vision_size is not None
    size, vision = config.base_hidden_size, config.base_vision_size
    table = backbone.model.get_input_embeddings().weight
    return LatentMemory(
        QueryBuilder(size, config.num_queries, config.query_width, config.query_layers, config.query_heads),
        LowRankBank(
            {(i, n): (vision, vision) for i in range(max(backbone.vision_layers_read())) for n in config.short_targets},
            config.short_rank,
            config.short_alpha,
            config.short_dropout,
        ),
        LowRankBank(
            long_shapes(backbone, config.long_targets), config.long_rank, config.long_alpha, config.long_dropout
        ),
        TokenRows(size, tied=is_tied(backbone.model) and not config.untied_rows),
        vision,
        config.num_short * backbone.merge_side**2,
        config.num_long,
        embedding_rms(table) * backbone.embedding_scale,
    )


def long_shapes(backbone: Backbone, targets: list[str]) -> dict[tuple[int, str], tuple[int, int]]:
    """(layer, projection) -> (inputs, outputs) of the language model's softmax attention."""
    shapes = {}
    for index, layer in enumerate(backbone.layers):
        if Backbone.has_softmax_attention(layer):
            for name in targets:
                projection: Any = bare(getattr(Backbone.mixer(layer), name))
                shapes[index, name] = (projection.in_features, projection.out_features)
    if not shapes:
        raise KeepsightError("No layer of the language model has softmax attention for the long-term former to adapt.")
    return shapes


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one matrix."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def embedding_rms(table: torch.Tensor, sample: int = 4096) -> float:
    """Root mean square of the embedding table's entries, over `sample` evenly spaced rows."""
    if table.is_meta:
        return 1.0  # replaced by the saved value when the weights come
    rows = table[:: max(1, len(table) // sample)].detach().float()
    return float(rows.pow(2).mean().sqrt())


class VisMemBranch(nn.Module, MemoryBranch):
    """The latent memories of one model, one per adapter.

    Args:
        backbone: the model's parts.
    """

    adapter_layer_names = (CONTAINER,)
    backbone: Backbone

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.__dict__["backbone"] = backbone  # no submodule of its own submodule
        self.vismem_memory = nn.ModuleDict()
        self.configs: dict[str, VisMemConfig] = {}
        self.merged_adapters: list[str] = []
        self.route = VisMemRoute(backbone, self)
        self.base_loss = backbone.model.loss_function
        self.embedding_scale = backbone.embedding_scale

    @staticmethod
    def find(model: Any) -> VisMemBranch | None:
        """The branch of a model, which may be wrapped by PEFT; None if it carries no VisMem."""
        return getattr(Backbone.of(model).decoder, BRANCH, None)

    @staticmethod
    def of(model: Any) -> VisMemBranch:
        """The branch of a model, which may be wrapped by PEFT.

        Raises:
            KeepsightError: if the model carries no VisMem.
        """
        branch = VisMemBranch.find(model)
        if branch is None:
            raise KeepsightError(
                "This model carries no VisMem adapter: get_peft_model(model, VisMemConfig()) adds one."
            )
        return branch

    @property
    def beside(self) -> Any:
        """The embedding table."""
        return self.backbone.model.get_input_embeddings()

    def add_memory(self, adapter_name: str, config: VisMemConfig) -> None:
        """Add the memory of one adapter, on the device of the decoder's input and in its dtype."""
        like = self.weight
        if like.is_meta and self.place.type != "meta":
            raise KeepsightError(
                "The input embedding is offloaded (device_map has it on the CPU or on disk), and a VisMem begins with "
                "rows of it. Keep embed_tokens and lm_head where the model computes; layers may be offloaded."
            )
        memory = make_memory(config, self.backbone)
        if not memory.short_slots.is_meta:  # low_cpu_mem_usage builds on meta; the weights come when loading
            memory = memory.to(self.place, like.dtype if like.is_floating_point() else None)
        others = self.vismem_memory.keys() - {adapter_name}
        self.vismem_memory[adapter_name] = memory
        self.configs[adapter_name] = config
        if not memory.short_slots.is_meta and not like.is_meta:
            self._start_rows(memory, config)
        self.set_adapter(self.active_adapters if others else adapter_name, inference_mode=config.inference_mode)

    def restart_rows(self) -> None:
        """Start untrained rows again, now that the delimiters' tokens are known."""
        for name in self.vismem_memory:
            memory: Any = self.vismem_memory[name]
            if memory.rows.is_untrained:
                self._start_rows(memory, self.configs[name])

    def _start_rows(self, memory: Any, config: VisMemConfig) -> None:
        embedding = self.weight.detach()
        head = bare(self.backbone.model.get_output_embeddings()).weight.detach()
        if config.delimiter_ids:
            rows = embedding[config.delimiter_ids[0]], head[config.delimiter_ids[0]]
        else:  # no tokenizer yet: the mean token; `add_memory_tokens` starts them again
            rows = embedding[:4096].float().mean(0), head[:4096].float().mean(0)
        memory.rows.reset(*rows, config.perturbation)

    @property
    def active_name(self) -> str | None:
        """Name of the adapter that is switched on."""
        if self.is_off:
            return None
        names = [name for name in self.active_adapters if name in self.vismem_memory]
        if len(names) > 1:
            raise KeepsightError(
                f"Several VisMem adapters are active at once ({', '.join(names)}); a model has one memory at a time. "
                f"Choose: model.set_adapter({names[0]!r})."
            )
        return names[0] if names else None

    @property
    def active(self) -> Any:
        """The `LatentMemory` that is switched on, or None."""
        name = self.active_name
        return None if name is None else self.vismem_memory[name]

    @property
    def tokens(self) -> MemoryTokens:
        """Which ids are the special tokens'."""
        return MemoryTokens(self.config.token_ids)

    @property
    def config(self) -> VisMemConfig:
        """The configuration of the active adapter, or of the first."""
        return self.configs[self.active_name or next(iter(self.configs))]

    def formers(self) -> Formers:
        """The memory formers of the active adapter, with other adapters kept out."""
        self.route.shield(self.backbone.model)
        return Formers(self.backbone, self.active, self.config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)

    def loss(self, logits: torch.Tensor, labels: Any, vocab_size: int | None = None, **kwargs: Any) -> Any:
        """The base's own loss function, told how many logits there are once the special tokens have theirs."""
        count = vocab_size if self.active is None else logits.shape[-1]
        return self.base_loss(logits=logits, labels=labels, vocab_size=count, **kwargs)


class MergeGuard(nn.Module, BaseTunerLayer):
    """The first module of a model that carries VisMem: keeps other adapters from being merged into the base.

    The long-term former is the base under an adapter of its own, and other adapters keep out while it computes. Merged
    into the weights they could not. PEFT merges layer by layer and asks nobody but the tuner whose layers they are; so
    this stands where it comes first, and refuses before anything is merged.
    """

    adapter_layer_names = ()
    weight: Any = None  # PEFT asks every layer where its base is; there is none

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []

    @staticmethod
    def put(model: nn.Module) -> None:
        """Make a guard the first child of a model that has none."""
        others = {name: child for name, child in model._modules.items() if name != GUARD}
        model._modules.clear()
        model.add_module(GUARD, MergeGuard())
        model._modules.update(others)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raises MergeError."""
        raise MergeError(
            "Another adapter cannot be merged into the base beside a latent memory: the memory is formed by the base "
            "without it, and would be another one. Keep the adapter as it is (it costs little); or take the memory off "
            "first (unload()), merge, and train a memory for the merged model."
        )

    def unmerge(self) -> None:
        """Nothing was merged."""

    def unload_and_optionally_merge_module(self, merge: bool, *args: Any, **kwargs: Any) -> MergeGuard:
        """What PEFT calls where it takes adapters off: stays, unless they are to be merged."""
        if merge:
            self.merge()
        return self
