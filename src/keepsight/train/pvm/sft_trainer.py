"""TRL's SFT trainer for a memory, with the blindfold and an account of its cost."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from keepsight.data.check import CheckedData, read_sample
from keepsight.data.collate import ConversationCollator
from keepsight.train.pvm.blindfold import BlindfoldSchedule, SightLosses, blindfold
from keepsight.train.run.four_bit import trainable_as_it_is
from keepsight.train.run.learner import Learner
from keepsight.train.run.trainer import LearnerTrainer, Setup, common_arguments, finish, report_callback

if TYPE_CHECKING:
    from keepsight.train.pvm.sft import SftJob


def make_sft_trainer(job: SftJob, model: Any, learner: Learner) -> Any:
    """A trainer by supervised fine-tuning of what `learner.put_on` has put on a model."""
    from trl import SFTConfig, SFTTrainer

    settings, data, eval_data = job.settings, job.data, job.held_out
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
            rows, length = inputs["input_ids"].shape
            self.count(rows, length, inputs["attention_mask"].sum(), inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = SFTConfig(
        **common_arguments(settings, job.asked.folder, SFTConfig, eval_data is not None and learner.learns),
        per_device_eval_batch_size=settings.batch_size,
        max_length=None,  # the collator cuts, and the check has made sure of what it cuts
        label_names=["labels"],
    )
    with trainable_as_it_is(model):
        trainer = PvmTrainer(
            model=model,
            args=args,
            data_collator=_RowCollator(job.collator, data, eval_data),
            train_dataset=data.dataset,
            eval_dataset=None if eval_data is None else _RowCollator.marked(eval_data.dataset),
            processing_class=job.processor,
            callbacks=[report_callback(job.asked.on_log), *job.callbacks],
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
