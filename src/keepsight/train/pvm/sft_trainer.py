"""TRL's SFT trainer for a memory, with the blindfold and an account of its cost."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepsight.data.check import CheckedData, read_sample
from keepsight.data.collate import ConversationCollator
from keepsight.train.pvm.blindfold import BlindfoldSchedule, SightLosses, blindfold
from keepsight.train.run.four_bit import trainable_as_it_is
from keepsight.train.run.learner import Learner
from keepsight.train.run.settings import SftSettings
from keepsight.train.run.trainer import LearnerTrainer, OnLog, Setup, common_arguments, finish, report_callback


def make_sft_trainer(
    model: Any,
    processor: Any,
    learner: Learner,
    settings: SftSettings,
    folder: Path,
    data: CheckedData,
    eval_data: CheckedData | None,
    collator: ConversationCollator,
    on_log: OnLog | None = None,
    callbacks: list[Any] | None = None,
) -> Any:
    """A trainer by supervised fine-tuning, which checkpoints into `folder`.

    Args:
        model: what `learner.put_on` returned.
        processor: saved beside every checkpoint.
        learner: what is trained.
        settings: how to train.
        folder: gets the checkpoints.
        data: checked training data.
        eval_data: checked data for the evaluation loss, or None.
        collator: makes batches of samples.
        on_log: called as `on_log(values, step, total steps)`.
        callbacks: further transformers callbacks.
    """
    from trl import SFTConfig, SFTTrainer

    assert settings.blindfold_steps is not None, "train_pvm has settled the schedule"
    schedule = BlindfoldSchedule.of(settings, 0)
    losses = SightLosses()

    class PvmTrainer(LearnerTrainer, SFTTrainer):
        """TRL's SFT trainer, with what keepsight adds, the blindfold, and an account of its work."""

        def cover(self, model: Any) -> Any:
            covered = schedule.covers(self.state.global_step)
            return blindfold(self.accelerator.unwrap_model(model)) if covered else nullcontext()

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, *args, **kwargs)
            if schedule:
                step = self.state.global_step
                losses.add(step, schedule.covers(step), loss)
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if schedule and "loss" in logs:
                logs.update(losses.take(lambda value: self.accelerator.gather(value).mean()))
            super().log(logs, *args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            meter = self.setup.meter
            if meter is not None:
                rows, length = inputs["input_ids"].shape
                patches = meter.shape.patches(inputs)
                if self.model.training:
                    tokens = int(inputs["attention_mask"].sum())
                    checkpointing = settings.checkpoints_gradients
                    meter.trained(rows, length, tokens=tokens, patches=patches, checkpointing=checkpointing)
                else:
                    meter.read(rows, length, patches=patches)
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = SFTConfig(
        **common_arguments(settings, folder, SFTConfig, eval_data is not None and learner.learns),
        per_device_eval_batch_size=settings.batch_size,
        max_length=None,  # the collator cuts, and the check has made sure of what it cuts
        label_names=["labels"],
    )
    with trainable_as_it_is(model):
        trainer = PvmTrainer(
            model=model,
            args=args,
            data_collator=_RowCollator(collator, data, eval_data),
            train_dataset=data.dataset,
            eval_dataset=None if eval_data is None else _RowCollator.marked(eval_data.dataset),
            processing_class=processor,
            callbacks=[report_callback(on_log), *(callbacks or [])],
        )
    return finish(trainer, Setup(settings, learner))


@dataclass(frozen=True)
class _RowCollator:
    """Batches of rows of the training and the evaluation data, each with its own source's images. Goes to workers."""

    collator: ConversationCollator
    data: CheckedData
    eval_data: CheckedData | None

    @staticmethod
    def marked(dataset: Any) -> Any:
        return dataset.add_column("is_eval", [True] * len(dataset))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.collator([self._read(row) for row in rows])

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        data = self.eval_data if row.get("is_eval") and self.eval_data is not None else self.data
        return read_sample(row, data.source)
