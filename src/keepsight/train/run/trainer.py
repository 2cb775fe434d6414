"""A mixin for TRL's trainers: learning rate of gates, checkpoints, logs; the steps are TRL's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from keepsight.checkpoints.sources import POLICY
from keepsight.compat import checkpointing_arguments, checkpoints_reentrantly
from keepsight.errors import KeepsightError
from keepsight.modes import readable
from keepsight.train.run.accounting import CostMeter
from keepsight.train.run.engines import keep_vision_whole
from keepsight.train.run.learner import Learner
from keepsight.train.run.output import step_of
from keepsight.train.run.report import Speed, gates_of, memory_gradient_norm, memory_used
from keepsight.train.run.settings import RunSettings

OnLog = Callable[[dict[str, float], int, int], None]
"""Called as `on_log(values, step, total steps)`."""


class TrainingDivergedError(KeepsightError):
    """The loss became NaN or infinite."""


if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class LearnerTrainer(_Base):
    """Comes before a trainer of TRL among a class's bases: gates with a rate of their own, checkpoints that hold all
    that is trained, a stop at the first bad loss, and logs of what the memory does. Set `setup` before training.
    """

    setup: Setup

    def begin(self, meter: CostMeter, checkpoint: Path | None) -> None:
        """Count into this meter, and go on with the tokens and steps of the checkpoint."""
        self.setup.meter = meter
        if checkpoint is not None:
            history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
            self._total_train_tokens = int(max((entry.get("num_tokens", 0) for entry in history), default=0))
            self.setup.first_step = step_of(checkpoint)

    @property
    def tokens_seen(self) -> int:
        """Tokens read in all steps so far."""
        return int(max(getattr(self, "_total_train_tokens", 0), self.state.num_input_tokens_seen))

    def told(self) -> dict[str, Any]:
        """What the report of a run tells beside what all reports tell."""
        return {"gates": gates_of(self.model)}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's optimiser, with the gates in a group of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        gates = [p for n, p in self.model.named_parameters() if n.endswith(".gate") and p.requires_grad]
        if gates:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not gate for gate in gates)]
            lr = self.setup.settings.lr * self.setup.settings.gate_lr_multiplier
            optimizer.add_param_group({"params": gates, "lr": lr, "weight_decay": 0.0})
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' batches of a step; none where all steps are taken.

        A run that goes on from its last checkpoint in the middle of an epoch would otherwise take one step more, since
        transformers looks at the number of steps only after one.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's step; a loss that is not finite ends the run."""
        loss = super().training_step(model, *args, **kwargs)
        settings = self.setup.settings
        if not torch.isfinite(loss) and self.state.global_step == 0:
            raise TrainingDivergedError(
                f"The loss is {loss.item()} at the very first step, before anything was learned: the base's "
                "weights are damaged, or the dtype overflows (try --dtype float32)."
            )
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}; training has stopped. "
                f"Checkpoints saved before are whole. Try a lower --lr (now {settings.lr:g}) or a smaller "
                f"--gate-lr-multiplier (now {settings.gate_lr_multiplier:g}), and --resume or start anew."
            )
        return loss

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; its backward goes no deeper than it must."""
        if not self._checkpoints_reentrantly:
            stop_below_learners(self.model)
        return super().compute_loss(model, *args, **kwargs)

    def count(self, rows: int, length: int, tokens: torch.Tensor, batch: Any) -> None:
        """Count a forward, with its backward in training, over `rows` x `length` positions: `tokens` and padding."""
        meter = self.setup.meter
        if meter is None:
            return
        patches, checkpointing = meter.shape.patches(batch), self.setup.settings.checkpoints_gradients
        if self.model.training:
            meter.trained(rows, length, tokens=int(tokens), patches=patches, checkpointing=checkpointing)
        else:
            meter.read(rows, length, patches=patches)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None of TRL's, which tells how to use another kind of model: the result gets one of ours."""

    @property
    def _checkpoints_reentrantly(self) -> bool:
        """TRL's choice under DeepSpeed ZeRO-3."""
        return checkpoints_reentrantly(self.args)

    def _clip_grad_norm(self, model: Any) -> Any:
        self.setup.gradient = memory_gradient_norm(self.model)  # before it is clipped
        return super()._clip_grad_norm(model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log, with gates, the memory's gradients, speed and memory used."""
        setup = self.setup
        if "loss" in logs:
            logs.update({f"gate/{layer}": value for layer, value in gates_of(self.model).items()})
            speed = setup.speed(self.tokens_seen)
            more = {"memory_grad_norm": setup.gradient, "tokens_per_second": speed, **memory_used()}
            logs.update({name: value for name, value in more.items() if value is not None})
            if setup.meter is not None:
                setup.meter.steps = self.state.global_step - setup.first_step
                setup.meter.write()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with warnings.catch_warnings():  # the base is a folder that this run is about to write
            warnings.filterwarnings("ignore", message="Could not find a config file in ./policy")
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            folder = Path(output_dir or self.args.output_dir)
            self.setup.learner.save_policy(model, folder, state_dict)
            if (folder / POLICY / "config.json").is_file():
                self.processing_class.save_pretrained(folder / POLICY)
            readable(folder.rglob("*.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        learner = self.setup.learner
        if learner.policy == "full" and learner.memory is None:
            return None  # read when the model was
        if not learner.policy_beside:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.is_fsdp_enabled:
            raise KeepsightError(
                "A run that trains a memory and its language model cannot be resumed under FSDP: transformers reads "
                "back the memory alone. Resume it with recipes/accelerate/ddp.yaml or a DeepSpeed one, or start anew."
            )
        # The policy was read when the model was; transformers would take its folder for one more adapter.
        self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        return None


@dataclass
class Setup:
    """What a `LearnerTrainer` knows beside its arguments.

    Attributes:
        settings: of the run.
        learner: what is trained.
        meter: counts what the run costs; None counts nothing.
        first_step: of this session.
        gradient: norm of the memory's gradients at the last step.
        speed: of the run.
    """

    settings: RunSettings
    learner: Learner
    meter: CostMeter | None = None
    first_step: int = 0
    gradient: float | None = None
    speed: Speed = field(default_factory=Speed)


def common_arguments(settings: RunSettings, folder: Path, config_class: Any, evaluates: bool) -> dict[str, Any]:
    """The arguments of TRL's configs that all runs share."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.grad_accum,
        "learning_rate": settings.lr,
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": settings.warmup_ratio,  # below 1, transformers 5 takes it as a share of the steps
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.uses_bf16,
        **checkpointing_arguments(config_class, settings.checkpoints_gradients),
        "use_cpu": not settings.on_gpu,
        "ddp_find_unused_parameters": False,  # a memory without images gives gradients of zero, not none
        "seed": settings.seed,
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": settings.keep_checkpoints,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": (settings.eval_steps or settings.save_steps) if evaluates else None,
        "report_to": list(settings.report_to) or "none",
        "dataloader_num_workers": settings.workers,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def report_callback(on_log: OnLog | None) -> Any:
    """A callback that hands logs on, and sees to it that the last step and every checkpoint are logged."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if on_log is not None and state.is_world_process_zero:
                on_log(dict(logs), state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The last step, too; and every checkpoint, so that a resumed run knows the tokens so far.
            control.should_log |= control.should_save or state.global_step >= state.max_steps

    return Report()


def finish(trainer: Any, setup: Setup) -> Any:
    """What every new trainer needs: its setup, no printing of its own, the vision encoder whole."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.setup = setup
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    keep_vision_whole(trainer.accelerator, trainer.model)
    return trainer


#: What transformers' and PEFT's hooks on the input embeddings are called.
_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def stop_below_learners(model: torch.nn.Module) -> int:
    """Stop the backward pass below the lowest layer that learns; not for reentrant checkpointing.

    Wherever gradients are checkpointed, transformers, PEFT and TRL make the output of every input embedding require
    gradients, the vision encoder's patches included. Only reentrant checkpointing needs that. Otherwise the backward
    pass recomputes and runs through every layer below the lowest one that learns, and through the whole frozen vision
    encoder, to arrive at gradients that nobody reads: for a PVM on layers 8, 16 and 24 of 36, eight layers and the
    vision encoder. So their hooks are taken away; switching checkpointing on puts new ones on, so this is called before
    every forward that has a backward.

    Args:
        model: any model.

    Returns:
        How many hooks were taken away.
    """
    removed = 0
    for module in model.modules():
        found = [key for key, hook in module._forward_hooks.items() if getattr(hook, "__name__", "") in _HOOKS]
        for key in found:
            del module._forward_hooks[key]
        removed += len(found)
    return removed
