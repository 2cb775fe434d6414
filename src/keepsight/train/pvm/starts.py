"""Where PVM's second stage starts: from what a first stage has left (memory, policy, controls), or from a base."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from keepsight.checkpoints.adapters import CONFIG, AdapterInfo
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.peft_method import config_from_adapter
from keepsight.pvm import PvmConfig
from keepsight.train.run.controls import Control, control_folder, control_learner
from keepsight.train.run.learner import Learner, PolicyChoice, ranked_lora
from keepsight.train.run.plan import MemoryPlan, plan_memory
from keepsight.train.run.settings import GrpoSettings


def what_learns(
    source: str,
    base: str,
    adapters: list[AdapterInfo],
    pvm: PvmConfig | None,
    policy: PolicyChoice,
    rank: int,
    settings: GrpoSettings,
) -> tuple[Learner, MemoryPlan]:
    """What learns, from where, and the plan of its memory.

    Raises:
        KeepsightError: if the adapters of `source` are none that this stage goes on with.
    """
    memories = [info for info in adapters if info.method == "PVM"]
    others = [info for info in adapters if info.method not in ("PVM", "LORA")]
    if others or (adapters and not memories):
        raise KeepsightError(
            f"{source} is a {(others or adapters)[0].method} adapter. This stage refines a PVM, or puts a new one on a "
            "plain VLM: name a folder that keepsight train pvm wrote, or a base model."
        )
    before = [info for info in adapters if info.method == "LORA"]
    if before and policy != "lora":
        raise KeepsightError(f"{source} was trained with a LoRA on its language model; go on with --policy lora.")
    if memories and pvm is not None:
        raise KeepsightError(f"{source} has a memory already, so the settings of a new one have no effect. Leave them.")
    if memories:
        pvm = config_from_adapter(PvmConfig, memories[0].config)
    plan = plan_memory(base, pvm)
    if not memories and settings.lr * settings.gate_lr_multiplier < 1e-4:
        warnings.warn(
            f"{source} has no memory yet. A new one's gates start at 0 and learn at "
            f"{settings.lr * settings.gate_lr_multiplier:g}, so it will hardly be used. Train it first (keepsight "
            "train pvm), as the paper does, or raise --gate-lr-multiplier.",
            KeepsightWarning,
            stacklevel=3,
        )
    lora = ranked_lora(plan.backbone, rank)[0] if policy == "lora" and not before else None
    return (
        Learner(
            memory=plan.pvm if memories else pvm or PvmConfig(),
            memory_from=memories[0].path if memories else None,
            policy=policy,
            lora=lora,
            policy_from=before[0].path if before else None,
        ),
        plan,
    )


def control_of(control: Control, learner: Learner, plan: MemoryPlan, adapters: list[AdapterInfo]) -> Learner:
    """A control of this stage, from where its own first stage left it, if the memory's folder holds that."""
    made, before = control_learner(control, learner, plan), first_stage(control, adapters)
    if before is None or not (before / CONFIG).is_file():
        return made
    if control.name == "lora":
        return replace(made, policy_from=before)
    if control.name == "mlp":
        return replace(made, memory_from=before)
    return made


def first_stage(control: Control, adapters: list[AdapterInfo]) -> Path | None:
    """Where the control of the same name beside the memory's first stage is, or would be."""
    memory = next((info for info in adapters if info.method == "PVM"), None)
    return None if memory is None else control_folder(memory.path, control)
