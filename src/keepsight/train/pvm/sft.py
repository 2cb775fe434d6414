"""Teach a persistent visual memory on a frozen vision-language model: supervised fine-tuning through TRL.

The defaults are the paper's first stage (arXiv 2605.00814, section 5): only the memory learns, AdamW at 1e-4, cosine
with a tenth of warm-up, one epoch, cross-entropy on the answers. Two additions are keepsight's own and not in the
paper: the gates get a larger learning rate (they start at 0, and until they move nothing else learns), and the
blindfold warm-up (see `keepsight.train.pvm.blindfold`), wherever the base can be blindfolded. Without it the memory's
look-up did not form in our laboratory (docs/evidence). `SftSettings.paper()` is the paper's recipe.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from keepsight.checkpoints.adapters import find_adapter
from keepsight.checkpoints.bases import check_weights
from keepsight.data.check import CheckedData
from keepsight.data.collate import ConversationCollator
from keepsight.data.mixture import for_evaluation
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.pvm import PvmConfig
from keepsight.train.pvm.blindfold import BlindfoldError, BlindfoldSchedule, why_not_blindfold
from keepsight.train.pvm.sft_trainer import make_sft_trainer
from keepsight.train.run import output, preflight
from keepsight.train.run.controls import WHAT, Comparison, Control, Outcome, control_folder, control_learner, hold_out
from keepsight.train.run.engines import Engine, check_engine, current_engine
from keepsight.train.run.four_bit import check_four_bit
from keepsight.train.run.learner import Learner, lora_size
from keepsight.train.run.plan import MemoryPlan, plan_memory
from keepsight.train.run.report import TrainReport, base_lines, memory_lines, mix_lines, result_card
from keepsight.train.run.run import Run, execute, load_learner
from keepsight.train.run.settings import SftSettings
from keepsight.train.run.trainer import OnLog, TrainingDivergedError

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
    settings, folder, engine = settings or SftSettings(), Path(output_dir), current_engine()
    if find_adapter(source) is not None:
        raise KeepsightError(
            f"{source} is an adapter. Training puts a new memory on a plain VLM: name the base model. To go on with an "
            "unfinished run: --resume. To refine a trained memory by reinforcement: keepsight train pvm-grpo."
        )
    if engine.is_main:
        output.check_output(folder, resume, overwrite)
    plan = plan_memory(source, pvm)
    check_weights(source)
    preflight.check_settings(settings)
    preflight.check_kernel(settings, source)
    check_four_bit(source, settings.load_in_4bit, engine, controls=tuple(control.name for control in controls))
    chosen = _without_blindfold(settings, plan, say)
    memory = Learner(memory=PvmConfig() if pvm is None else pvm)
    learners = [(control, control_learner(control, memory, plan)) for control in controls]  # raises what cannot be
    checkpoint = preflight.find_checkpoint(folder, say) if resume and not overwrite else None
    processor = preflight.load_processor(source)
    collator = ConversationCollator(processor, max_length=settings.max_length)

    def checked(data: Any, which: str, progress: Callable[[int, int], None] | None) -> CheckedData:
        return preflight.check_chats(
            data,
            which,
            collator,
            text_only=settings.text_only,
            max_length=settings.max_length,
            over_long=settings.over_long,
            decode=check == "full",
            on_check=progress,
        )

    data, held_out = checked(dataset, split, on_check), None
    if eval_dataset is not None:
        held_out = checked(for_evaluation(eval_dataset), eval_split or split, None)
    elif controls:
        data, held_out = hold_out(data)
        say(_about_evaluation(data, held_out))
    check_engine(
        engine,
        "pvm",
        on_gpu=settings.on_gpu,
        text_only=data.text_only + (held_out.text_only if held_out else 0),
        reentrant_works=plan.pvm.detach_visual,
        checkpointing=settings.checkpoints_gradients,
    )
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
    settled = replace(chosen, blindfold_steps=schedule.steps, blindfold_share=schedule.share)
    for line in _choices(settled, plan.pvm, steps):
        say(line)
    job = _Job(str(source), plan, data, held_out, processor, collator, engine, on_log, callbacks or [], say)
    report = job.train("pvm", memory, folder, settled, checkpoint, resume, overwrite)
    if not controls:
        return report

    outcomes = [Outcome.of("pvm", "the memory", report, settings.lr)]
    for control, learner in learners:
        changed = replace(settled, lr=control.rate(settings.lr), blindfold_steps=0, blindfold_share=0.0)
        where = control_folder(folder, control)
        last = output.last_checkpoint(where)[0] if resume and learner.learns else None
        say(f"control {control.name} in {where}")
        beside = job.train(f"control {control.name}", learner, where, changed, last, resume, False)
        outcomes.append(Outcome.of(control.name, WHAT[control.name], beside, changed.lr))
    comparison = Comparison(tuple(outcomes), _note(settled, eval_dataset, held_out))
    if engine.is_main:
        comparison.write(folder)
    return replace(report, comparison=comparison)


@dataclass(frozen=True)
class _Job:
    """What the memory and its controls have in common."""

    base: str
    plan: MemoryPlan
    data: CheckedData
    held_out: CheckedData | None
    processor: Any
    collator: ConversationCollator
    engine: Engine
    on_log: OnLog | None
    callbacks: list[Any]
    say: preflight.Say

    def train(
        self,
        name: str,
        learner: Learner,
        folder: Path,
        settings: SftSettings,
        checkpoint: Path | None,
        resume: bool,
        overwrite: bool,
    ) -> TrainReport:
        record = self._record(learner, settings)
        if checkpoint is not None:
            output.check_record(folder, record)
        if self.engine.is_main and learner.learns:
            self._check_space(learner, folder, settings, checkpoint)

        def build(loaded: tuple[Any, Learner]) -> Any:
            model, now = loaded
            return make_sft_trainer(
                model,
                self.processor,
                now,
                settings,
                folder,
                self.data,
                self.held_out,
                self.collator,
                self.on_log,
                self.callbacks,
            )

        def card(trainer: Any) -> str:
            return self._card(trainer, name, settings)

        run = Run(
            name=name,
            folder=folder,
            data=self.data,
            processor=self.processor,
            record=record,
            engine=self.engine,
            load=partial(load_learner, self.base, learner, settings, self.plan, self.engine),
            build=build,
            card=card,
            learns=learner.learns,
            evaluates=self.held_out is not None,
            resume=resume,
            overwrite=overwrite,
        )
        return execute(run, checkpoint, self.say)

    def _record(self, learner: Learner, settings: SftSettings) -> dict[str, Any]:
        return {
            "base": self.base,
            "samples": self.data.rows,
            **self.data.agreed(),
            **learner_record(learner, self.plan),
            **record_of(settings),
        }

    def _check_space(self, learner: Learner, folder: Path, settings: SftSettings, checkpoint: Path | None) -> None:
        steps = preflight.total_steps(settings, _steps_per_epoch(self.data, settings, self.engine))
        there = len(list(folder.glob("checkpoint-*"))) if checkpoint is not None else 0
        trained, saved = sizes(learner, self.plan)
        preflight.check_space(folder, trained, saved, steps, settings, there)

    def _card(self, trainer: Any, name: str, settings: SftSettings) -> str:
        state = trainer.state
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        loss = f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last" if losses else "not logged"
        memory = memory_lines(trainer)
        rates = f"{settings.lr:g}{f', gates {settings.lr * settings.gate_lr_multiplier:g}' if memory else ''}"
        rows = [
            *memory,
            ("training", f"{state.global_step} steps on {self.data.rows:,} samples"),
            *mix_lines(self.data),
            ("peak learning rate", f"{rates}; seed {settings.seed}"),
            ("training loss", loss),
            ("blindfolded steps", str(BlindfoldSchedule.of(settings, state.global_step))),
            *base_lines(settings),
        ]
        title = "A persistent visual memory (PVM)" if name == "pvm" else f"The {name} of a visual memory"
        return result_card(self.base, f"{title} for {self.base}", rows, trainer)


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
    return [f"{steps:,} steps; blindfolded: {BlindfoldSchedule.of(settings, steps)}; {ours}", about_rule(pvm)]


def about_rule(pvm: PvmConfig) -> str:
    """What a memory's rule means for serving it."""
    if pvm.causal:
        return "causal rule: text reads the images before it. vLLM can serve this memory (keepsight export vllm)"
    return "published rule: text before an image reads it, too. vLLM cannot serve this memory; keepsight serve can"


def _steps_per_epoch(data: CheckedData, settings: SftSettings, engine: Engine) -> int:
    return math.ceil(data.rows / (settings.batch_size * settings.grad_accum * engine.processes))


def record_of(settings: Any) -> dict[str, Any]:
    """The settings that a resumed run must agree on."""
    free = {"logging_steps", "save_steps", "eval_steps", "keep_checkpoints", "workers", "report_to", "device"}
    return {name: value for name, value in asdict(settings).items() if name not in free}


def learner_record(learner: Learner, plan: MemoryPlan) -> dict[str, Any]:
    """The fields of what is trained that a resumed run must agree on."""
    kept = ("layers", "width", "ffn_width", "causal", "branch", "init_gate", "detach_visual")
    memory = {f.name: getattr(plan.pvm, f.name) for f in fields(PvmConfig) if f.name in kept}
    if learner.memory is None:
        memory = {}
    elif learner.memory.branch != plan.pvm.branch:
        memory["branch"] = learner.memory.branch
    found: dict[str, Any] = memory if learner.policy == "none" else {**memory, "policy": learner.policy}
    if learner.lora is not None and learner.policy == "lora":
        found["rank"] = learner.lora.r
    return found


def sizes(learner: Learner, plan: MemoryPlan) -> tuple[int, int]:
    """(trained parameters, parameters that every checkpoint holds), before anything is loaded."""
    backbone, memory = plan.backbone, plan.memory_parameters if learner.memory is not None else 0
    if learner.policy == "full":
        parts = [*backbone.decoder.parameters(), *backbone.model.get_output_embeddings().parameters()]
        language = sum({id(p): p.numel() for p in parts}.values())
        return memory + language, memory + plan.base_parameters
    if learner.policy == "lora" and learner.lora is not None:
        extra = lora_size(backbone, learner.lora)
        return memory + extra, memory + extra
    return memory, memory


def _about_evaluation(data: CheckedData, held_out: CheckedData | None) -> str:
    if held_out is None:
        return "there are too few samples to hold any out: the comparison is on the training loss alone"
    return f"{held_out.rows:,} samples are held out for the comparison with the controls; {data.rows:,} train"


def _note(settings: SftSettings, given: Any, held_out: CheckedData | None) -> str:
    where = "the evaluation data" if given is not None else "samples held out of the training data"
    judged = f"Evaluated after the last step on {where}." if held_out is not None else "Training loss only."
    blind = " The memory was blindfolded, its controls cannot be." if settings.asks_for_blindfold else ""
    return f"{judged} Same data, order of data, steps and seed ({settings.seed}) for all.{blind}"
