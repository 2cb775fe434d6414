"""What every process of a distributed test runs: the jobs of a JSON file, one after the other.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 tests/distributed/worker.py JOBS.json

Beside each job's output folder, every process writes what it saw, and the first one the gradients of every optimiser
step, put together from all processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback
from trl import GRPOTrainer

import keepsight
from keepsight.backbone import Backbone
from keepsight.train.pvm.grpo import GrpoSettings, train_pvm_grpo
from keepsight.train.pvm.sft import SftSettings, train_pvm
from keepsight.train.run.engines import whole
from keepsight.train.vismem.train import FormationSettings, train_vismem_formation
from keepsight.train.vismem.update import Update
from keepsight.vismem import VisMemConfig


class Watch(TrainerCallback):
    """Collects the gradients that each optimiser step uses, whether weights are sharded, and who saw images when."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.sharded = False
        self.saw_image: list[bool] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        backbone = Backbone.of(model)

        def forward(*_: Any) -> None:
            if torch.is_grad_enabled():  # not in rollouts
                self.saw_image.append(False)

        def vision(*_: Any) -> None:
            if torch.is_grad_enabled():
                self.saw_image[-1] = True

        backbone.vlm.register_forward_pre_hook(forward)
        backbone.vision_tower.register_forward_pre_hook(vision)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            self.sharded |= hasattr(parameter, "full_tensor")
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                self.gradients[f"{state.global_step}.{name.partition('base_model.')[2]}"] = whole(
                    parameter.grad
                ).clone()

    def write(self, output: str, report: Any, rank: int, **more: Any) -> None:
        """Write what was seen beside a run's folder."""
        facts = {"sharded": self.sharded, "saw_image": self.saw_image, "base_unchanged": report.base_unchanged}
        facts |= {"resumed_from": report.resumed_from, **more}
        Path(f"{output}-rank{rank}.json").write_text(json.dumps(facts))
        if rank == 0:
            save_file(self.gradients, f"{output}-gradients.safetensors")


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
    watch.write(job["output"], report, rank)


def run_grpo(job: dict[str, Any], rank: int) -> None:
    """Refine a memory and a LoRA on its language model as a job says.

    Completions are sampled, and then replaced by ones that follow from their prompts: what a process samples depends on
    how many rows it samples at once.
    """
    watch, sample = Watch(), GRPOTrainer._generate_single_turn

    def scripted(self: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        written, *rest = sample(self, prompt_ids, *args, **kwargs)
        assert len(written) == len(prompt_ids)
        copies: dict[str, int] = {}
        completions = []
        for prompt in map(str, prompt_ids):
            copies[prompt] = copies.get(prompt, 0) + 1
            choose = random.Random(f"{prompt} {copies[prompt]}")
            completions.append([choose.randrange(20, 60) for _ in range(choose.randint(2, 5))])
        return completions, *rest

    GRPOTrainer._generate_single_turn = scripted
    try:
        report = train_pvm_grpo(
            job["base"],
            job["data"],
            job["output"],
            policy="lora",
            lora_rank=2,
            pvm=keepsight.PvmConfig(**job["pvm"]),
            settings=GrpoSettings(**job["settings"], rewards=("worker:said",)),
            callbacks=[watch],
        )
    finally:
        GRPOTrainer._generate_single_turn = sample
    watch.write(job["output"], report, rank, reward=[report.first_reward, report.last_reward])


def said(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """A reward that differs from text to text, by TRL's convention."""
    return letters([one[0]["content"] for one in completions])


def letters(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs from text to text."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def run_formation(job: dict[str, Any], rank: int) -> None:
    """Stage I of a VisMem as a job says; keeps the summed gradients, and how many trajectories invoked a memory."""
    gradients: dict[str, torch.Tensor] = {}
    invoked: list[int] = []
    take = Update.take

    def counting(self: Update, batch: Any, *args: Any) -> Any:
        invoked.append(sum(trajectory.invoked for trajectory in batch.trajectories))
        return take(self, batch, *args)

    def before_step(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            gradients[f"{len(invoked) - 1}.{index}"] = parameter.grad.clone()

    hook = register_optimizer_step_pre_hook(before_step)
    Update.take = counting  # type: ignore[method-assign]
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
        Update.take = take  # type: ignore[method-assign]
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


def deepspeed_on_cpu() -> None:
    """Let accelerate start DeepSpeed on CPUs, which it does where it is not told that they are CPUs."""
    from accelerate.state import AcceleratorState, PartialState

    os.environ.pop("ACCELERATE_USE_CPU", None)
    partial, whole_state = PartialState.__init__, AcceleratorState.__init__

    def init_partial(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        partial(self, False, **kwargs | {"backend": "gloo"})

    def init(self: Any, mixed_precision: Any = None, cpu: bool = False, **kwargs: Any) -> None:
        whole_state(self, mixed_precision, False, **kwargs)

    PartialState.__init__, AcceleratorState.__init__ = init_partial, init  # type: ignore[method-assign]


RUNS = {"pvm": run_pvm, "grpo": run_grpo, "formation": run_formation}


def main(file: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        deepspeed_on_cpu()
    for job in json.loads(Path(file).read_text()):
        if "resume_from" in job:
            if rank == 0:
                break_off(Path(job["resume_from"]), Path(job["output"]))
            torch.distributed.barrier()
        RUNS[job.get("run", "pvm")](job, rank)


if __name__ == "__main__":
    main(sys.argv[1])
