"""Teach a persistent visual memory on a frozen vision-language model: supervised fine-tuning through TRL.

The defaults are the paper's first stage (arXiv 2605.00814, section 5): only the memory learns, AdamW at 1e-4, cosine
with a tenth of warm-up, one epoch, cross-entropy on the answers. Two additions are keepsight's own and not in the
paper: the gates get a larger learning rate (they start at 0, and until they move nothing else learns), and the
blindfold warm-up (see `keepsight.train.pvm.blindfold`), wherever the base can be blindfolded. Without it the memory's
look-up did not form in our laboratory (docs/evidence). `SftSettings.paper()` is the paper's recipe.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from keepsight.checkpoints.adapters import find_adapter
from keepsight.checkpoints.bases import check_weights
from keepsight.checkpoints.load import load_processor
from keepsight.data.check import CheckedData
from keepsight.data.collate import ConversationCollator
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.pvm import PvmConfig
from keepsight.train.pvm.blindfold import BlindfoldError, BlindfoldSchedule, why_not_blindfold
from keepsight.train.pvm.job import PvmJob, about_rule, check_pvm_engine
from keepsight.train.pvm.language import SHORT, Pieces, answered_tokens, has_pieces
from keepsight.train.pvm.sft_trainer import make_sft_trainer
from keepsight.train.run import preflight
from keepsight.train.run.arguments import RunArguments
from keepsight.train.run.controls import Control, control_learner
from keepsight.train.run.engines import Engine
from keepsight.train.run.learner import Learner
from keepsight.train.run.plan import MemoryPlan, plan_memory
from keepsight.train.run.report import TrainReport, memory_lines, mix_lines
from keepsight.train.run.settings import SftSettings
from keepsight.train.run.trainer import OnLog, TrainingDivergedError
from keepsight.words import counted

__all__ = ["SftSettings", "TrainReport", "TrainingDivergedError", "train_pvm"]


def train_pvm(
    source: str | Path,
    dataset: Any,
    output_dir: str | Path,
    *,
    pvm: PvmConfig | None = None,
    eval_dataset: Any = None,
    eval_split: str | None = None,
    settings: SftSettings | None = None,
    split: str = "train",
    resume: bool = False,
    overwrite: bool = False,
    check: Literal["full", "quick"] = "full",
    controls: Sequence[Control] = (),
    say: preflight.Say = preflight.silent,
    on_log: OnLog | None = None,
    on_check: Callable[[int, int], None] | None = None,
    callbacks: list[Any] | None = None,
) -> TrainReport:
    """Train a visual memory on a frozen VLM and save it with its processor.

    Everything that can be wrong with data, settings and output folder is found before the weights are loaded.

    Args:
        source: the base VLM: a folder, a hub id, or "keepsight/reference". Recorded in the adapter as given.
        dataset: whatever `keepsight.data.check.load_dataset_any` reads; or a list of such, each alone or as (dataset,
            weight), to be mixed in the shares of their weights.
        output_dir: gets checkpoints, and at the end the adapter and the processor, so that
            `keepsight.load(output_dir)` works.
        pvm: the memory; default: `PvmConfig()`.
        eval_dataset: data for the evaluation loss. With controls and without it, a tenth of the data is held out.
        settings: how to train.
        split: of hub datasets and saved DatasetDicts.
        eval_split: the same for `eval_dataset`; default: as `split`.
        resume: go on from the last whole checkpoint in `output_dir`, if there is one.
        overwrite: move what is in `output_dir` aside (nothing is deleted) and start anew.
        check: "full" decodes every image before training; "quick" only looks whether the files are there.
        controls: what to train after the memory, for comparison (see `keepsight.train.run.controls`).
        say: receives lines for the user.
        on_log: called as `on_log(values, step, total steps)` at every logging step.
        on_check: called as `on_check(done, total)` while samples are checked.
        callbacks: further `transformers.TrainerCallback`s.

    Raises:
        KeepsightError, FileNotFoundError: before training, for anything that would spoil it.
        TrainingDivergedError: if the loss becomes NaN or infinite; earlier checkpoints stay.
        ImportError: if the `train` extra is not installed.
    """
    preflight.require_trl()
    settings, folder = settings or SftSettings(), Path(output_dir)
    asked = RunArguments(
        dataset=dataset,
        folder=folder,
        eval_dataset=eval_dataset,
        eval_split=eval_split,
        split=split,
        check=check,
        resume=resume,
        overwrite=overwrite,
        controls=controls,
        say=say,
        on_log=on_log,
        on_check=on_check,
    )
    if find_adapter(source) is not None:
        raise KeepsightError(
            f"{source} is an adapter. Training puts a new memory on a plain VLM: name the base model. To go on with an "
            "unfinished run: --resume. To refine a trained memory by reinforcement: keepsight train pvm-grpo."
        )
    asked.begin(settings)
    engine, plan = asked.engine, plan_memory(source, pvm)
    check_weights(source)
    asked.check_base(source, settings)
    chosen = _without_blindfold(settings, plan, say)
    memory = Learner(memory=PvmConfig() if pvm is None else pvm)
    learners = [(control, control_learner(control, memory, plan)) for control in controls]  # raises what cannot be
    checkpoint, processor = asked.checkpoint(), load_processor(source)
    collator = ConversationCollator(processor, max_length=settings.max_length)
    pieces = None
    if settings.keep_language is not None:
        pieces = Pieces.read(settings.keep_language, collator, settings.seed)
        say(f"{counted(len(pieces.texts), 'piece')} of text to keep the language by, from {settings.keep_language}")
    data, held_out = asked.read(
        collator,
        kind="chat",
        text_only=settings.text_only,
        max_length=settings.max_length,
        over_long=settings.over_long,
    )
    check_pvm_engine(engine, settings, plan, data, held_out)
    preflight.say_data(data, "samples", str(source), settings.max_length, say)
    data = data.mixed()
    steps = preflight.total_steps(settings, _steps_per_epoch(data, settings, engine))
    schedule = BlindfoldSchedule.of(chosen, steps)
    if 0 < steps <= schedule.steps:
        warnings.warn(
            f"blindfold_steps={schedule.steps} covers all {steps} steps: the memory never learns beside what "
            "the base sees itself. It is meant for a beginning.",
            KeepsightWarning,
            stacklevel=2,
        )
    if pieces is not None and not any(has_pieces(step) for step in range(steps)):
        warnings.warn(
            f"keep_language: a run of {counted(steps, 'step')} has no step with a text; the third is the first.",
            KeepsightWarning,
            stacklevel=2,
        )
    settled = replace(chosen, blindfold_steps=schedule.steps, blindfold_share=schedule.share)
    for line in [*_choices(settled, plan.pvm, steps), *_about_language(settled, data, processor.tokenizer)]:
        say(line)
    job = SftJob(
        name=SftJob.stage,
        base=str(source),
        asked=asked,
        learner=memory,
        plan=plan,
        settings=settled,
        data=data,
        held_out=held_out,
        processor=processor,
        collator=collator,
        pieces=pieces,
        checkpoint=checkpoint,
        callbacks=callbacks or [],
    )
    return job.with_controls("the memory", learners, _note(settled, eval_dataset, held_out))


@dataclass(frozen=True, kw_only=True)
class SftJob(PvmJob[SftSettings]):
    """Supervised training of a memory, or of a control."""

    stage = "pvm"

    collator: ConversationCollator
    pieces: Pieces | None

    def trainer(self, loaded: tuple[Any, Learner]) -> Any:
        return make_sft_trainer(self, *loaded)

    def samples(self) -> dict[str, Any]:
        texts = None if self.pieces is None else self.pieces.digest
        return {"base": self.base, "samples": self.data.rows, **self.data.agreed(), "digest of the texts": texts}

    def steps_per_epoch(self) -> int:
        return _steps_per_epoch(self.data, self.settings, self.engine)

    def control_settings(self, control: Control) -> SftSettings:
        return replace(self.settings, lr=control.rate(self.settings.lr), blindfold_steps=0, blindfold_share=0.0)

    def told(self, trainer: Any) -> list[tuple[str, str]]:
        settings, state = self.settings, trainer.state
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        loss = f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last" if losses else "not logged"
        memory = memory_lines(trainer)
        rates = f"{settings.lr:g}{f', gates {settings.lr * settings.gate_lr_multiplier:g}' if memory else ''}"
        return [
            *memory,
            ("training", f"{counted(state.global_step, 'step')} on {counted(self.data.rows, 'sample')}"),
            *mix_lines(self.data),
            ("peak learning rate", f"{rates}; seed {settings.seed}"),
            ("training loss", loss),
            ("blindfolded steps", str(BlindfoldSchedule.of(settings, state.global_step))),
            *self._about_texts(state.log_history),
        ]

    def _about_texts(self, history: list[dict[str, Any]]) -> list[tuple[str, str]]:
        name = "language_divergence"
        apart = [entry[name] for entry in history if name in entry]
        if self.pieces is None or not apart:
            return []
        pieces = counted(len(self.pieces.texts), "piece")
        return [("texts beside", f"{pieces}; {apart[-1]:.4f} nats a token from the base at last")]


def _without_blindfold(settings: SftSettings, plan: MemoryPlan, say: preflight.Say) -> SftSettings:
    """The settings, with the blindfold off where it is only the default and cannot be.

    Raises:
        BlindfoldError: if it was asked for.
    """
    why = why_not_blindfold(plan.backbone, plan.pvm, settings.attention)
    if why is None:
        return settings
    if settings.asks_for_blindfold:
        raise BlindfoldError(why)
    if settings.blindfold_steps is None:
        say(f"no blindfold warm-up, without which the look-up did not form in our laboratory: {why}")
    return replace(settings, blindfold_steps=0, blindfold_share=0.0)


def _choices(settings: SftSettings, pvm: PvmConfig, steps: int) -> list[str]:
    """What is told before the first step: what is ours, and what a choice means later."""
    rate = f"the gates learn {settings.gate_lr_multiplier:g} times as fast as the rest"
    ours = f"{rate}{' (not in the paper)' * (settings.gate_lr_multiplier != 1)}"
    return [f"{counted(steps, 'step')}; blindfolded: {BlindfoldSchedule.of(settings, steps)}; {ours}", about_rule(pvm)]


def _about_language(settings: SftSettings, data: CheckedData, tokenizer: Any) -> list[str]:
    """A word on answers too short to teach a memory anything about texts, where nothing else does."""
    looked = range(0, data.rows, max(1, data.rows // 200))
    tokens = [count for place in looked for count in answered_tokens(data.dataset[place]["messages"], tokenizer)]
    if settings.keep_language is not None or not tokens or statistics.median(tokens) > SHORT:
        return []
    return [
        f"half of the answers have at most {statistics.median(tokens):g} tokens: such data do not teach a memory to be "
        "still in a longer text, and it can cost the language behind an image; --keep-language FILE, with some texts, "
        "holds it (docs/train.md)"
    ]


def _steps_per_epoch(data: CheckedData, settings: SftSettings, engine: Engine) -> int:
    return math.ceil(data.rows / (settings.batch_size * settings.grad_accum * engine.processes))


def _note(settings: SftSettings, given: Any, held_out: CheckedData | None) -> str:
    where = "the evaluation data" if given is not None else "samples held out of the training data"
    judged = f"Evaluated after the last step on {where}." if held_out is not None else "Training loss only."
    blind = " The memory was blindfolded, its controls cannot be." if settings.asks_for_blindfold else ""
    sft = " What is expected of texts was held to the base's, but for sft, which has no base beside it."
    return f"{judged}{blind}{sft if settings.keep_language is not None else ''}"
