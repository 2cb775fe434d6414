"""TRL's SFT trainer for a memory, with the blindfold, texts beside the batches and an account of its cost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from keepsight.data.check import CheckedData, read_sample
from keepsight.data.collate import ConversationCollator
from keepsight.train.pvm.blindfold import BlindfoldSchedule, SightLosses, blindfold
from keepsight.train.pvm.language import Pieces, divergence, has_pieces
from keepsight.train.run.four_bit import trainable_as_it_is
from keepsight.train.run.learner import Learner
from keepsight.train.run.trainer import LearnerTrainer, Setup, common_arguments, finish, report_callback

if TYPE_CHECKING:
    from keepsight.train.pvm.sft import SftJob


PIECE = "keepsight_piece"
"""In a batch: what is read beside it, a sample; a batch is made of it where it is used."""


def make_sft_trainer(job: SftJob, model: Any, learner: Learner) -> Any:
    """A trainer by supervised fine-tuning of what `learner.put_on` has put on a model."""
    from trl import SFTConfig, SFTTrainer

    settings, data, eval_data = job.settings, job.data, job.held_out
    assert settings.blindfold_steps is not None, "train_pvm has settled the schedule"
    schedule = BlindfoldSchedule.of(settings, 0)
    has_base = isinstance(model, PeftModel)  # not where the model is trained as a whole
    pieces = job.pieces if has_base else None
    losses, apart = SightLosses(), Apart()
    whole = ConversationCollator(job.processor)  # a limit on samples is none on texts

    class PvmTrainer(LearnerTrainer, SFTTrainer):
        """TRL's SFT trainer, with what keepsight adds, the blindfold, texts, and an account of its work."""

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, *args, **kwargs)
            if schedule:
                step = self.state.global_step
                losses.add(step, schedule.covers(step), loss - apart.last)
            return loss - apart.last  # what is logged is the answers' alone; the texts' has a name of its own

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if schedule and "loss" in logs:
                logs.update(losses.take(lambda value: self.accelerator.gather(value).mean()))
            if pieces is not None and "loss" in logs:
                logs.update(apart.take(self.accelerator.gather, self.accelerator.device))
            super().log(logs, *args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            piece = inputs.pop(PIECE, None)
            rows, length = inputs["input_ids"].shape
            self.count(rows, length, inputs["attention_mask"].sum(), inputs)
            covered = self.model.training and schedule.covers(self.state.global_step)
            with blindfold(self.accelerator.unwrap_model(model)) if covered else nullcontext():
                loss = super().compute_loss(model, inputs, *args, **kwargs)
            if piece is None or not self.model.training or not has_pieces(self.state.global_step):
                apart.last = 0.0
                return loss
            piece = self._prepare_inputs(whole([piece]))
            # As TRL does with a term of its own: where the loss is a step's already, this one's share of it.
            share = 1 if kwargs.get("num_items_in_batch") is None else self.current_gradient_accumulation_steps
            return loss + apart.add(self._divergence(model, piece), share, self.current_gradient_accumulation_steps)

        def _divergence(self, model: Any, piece: Any) -> torch.Tensor:
            length, mask = piece["input_ids"].shape[1], piece["attention_mask"]
            self.count(1, length, mask.sum(), piece)
            if self.setup.meter is not None:
                self.setup.meter.read(1, length, patches=self.setup.meter.shape.patches(piece))
            return divergence(model, self.accelerator.unwrap_model(model).disable_adapter, piece)

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
            data_collator=_RowCollator(job.collator, data, eval_data, pieces),
            train_dataset=data.dataset if pieces is None else _RowCollator.numbered(data.dataset),
            eval_dataset=None if eval_data is None else _RowCollator.marked(eval_data.dataset),
            processing_class=job.processor,
            callbacks=[report_callback(job.asked.on_log), *job.callbacks],
        )
    return finish(trainer, Setup(settings, learner))


class Apart:
    """The divergences of texts beside the batches, since the last look; `last` is what the last loss holds of one."""

    def __init__(self) -> None:
        self.last: Any = 0.0
        self._found: list[torch.Tensor] = []

    def add(self, found: torch.Tensor, share: int, batches: int) -> torch.Tensor:
        """A batch's part of the loss.

        Args:
            found: divergence, a scalar.
            share: of how many batches the loss is the mean, where it is one already.
            batches: of a step; `last` is as `training_step` tells losses, which is by step.
        """
        self._found.append(found.detach())
        self.last = found.detach() / batches
        return found / share

    def take(self, gather: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """`language_divergence`, their mean over all processes, where there was any; and start anew.

        Args:
            gather: of a tensor over all processes; every process calls this.
            device: of what is gathered.
        """
        own = torch.tensor([float(sum(self._found)), float(len(self._found))], device=device)
        self._found = []
        total, count = gather(own).reshape(-1, 2).sum(0).tolist()
        return {"language_divergence": total / count} if count else {}


@dataclass(frozen=True)
class _RowCollator:
    """Batches of rows of the training and the evaluation data, each with its own source's images. Goes to workers."""

    collator: ConversationCollator
    data: CheckedData
    eval_data: CheckedData | None
    pieces: Pieces | None

    @staticmethod
    def marked(dataset: Any) -> Any:
        return dataset.add_column("is_eval", [True] * len(dataset))

    @staticmethod
    def numbered(dataset: Any) -> Any:
        return dataset.add_column("place", list(range(len(dataset))))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        samples = [self._read(row) for row in rows]
        batch: dict[str, Any] = self.collator(samples)
        if self.pieces is None or rows[0].get("is_eval"):
            return batch
        return {**batch, PIECE: self.pieces.beside(samples, [row["place"] for row in rows])}

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        data = self.eval_data if row.get("is_eval") and self.eval_data is not None else self.data
        return read_sample(row, data.source)
