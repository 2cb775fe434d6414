"""The face to PEFT: attach, enable, disable, save, load and delete a persistent visual memory.

The branch hangs *beside* the layer's modules (`decoder.layers.i.visual_memory`), never around one of them: the base
model keeps every module and parameter name it had, so that LoRA adapters on the same model save and load as always.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from keepsight.backbone import Backbone
from keepsight.peft_method import MemoryTuner
from keepsight.pvm.branch import BRANCH, PvmBranch
from keepsight.pvm.config import PvmConfig
from keepsight.pvm.hooks import PvmRoute

_ROUTE = "_keepsight_pvm_route"


class PvmModel(MemoryTuner):
    """PEFT's tuner for PVM. Use it through `peft.get_peft_model(vlm, PvmConfig())`."""

    prefix = "pvm_"
    tuner_layer_cls = PvmBranch
    config_cls = PvmConfig
    container = "pvm_blocks"
    no_merge = (
        "A persistent visual memory cannot be merged: it is a branch with an attention of its own, not a change of the "
        "base weights."
    )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        backbone = Backbone.of(model)
        peft_config.resolve(backbone)
        names = "|".join(str(i) for i in peft_config.layers)
        peft_config.target_modules = rf"^{re.escape(backbone.decoder_path)}\.layers\.({names})$"
        if not hasattr(backbone.decoder, _ROUTE):
            setattr(backbone.decoder, _ROUTE, PvmRoute(backbone))

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
            branch = PvmBranch(int(target_name), Backbone.norm(target), backbone.text_config)
            branch._active_adapter = self.active_adapter
            target.add_module(BRANCH, branch)
            getattr(backbone.decoder, _ROUTE).add(int(target_name), branch)
        branch.add_block(adapter_name, peft_config)

    def _detach(self) -> None:
        decoder = Backbone.of(self.model).decoder
        getattr(decoder, _ROUTE).remove()
        delattr(decoder, _ROUTE)
        for layer in decoder.layers:
            if hasattr(layer, BRANCH):
                delattr(layer, BRANCH)
