"""What every process of a distributed test runs: the jobs of a JSON file, one after the other.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 tests/distributed/worker.py JOBS.json

Beside each job's output folder, every process writes what it saw, and the first one the gradients of every optimiser
step, put together from all processes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback

import keepsight
from keepsight.backbone import Backbone
from keepsight.train.engines import whole
from keepsight.train.sft import SftSettings, train_pvm
from keepsight.train.vismem import FormationSettings, train_vismem_formation
from keepsight.train.vismem_trainer import VisMemTrainer
from keepsight.vismem import VisMemConfig


class Watch(TrainerCallback):
    """Collects the gradients that each optimiser step uses, whether weights are sharded, and who saw images when."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.sharded = False
        self.saw_image: list[bool] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        backbone = Backbone.of(model)
        backbone.vlm.register_forward_pre_hook(lambda *_: self.saw_image.append(False))
        backbone.vision_tower.register_forward_pre_hook(lambda *_: self.saw_image.__setitem__(-1, True))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            self.sharded |= hasattr(parameter, "full_tensor")
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                self.gradients[f"{state.global_step}.{name.partition('base_model.')[2]}"] = whole(
                    parameter.grad
                ).clone()


def run_pvm(job: dict[str, Any], rank: int) -> None:
    """Train a memory as a job says."""
    watch = Watch()
    report = train_pvm(
        job["base"],
        job["data"],
        job["output"],
        pvm=keepsight.PvmConfig(**job["pvm"]),
        settings=SftSettings(**job["settings"]),
        resume="resume_from" in job,
        callbacks=[watch],
    )
    facts = {"sharded": watch.sharded, "saw_image": watch.saw_image, "base_unchanged": report.base_unchanged}
    Path(f"{job['output']}-rank{rank}.json").write_text(json.dumps(facts | {"resumed_from": report.resumed_from}))
    if rank == 0:
        save_file(watch.gradients, f"{job['output']}-gradients.safetensors")


def letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs from text to text."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def run_formation(job: dict[str, Any], rank: int) -> None:
    """Stage I of a VisMem as a job says; keeps the summed gradients, and how many trajectories invoked a memory."""
    gradients: dict[str, torch.Tensor] = {}
    invoked: list[int] = []
    optimise = VisMemTrainer._optimise

    def counting(self: VisMemTrainer, batch: Any, *args: Any) -> Any:
        invoked.append(sum(trajectory.invoked for trajectory in batch.trajectories))
        return optimise(self, batch, *args)

    def before_step(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            gradients[f"{len(invoked) - 1}.{index}"] = parameter.grad.clone()

    hook = register_optimizer_step_pre_hook(before_step)
    VisMemTrainer._optimise = counting  # type: ignore[method-assign]
    try:
        report = train_vismem_formation(
            job["base"],
            job["data"],
            job["output"],
            vismem=VisMemConfig(**job["vismem"]),
            rewards=[letters],
            settings=FormationSettings(**job["settings"]),
            text_only="keep",
            resume="resume_from" in job,
        )
    finally:
        hook.remove()
        VisMemTrainer._optimise = optimise  # type: ignore[method-assign]
    facts = {"invoked": invoked, "resumed_from": report.resumed_from, "reward": report.last["reward"]}
    Path(f"{job['output']}-rank{rank}.json").write_text(json.dumps(facts))
    if rank == 0:
        save_file(gradients, f"{job['output']}-gradients.safetensors")


def break_off(source: Path, target: Path) -> None:
    """What `source` held when a run in it was killed before the last checkpoint and the adapter were there."""
    target.mkdir()
    shutil.copy(source / "keepsight_run.json", target)
    first = min(source.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.copytree(first, target / first.name)


def shard_on_cpu() -> None:
    """Let accelerate shard on CPUs: it has all that it takes, but reads the FSDP settings on accelerators only."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def main(file: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    for job in json.loads(Path(file).read_text()):
        if "resume_from" in job:
            if rank == 0:
                break_off(Path(job["resume_from"]), Path(job["output"]))
            torch.distributed.barrier()
        (run_formation if "vismem" in job else run_pvm)(job, rank)


if __name__ == "__main__":
    main(sys.argv[1])
