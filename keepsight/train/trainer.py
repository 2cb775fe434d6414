"""TRL's SFT trainer for a memory: gates with a rate of their own, the blindfold, a stop at the first bad loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from keepsight.errors import KeepsightError
from keepsight.pvm import PvmConfig
from keepsight.train.blindfold import blindfold
from keepsight.train.collate import ConversationCollator
from keepsight.train.data import CheckedData, read_sample
from keepsight.train.engines import keep_vision_whole, whole
from keepsight.train.settings import SftSettings


class TrainingDivergedError(KeepsightError):
    """The loss became NaN or infinite."""


def gates_of(model: torch.nn.Module) -> dict[int, float]:
    """Decoder layer -> value of the active memory's gate."""
    found = {}
    for name, parameter in model.named_parameters():
        if "pvm_blocks." in name and name.endswith(".gate"):
            found[int(name.partition(".layers.")[2].partition(".")[0])] = whole(parameter).float().item()
    return dict(sorted(found.items()))


def make_trainer(
    model: Any,
    processor: Any,
    pvm: PvmConfig | None,
    settings: SftSettings,
    folder: Path,
    data: CheckedData,
    eval_data: CheckedData | None,
    collator: ConversationCollator,
    on_log: Callable[[dict[str, float], int, int], None] | None,
    callbacks: list[Any],
) -> Any:
    """A trainer of a new memory on `model`, which checkpoints into `folder`.

    Args:
        model: the base, not yet wrapped by PEFT.
        processor: saved beside every checkpoint.
        pvm: the memory; None for `PvmConfig()`.
        settings: how to train.
        folder: gets the checkpoints.
        data: checked training data.
        eval_data: checked data for the evaluation loss, or None.
        collator: makes batches; copied.
        on_log: called as `on_log(values, step, total steps)`.
        callbacks: further transformers callbacks.
    """
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class PvmTrainer(SFTTrainer):
        """TRL's trainer with a learning rate for the gates, the blindfold, and a stop at the first bad loss."""

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            gates = [p for n, p in self.model.named_parameters() if n.endswith(".gate") and p.requires_grad]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not gate for gate in gates)]
            lr = settings.lr * settings.gate_lr_multiplier
            optimizer.add_param_group({"params": gates, "lr": lr, "weight_decay": 0.0})
            return optimizer

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            covered = self.state.global_step < settings.blindfold_steps
            with blindfold(self.accelerator.unwrap_model(model)) if covered else nullcontext():
                loss = super().training_step(model, *args, **kwargs)
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

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs.update({f"gate/{layer}": value for layer, value in gates_of(self.model).items()})
            super().log(logs, *args, **kwargs)

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if on_log is not None and state.is_world_process_zero:
                on_log(dict(logs), state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The last step, too; and every checkpoint, so that a resumed run knows the tokens so far.
            control.should_log |= control.should_save or state.global_step >= state.max_steps

    gpu = settings.on_gpu
    checkpointing = settings.checkpoints_gradients
    # Newer transformers call it activation_checkpointing.
    renamed = "activation" if any(f.name == "activation_checkpointing" for f in fields(SFTConfig)) else "gradient"
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1, transformers 5 takes it as a share of the steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=(gpu and torch.cuda.is_bf16_supported()) if settings.bf16 is None else settings.bf16,
        **{
            f"{renamed}_checkpointing": checkpointing,
            f"{renamed}_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        },
        use_cpu=not gpu,
        ddp_find_unused_parameters=False,  # a memory without images gives gradients of zero, not none
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.keep_checkpoints,
        eval_strategy="no" if eval_data is None else "steps",
        eval_steps=None if eval_data is None else settings.eval_steps or settings.save_steps,
        report_to=list(settings.report_to) or "none",
        dataloader_num_workers=settings.workers,
        remove_unused_columns=False,
        max_length=None,  # the collator cuts, and the check has made sure of what it cuts
        disable_tqdm=True,
        label_names=["labels"],
    )
    collator = copy.copy(collator)
    collator.read = _Reader(data, eval_data)
    trainer = PvmTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=data.dataset,
        eval_dataset=None if eval_data is None else _Reader.marked(eval_data.dataset),
        processing_class=processor,
        peft_config=copy.deepcopy(pvm) if pvm is not None else PvmConfig(),
        callbacks=[Report(), *callbacks],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    keep_vision_whole(trainer.accelerator, trainer.model)
    return trainer


@dataclass(frozen=True)
class _Reader:
    """Reads rows of the training and the evaluation data, each with its own source's images. Goes to workers."""

    data: CheckedData
    eval_data: CheckedData | None

    @staticmethod
    def marked(dataset: Any) -> Any:
        return dataset.add_column("is_eval", [True] * len(dataset))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        data = self.eval_data if row.get("is_eval") and self.eval_data is not None else self.data
        return read_sample(row, data.source)
