"""What a server must know about its model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from keepsight.backbone import Backbone
from keepsight.pvm.branch import PvmBranch
from keepsight.serve.hf.sampling import end_ids
from keepsight.vismem import VisMemBranch


@dataclass(frozen=True)
class Served:
    """A loaded model and its processor.

    Attributes:
        model: as `keepsight.load` returns it.
        processor: likewise.
        memories: kinds of memory it carries: "pvm", "vismem".
        context: positions it can have, if it says so.
        reserved: texts that stand for images or memories.
        adapters: (name, method) of what was loaded on the base.
        created: when it was loaded, in seconds since 1970.
    """

    model: Any
    processor: Any
    memories: tuple[str, ...]
    context: int | None
    reserved: tuple[str, ...]
    adapters: tuple[tuple[str, str], ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, model: Any, processor: Any, adapters: tuple[tuple[str, str], ...] = ()) -> Served:
        """Look at a model that `keepsight.load` has returned."""
        backbone = Backbone.of(model)
        memories = []
        if any(isinstance(module, PvmBranch) and module.active_blocks for module in model.modules()):
            memories.append("pvm")
        latent = VisMemBranch.find(model)
        names: list[str] = []
        if latent is not None and latent.active is not None:
            memories.append("vismem")
            names += latent.config.token_names
        for kind in ("image", "video"):
            token = getattr(processor, f"{kind}_token", None)
            if isinstance(token, str) and token:
                names.append(token)
        context = getattr(backbone.text_config, "max_position_embeddings", None)
        return cls(model, processor, tuple(memories), context, tuple(names), adapters)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def has_memory(self) -> bool:
        """Whether there is anything to switch off."""
        return bool(self.memories)

    @property
    def ends(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return end_ids(Backbone.of(self.model).model.generation_config)

    @property
    def vocabulary(self) -> int:
        """Token ids there are logits for."""
        return int(Backbone.of(self.model).text_config.vocab_size)
