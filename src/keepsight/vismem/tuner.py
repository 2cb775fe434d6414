"""The face to PEFT: attach, enable, disable, save, load and delete a latent vision memory.

The branch hangs *beside* the decoder's modules (`decoder.latent_memory`), never around one of them: the base model
keeps every module and parameter name it had.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from keepsight.backbone import Backbone
from keepsight.errors import BrokenAdapterError, KeepsightError, KeepsightWarning
from keepsight.peft_method import MemoryTuner
from keepsight.vismem import scope
from keepsight.vismem.config import VisMemConfig
from keepsight.vismem.formers import Formers
from keepsight.vismem.hooks import VisMemRoute
from keepsight.vismem.module import LatentMemory, LowRankBank, QueryBuilder
from keepsight.vismem.tokens import TokenRows
from keepsight.vismem.vision import bare

BRANCH = "latent_memory"  # name of the branch in the decoder; must not contain PEFT's prefix "vismem_"
_CONTAINER = "vismem_memory"


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
            {(i, n): (vision, vision) for i in range(len(backbone.vision_blocks)) for n in config.short_targets},
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
        embedding_rms(table),
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


class VisMemBranch(nn.Module, BaseTunerLayer):
    """The latent memories of one model, one per adapter.

    Args:
        backbone: the model's parts.
    """

    adapter_layer_names = (_CONTAINER,)
    backbone: Backbone

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.__dict__["backbone"] = backbone  # no submodule of its own submodule
        self.vismem_memory = nn.ModuleDict()
        self.configs: dict[str, VisMemConfig] = {}
        self.merged_adapters: list[str] = []
        self.route = VisMemRoute(backbone, self)

    @staticmethod
    def of(model: Any) -> VisMemBranch:
        """The branch of a model, which may be wrapped by PEFT.

        Raises:
            KeepsightError: if the model carries no VisMem.
        """
        branch = getattr(Backbone.of(model).decoder, BRANCH, None)
        if branch is None:
            raise KeepsightError(
                "This model carries no VisMem adapter: get_peft_model(model, VisMemConfig()) adds one."
            )
        return branch

    @property
    def weight(self) -> torch.Tensor:
        """What PEFT takes device and dtype of new adapters from: the embedding table."""
        return self.backbone.model.get_input_embeddings().weight

    def add_memory(self, adapter_name: str, config: VisMemConfig) -> None:
        """Add the memory of one adapter, on the device of the decoder's input and in its dtype."""
        memory = make_memory(config, self.backbone)
        like = self.weight
        if not memory.short_slots.is_meta:  # low_cpu_mem_usage builds on meta; the weights come when loading
            memory = memory.to(like.device, like.dtype if like.is_floating_point() else None)
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

    def check_complete(self, adapter_name: str, path: Any, found: set[str]) -> None:
        """Raise BrokenAdapterError if an adapter's file lacks tensors of its memory: PEFT would leave them random."""
        names = {name.partition(f"{_CONTAINER}.")[2] for name in found}
        missing = sorted(set(self.vismem_memory[adapter_name].state_dict()) - names)
        if missing:
            raise BrokenAdapterError(
                f"{path} lacks {len(missing)} tensors of the memory that its adapter_config.json describes, such as "
                f"{missing[0]}. Copy it again or use an earlier checkpoint."
            )

    @property
    def active_name(self) -> str | None:
        """Name of the adapter that is switched on."""
        if self.disable_adapters or scope.is_silent():
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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` of a model that carries VisMem; see `decoding.generate`."""
        from keepsight.vismem.decoding import generate

        return generate(self, *args, **kwargs)


class VisMemModel(MemoryTuner):
    """PEFT's tuner for VisMem. Use it through `peft.get_peft_model(vlm, VisMemConfig())`."""

    prefix = "vismem_"
    tuner_layer_cls = VisMemBranch
    config_cls = VisMemConfig
    container = _CONTAINER
    no_merge = (
        "A latent vision memory cannot be merged: its adapters work only while a memory is formed, and its tokens are "
        "not the base's."
    )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        backbone = Backbone.of(model)
        peft_config.resolve(backbone)
        peft_config.target_modules = rf"^{re.escape(backbone.decoder_path)}$"

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        branch = getattr(target, BRANCH, None)
        if branch is None:
            backbone = Backbone.of(self.model)
            branch = VisMemBranch(backbone)
            branch._active_adapter = self.active_adapter
            target.add_module(BRANCH, branch)
            # Any wrapper's generate (PEFT's of either method, TRL's) ends in the model's own.
            self.model.generate = branch.generate
        branch.add_memory(adapter_name, peft_config)
        bound = next((c for c in branch.configs.values() if c.has_bound_tokens), None)
        if bound is not None and not peft_config.has_bound_tokens and bound.token_names == peft_config.token_names:
            peft_config.token_ids, peft_config.delimiter_ids = bound.token_ids, bound.delimiter_ids

    def _detach(self) -> None:
        decoder = Backbone.of(self.model).decoder
        getattr(decoder, BRANCH).route.remove()
        delattr(decoder, BRANCH)
        self.model.__dict__.pop("generate", None)


def parameter_groups(model: Any, lr: float, end_lr: float | None = None) -> list[dict[str, Any]]:
    """Optimizer groups of the active memory's trainable parameters, the end tokens' rows at a lower learning rate.

    Args:
        model: a model that carries VisMem.
        lr: learning rate of everything else.
        end_lr: of the end tokens' rows; default: a tenth of `lr`. (The paper says "lower".)
    """
    memory = VisMemBranch.of(model).active
    if memory is None:
        raise KeepsightError("No VisMem adapter is active, so there is nothing to train.")
    trainable = [(n, p) for n, p in memory.named_parameters() if p.requires_grad]
    if not trainable:
        warnings.warn("No parameter of the memory requires a gradient.", KeepsightWarning, stacklevel=2)
    ends = [p for n, p in trainable if n.startswith("rows.end_")]
    rest = [p for n, p in trainable if not n.startswith("rows.end_")]
    return [
        {"params": rest, "lr": lr},
        {"params": ends, "lr": lr / 10 if end_lr is None else end_lr},
    ]
