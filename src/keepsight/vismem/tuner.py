"""The face to PEFT: attach, enable, disable, save, load and delete a latent vision memory."""

from __future__ import annotations

import re
import warnings
from types import MethodType
from typing import Any

from torch import nn

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.peft_method import MemoryTuner
from keepsight.vismem.branch import BRANCH, CONTAINER, GUARD, MergeGuard, VisMemBranch
from keepsight.vismem.config import VisMemConfig
from keepsight.vismem.writing.generate import generate


class VisMemModel(MemoryTuner):
    """PEFT's tuner for VisMem. Use it through `peft.get_peft_model(vlm, VisMemConfig())`."""

    prefix = "vismem_"
    tuner_layer_cls = VisMemBranch
    config_cls = VisMemConfig
    place = BRANCH
    container = CONTAINER
    no_merge = (
        "A latent vision memory cannot be merged: its adapters work only while a memory is formed, and its tokens are "
        "not the base's."
    )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        backbone = Backbone.of(model)
        peft_config.resolve(backbone)
        peft_config.target_modules = rf"^{re.escape(backbone.decoder_path)}$"

    def _make_branch(self, target: Any, target_name: str) -> VisMemBranch:
        return VisMemBranch(Backbone.of(self.model))

    def _attach(self, branch: Any) -> None:
        MergeGuard.put(self.model)
        # Any wrapper's generate (PEFT's of either method, TRL's) ends in the model's own.
        self.model.generate = MethodType(generate, branch)
        self.model.loss_function = branch.loss

    def _add_memory(self, branch: Any, adapter_name: str, config: VisMemConfig) -> None:
        branch.add_memory(adapter_name, config)
        bound = next((c for c in branch.configs.values() if c.has_bound_tokens), None)
        if bound is not None and not config.has_bound_tokens and bound.token_names == config.token_names:
            config.token_ids, config.delimiter_ids = bound.token_ids, bound.delimiter_ids

    def _detach(self) -> None:
        decoder = Backbone.of(self.model).decoder
        branch = getattr(decoder, BRANCH, None)
        if branch is None:
            return
        branch.route.remove()
        self.model.loss_function = branch.base_loss
        delattr(decoder, BRANCH)
        delattr(self.model, GUARD)
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
