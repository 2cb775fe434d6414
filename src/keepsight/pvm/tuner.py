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
    place = BRANCH
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

    def _make_branch(self, target: Any, target_name: str) -> PvmBranch:
        return PvmBranch(int(target_name), Backbone.norm(target), Backbone.of(self.model).text_config)

    def _attach(self, branch: Any) -> None:
        getattr(Backbone.of(self.model).decoder, _ROUTE).add(branch.index, branch)

    def _add_memory(self, branch: Any, adapter_name: str, config: PvmConfig) -> None:
        branch.add_block(adapter_name, config)

    def _detach(self) -> None:
        decoder = Backbone.of(self.model).decoder
        if not hasattr(decoder, _ROUTE):
            return
        getattr(decoder, _ROUTE).remove()
        delattr(decoder, _ROUTE)
        for layer in decoder.layers:
            if hasattr(layer, BRANCH):
                delattr(layer, BRANCH)
