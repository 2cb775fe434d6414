"""Choose what is trained: a memory, the language model (all of it or a LoRA), both, or nothing.

The same description serves training and its controls, supervised and by reinforcement, so that a memory and what it is
compared with differ in this one point. It also fixes how a run's folder is laid out, so that `keepsight.load` reads it:

    memory                     FOLDER holds the adapter
    memory and a LoRA          FOLDER holds the memory, FOLDER/policy the LoRA; loading the first loads both
    memory and language model  FOLDER holds the memory, FOLDER/policy the whole VLM, recorded as its base
    LoRA                       FOLDER holds the adapter
    language model             FOLDER holds the whole VLM
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import set_seed

from keepsight.backbone import Backbone
from keepsight.checkpoints.adapters import WEIGHTS
from keepsight.checkpoints.sources import POLICY
from keepsight.errors import KeepsightError
from keepsight.pvm import PvmConfig
from keepsight.pvm.branch import BRANCH

PolicyChoice = Literal["none", "lora", "full"]
POLICY_ADAPTER = "policy"
"""The adapter name of a LoRA on the policy, where a memory is the default."""


@dataclass(frozen=True)
class Learner:
    """What is put on a base, and which of its parameters are trained.

    Attributes:
        memory: a persistent visual memory (or, with branch="mlp", the control without one); None for none.
        memory_from: the adapter folder that it starts from; None starts a new one.
        policy: what of the language model is trained: nothing, a LoRA on its linear maps, or all of it (embeddings and
            head included). Vision encoder and projector always stay frozen.
        lora: the LoRA; needed for policy="lora", unless it starts from a folder.
        policy_from: the LoRA's adapter folder that it starts from.
    """

    memory: PvmConfig | None = None
    memory_from: Path | None = None
    policy: PolicyChoice = "none"
    lora: LoraConfig | None = None
    policy_from: Path | None = None

    @property
    def learns(self) -> bool:
        """Whether anything is trained at all."""
        return self.memory is not None or self.policy != "none"

    @property
    def policy_beside(self) -> bool:
        """Whether the trained policy is saved in a folder of its own beside the memory."""
        return self.memory is not None and self.policy != "none"

    def put_on(self, model: Any, seed: int, autocast: bool = True) -> Any:
        """Put the adapters on a base and mark what is trained.

        Args:
            model: the plain VLM.
            seed: of the initialisation.
            autocast: adapters in float32 on a base in half precision.

        Returns:
            A `PeftModel`, or `model` itself where there is no adapter; in train mode.
        """
        options: dict[str, Any] = {"autocast_adapter_dtype": autocast}
        set_seed(seed)
        with warnings.catch_warnings():  # PEFT finds two adapters on one model strange; here they are meant
            warnings.filterwarnings("ignore", message="(Already found a|You are trying to modify a model)")
            result = self._attach(model, options)
        if self.memory is not None:
            base = f"./{POLICY}" if self.policy == "full" else model.name_or_path
            result.peft_config["default"].base_model_name_or_path = base
        wanted = {id(parameter) for parameter in self._trained(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        return result.train()

    def _attach(self, model: Any, options: dict[str, Any]) -> Any:
        result = model
        name = POLICY_ADAPTER if self.memory is not None else "default"
        if self.policy_from is not None:
            result = PeftModel.from_pretrained(model, self.policy_from, adapter_name=name, is_trainable=True, **options)
        elif self.policy == "lora":
            assert self.lora is not None
            result = get_peft_model(model, copy.deepcopy(self.lora), adapter_name=name, **options)
        if self.memory_from is not None:
            result = PeftModel.from_pretrained(model, self.memory_from, is_trainable=True, **options)
        elif self.memory is not None:
            result = get_peft_model(model, copy.deepcopy(self.memory), **options)
        return result

    def _trained(self, model: Any) -> list[torch.nn.Parameter]:
        backbone = Backbone.of(model)
        chosen = []
        if self.policy == "full":
            chosen += [p for n, p in backbone.decoder.named_parameters() if f".{BRANCH}." not in n]
            chosen += [*backbone.model.get_input_embeddings().parameters()]
            chosen += [*backbone.model.get_output_embeddings().parameters()]
        if self.policy == "lora":
            chosen += [p for n, p in backbone.model.named_parameters() if ".lora_" in n]
        if self.memory is not None:
            chosen += [p for n, p in backbone.model.named_parameters() if f".{BRANCH}." in n]
        return chosen

    def save_policy(self, model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Save the policy that was trained beside a memory into FOLDER/policy.

        Args:
            model: the `PeftModel` of the memory.
            folder: of the memory.
            state: the whole model's state, where an engine has gathered it.
        """
        if not self.policy_beside:
            return
        target = folder / POLICY
        base = model.get_base_model()
        prefix = "base_model.model."
        found = base.state_dict() if state is None else {n.removeprefix(prefix): t for n, t in state.items()}
        if self.policy == "full":
            base.save_pretrained(target, state_dict={n: t for n, t in found.items() if f".{BRANCH}." not in n})
            return
        mark = f".{POLICY_ADAPTER}."
        tensors = {
            f"{prefix}{name.replace(mark, '.')}": tensor.detach().cpu().contiguous()
            for name, tensor in found.items()
            if ".lora_" in name and mark in name
        }
        assert tensors, "a LoRA was trained"
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        base.peft_config[POLICY_ADAPTER].save_pretrained(target)

    def resumed(self, checkpoint: Path) -> tuple[Learner, Path | None]:
        """How to go on from a checkpoint: (the learner, where to read the base's trained weights, if it has any)."""
        policy = checkpoint / POLICY
        if self.memory is None and self.policy == "full":
            return self, checkpoint
        if not self.policy_beside or not policy.is_dir():
            return self, None
        if self.policy == "lora":
            return replace(self, policy_from=policy), None
        return self, policy


def lora_targets(backbone: Backbone, names: Collection[str] | None = None) -> dict[str, int]:
    """Linear maps of the decoder's layers -> parameters that one rank of LoRA adds to each.

    Args:
        backbone: the base; its meta tensors will do.
        names: last parts of the maps' names, such as ("q_proj", "v_proj"); None for all maps.
    """
    return {
        f"{backbone.decoder_path}.layers.{index}.{name}": module.in_features + module.out_features
        for index, layer in enumerate(backbone.layers)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and BRANCH not in name and "router" not in name
        if names is None or name.rpartition(".")[2] in names
    }


def matched_lora(backbone: Backbone, parameters: int, names: Collection[str] | None = None) -> tuple[LoraConfig, int]:
    """A LoRA on the decoder's linear maps with as nearly as possible so many parameters.

    The common rank is the largest that fits; single maps get one rank more while that fits as well.

    Args:
        backbone: the base; its meta tensors will do.
        parameters: how many to match.
        names: of the maps, as in `lora_targets`; None for all.

    Returns:
        (the LoRA, how many parameters it has).

    Raises:
        KeepsightError: if not even the smallest LoRA has so few.
    """
    cost = lora_targets(backbone, names)
    rank = parameters // sum(cost.values())
    chosen = {name: rank for name in cost if rank}
    spare = parameters - rank * sum(cost.values())
    for name, each in cost.items():
        if each <= spare:
            chosen[name] = rank + 1
            spare -= each
    if not chosen:
        raise KeepsightError(
            f"No LoRA has as few as {parameters:,} parameters; the smallest has {min(cost.values()):,}."
        )
    return _lora(chosen), parameters - spare


def ranked_lora(backbone: Backbone, rank: int) -> tuple[LoraConfig, int]:
    """A LoRA of one rank on all linear maps of the decoder, and how many parameters it has."""
    cost = lora_targets(backbone)
    return _lora(dict.fromkeys(cost, rank)), rank * sum(cost.values())


def _lora(ranks: dict[str, int]) -> LoraConfig:
    """Rank by module name; the update is scaled by 2 everywhere."""
    common = min(ranks.values())
    more = {name: rank for name, rank in ranks.items() if rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=2 * common,
        target_modules=sorted(ranks),
        rank_pattern=more,
        alpha_pattern={name: 2 * rank for name, rank in more.items()},
    )


def lora_size(backbone: Backbone, lora: LoraConfig) -> int:
    """How many parameters a LoRA of `matched_lora` or `ranked_lora` has."""
    ranks: dict[str, int] = dict(lora.rank_pattern or {})
    chosen = set(lora.target_modules or ())
    return sum(each * ranks.get(name, lora.r) for name, each in lora_targets(backbone).items() if name in chosen)


def policy_lora(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of the LoRA on a model's policy, by their names in the model.

    Raises:
        KeepsightError: if there is none.
    """
    named = model.named_parameters()
    found = {name: p for name, p in named if ".lora_" in name and f".{POLICY_ADAPTER}." in name}
    if not found:
        raise KeepsightError(
            f"train='lora': the model carries no LoRA named {POLICY_ADAPTER!r}; train_vismem_invocation adds one."
        )
    return found


@contextlib.contextmanager
def without_policy(model: Any) -> Iterator[None]:
    """The model without the LoRA on its policy."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and POLICY_ADAPTER in m.lora_A]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
