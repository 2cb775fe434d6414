"""Distributed engines of `accelerate launch`: find out which one runs, and refuse what does not work with it.

Training is written once, for one process; DDP, FSDP2 and DeepSpeed come from accelerate and its config files (see
recipes/accelerate). What is told apart here: combinations that would hang or silently do something else are refused
before any weight is read, sharded tensors are read whole, and the vision encoder stays whole where weights are sharded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError, KeepsightWarning

Method = Literal["pvm", "vismem"]


@dataclass(frozen=True)
class Engine:
    """How the processes of a run share their work.

    Attributes:
        name: "single", "ddp", "fsdp1", "fsdp2" or "zero1" to "zero3".
        processes: how many there are.
        rank: which of them this is.
    """

    name: str = "single"
    processes: int = 1
    rank: int = 0

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only its share of every weight, gathered whenever a layer runs."""
        return self.name in ("fsdp1", "fsdp2", "zero3")

    @property
    def is_main(self) -> bool:
        """Whether this process talks and writes."""
        return self.rank == 0


def current_engine(environment: Mapping[str, str] | None = None) -> Engine:
    """The engine that `accelerate launch` (or torchrun) has announced in the environment.

    Args:
        environment: where to look; default: `os.environ`.
    """
    found = os.environ if environment is None else environment
    processes, rank = int(found.get("WORLD_SIZE", "1")), int(found.get("RANK", "0"))

    def on(name: str) -> bool:
        return found.get(name, "false").lower() in ("true", "1")

    if on("ACCELERATE_USE_DEEPSPEED"):
        return Engine(f"zero{_zero_stage(found)}", processes, rank)
    if on("ACCELERATE_USE_FSDP"):
        return Engine(f"fsdp{found.get('FSDP_VERSION', '1')}", processes, rank)
    return Engine("ddp" if processes > 1 else "single", processes, rank)


def _zero_stage(environment: Mapping[str, str]) -> int:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() != "none" and Path(file).is_file():
        stage = json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0)
        if stage != "auto":
            return int(stage)
    return int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def check_engine(
    engine: Engine,
    method: Method,
    *,
    on_gpu: bool,
    text_only: int = 0,
    reentrant_works: bool = True,
    checkpointing: bool = False,
) -> None:
    """Refuse what is known not to work, before any weight is read.

    Args:
        engine: what the run was launched with.
        method: which memory is trained.
        on_gpu: whether training runs on a GPU.
        text_only: training samples without an image.
        reentrant_works: whether the memory may be recomputed by reentrant gradient checkpointing.
        checkpointing: whether gradients are checkpointed.

    Raises:
        KeepsightError: naming the engines that work instead.
    """
    if engine.name == "fsdp1":
        raise KeepsightError(
            "FSDP version 1 flattens frozen and trained weights into one tensor, which a memory beside a frozen base "
            "does not survive. Write fsdp_version: 2 into the accelerate config; recipes/accelerate/fsdp2.yaml has it."
        )
    if engine.name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise KeepsightError("The accelerate config asks for DeepSpeed, which is not installed: pip install deepspeed")
    if engine.name.startswith("zero") and method == "pvm" and not on_gpu:
        raise KeepsightError(
            "accelerate starts DeepSpeed on GPUs only: on CPUs every process would hold the whole model (plain data "
            "parallel), and what expects ZeRO-3 would fail. Launch with recipes/accelerate/ddp.yaml."
        )
    if method == "vismem" and engine.name not in ("single", "ddp"):
        why = (
            "every process forms its memories at steps of its own, and sharded weights have to be gathered by all "
            "processes at once, so each would wait for the others for ever"
            if engine.shards_weights
            else "its trainer has an optimiser of its own, and what DeepSpeed would spread, a memory's, is small"
        )
        raise KeepsightError(
            f"VisMem cannot be trained with {_spoken(engine.name)}: {why}. Launch it with recipes/accelerate/ddp.yaml."
        )
    if engine.name == "zero3" and text_only:
        raise KeepsightError(
            f"{text_only:,} samples have no image, and ZeRO-3 spreads the vision encoder too: a process whose batch "
            "has no image would leave the others waiting for ever. Leave such samples out (--text-only skip), or "
            "launch with FSDP2, DDP or ZeRO-2, where every process keeps the whole vision encoder."
        )
    if engine.name == "zero3" and checkpointing and not reentrant_works:
        raise KeepsightError(
            "TRL checkpoints gradients reentrantly under ZeRO-3, and a memory with detach_visual=False cannot be "
            "recomputed that way ('backward through the graph a second time'). Keep detach_visual=True, switch "
            "--gradient-checkpointing off, or launch with FSDP2 or ZeRO-2."
        )
    if engine.name == "fsdp2" and not on_gpu and engine.is_main:
        warnings.warn(
            "The FSDP settings have no effect: accelerate shards weights on GPUs only, and every CPU process holds the "
            "whole model (plain data parallel).",
            KeepsightWarning,
            stacklevel=3,
        )


def _spoken(name: str) -> str:
    return f"DeepSpeed ZeRO-{name[-1]}" if name.startswith("zero") else name.upper()


def keep_vision_whole(accelerator: Any, model: Any) -> None:
    """Under FSDP2, leave the frozen vision encoder on every process instead of sharding it; otherwise do nothing.

    A sharded layer runs on all processes or on none, and a process whose batch has no image does not run the vision
    encoder. It is frozen and small beside the decoder (0.4 to 0.7 billion parameters in the released Qwen-VLs).
    Must be called before accelerate prepares the model.

    Args:
        accelerator: the trainer's `accelerate.Accelerator`.
        model: the model, possibly wrapped by PEFT.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    tower = Backbone.of(model).vision_tower
    plugin.ignored_modules = [tower.to(accelerator.device)]
    # accelerate would send ignored weights to the meta device with the rest, and never bring them back. Nothing is
    # lost: every process has read the weights by now.
    plugin.cpu_ram_efficient_loading = False


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A detached tensor with all its values, wherever its parts are. All processes must call this together."""
    if hasattr(tensor, "full_tensor"):  # FSDP2
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):  # ZeRO-3
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()
