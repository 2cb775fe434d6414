"""Refine a persistent visual memory together with its language model, by GRPO through TRL.

The defaults are the paper's second stage (arXiv 2605.00814, section 5): the language model and the memory learn,
vision encoder and projector stay frozen, AdamW at a constant 1e-6, 64 completions per step, 8 of a prompt, temperature
1, no KL term, completions that were cut off teach nothing, 0.1 for the form and 0.9 for the right answer. What the
paper leaves open stands in `GrpoSettings` and in docs/train.md: loss, clipping, scaling of advantages. Where a whole
language model is too much, a LoRA on it (`policy="lora"`) or the memory alone (`policy="none"`) can learn instead:
these two are keepsight's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from keepsight.checkpoints.adapters import CONFIG, AdapterInfo
from keepsight.checkpoints.sources import check_sources
from keepsight.data.check import CheckedData
from keepsight.data.collate import ConversationCollator
from keepsight.data.mixture import for_evaluation
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.peft_method import config_from_adapter
from keepsight.pvm import PvmConfig
from keepsight.train.pvm.grpo_trainer import make_grpo_trainer
from keepsight.train.pvm.sft import about_rule, learner_record, record_of, sizes
from keepsight.train.rewards.rewards import BUILT_IN, Reward, load_rewards
from keepsight.train.run import output, preflight
from keepsight.train.run.controls import WHAT, Comparison, Control, Outcome, control_folder, control_learner, hold_out
from keepsight.train.run.engines import Engine, check_engine, current_engine
from keepsight.train.run.four_bit import check_four_bit
from keepsight.train.run.learner import Learner, PolicyChoice, ranked_lora
from keepsight.train.run.plan import MemoryPlan, plan_memory
from keepsight.train.run.report import TrainReport, base_lines, memory_lines, mix_lines, result_card
from keepsight.train.run.run import Run, execute, load_learner
from keepsight.train.run.settings import GrpoSettings
from keepsight.train.run.trainer import OnLog

__all__ = ["GrpoSettings", "TrainReport", "train_pvm_grpo"]

_NEEDS_ANSWER = ("answer", "match")


def train_pvm_grpo(
    source: str | Path,
    dataset: Any,
    output_dir: str | Path,
    *,
    policy: PolicyChoice = "full",
    lora_rank: int = 16,
    pvm: PvmConfig | None = None,
    eval_dataset: Any = None,
    eval_split: str | None = None,
    settings: GrpoSettings | None = None,
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
    """Train a visual memory and its policy by reinforcement, and save them so that `keepsight.load` reads them.

    `output_dir` holds the memory; `output_dir/policy` the LoRA, or the whole language model with its vision encoder.
    `keepsight.load(output_dir)` finds both.

    Args:
        source: a trained memory (an adapter's folder or hub id), the paper's way; or a plain VLM, which gets a new one.
        dataset: prompts: "prompt", "answer" and "image", or "messages" and "images"; other columns go to the rewards.
            Or a list of such data, each alone or as (dataset, weight), to be mixed in the shares of their weights.
        output_dir: gets checkpoints and the result.
        policy: what of the language model learns beside the memory.
        lora_rank: of policy="lora", on all linear maps of the decoder.
        pvm: the memory of a plain VLM; default: `PvmConfig()`.
        eval_dataset: prompts for the evaluation. With controls and without it, a tenth of the data is held out.
        settings: how to train.
        split: of hub datasets and saved DatasetDicts.
        eval_split: the same for `eval_dataset`; default: as `split`.
        resume: go on from the last whole checkpoint in `output_dir`, if there is one.
        overwrite: move what is in `output_dir` aside (nothing is deleted) and start anew.
        check: "full" decodes every image before training; "quick" only looks whether the files are there.
        controls: what to train after the memory, for comparison. They start where the memory started: from the same
            base; or, where the memory's folder holds its own control of that name, from that.
        say: receives lines for the user.
        on_log: called as `on_log(values, step, total steps)` at every logging step.
        on_check: called as `on_check(done, total)` while samples are checked.
        callbacks: further `transformers.TrainerCallback`s.

    Raises:
        KeepsightError, FileNotFoundError: before training, for anything that would spoil it.
        RewardError: naming a reward that cannot be loaded, or does not return a finite number for each completion.
        TrainingDivergedError: if the loss becomes NaN or infinite; earlier checkpoints stay.
        ImportError: if the `train` extra is not installed.
    """
    preflight.require_trl()
    settings, folder, engine = settings or GrpoSettings(), Path(output_dir), current_engine()
    rewards = load_rewards(settings.rewards)
    if engine.is_main:
        output.check_output(folder, resume, overwrite)
    base, adapters = check_sources(source)
    learner, plan = _what_learns(str(source), base, adapters, pvm, policy, lora_rank, settings)
    preflight.check_settings(settings)
    preflight.check_kernel(settings, base)
    check_four_bit(base, settings.load_in_4bit, engine, policy, tuple(control.name for control in controls))
    _check_kl(learner, settings)
    _check_groups(settings, engine)
    learners = [(control, _control(control, learner, plan, adapters)) for control in controls]
    checkpoint = preflight.find_checkpoint(folder, say) if resume and not overwrite else None
    processor = preflight.load_processor(base)
    collator = ConversationCollator(processor)
    need_answer = any(reward.function is BUILT_IN[name][0] for reward in rewards for name in _NEEDS_ANSWER)

    def checked(prompts: Any, which: str, progress: Callable[[int, int], None] | None) -> CheckedData:
        return preflight.check_prompts(
            prompts,
            which,
            collator,
            text_only=settings.text_only,
            max_length=settings.max_length,
            over_long=settings.over_long,
            decode=check == "full",
            need_answer=need_answer,
            on_check=progress,
        )

    data, held_out = checked(dataset, split, on_check), None
    if eval_dataset is not None:
        held_out = checked(for_evaluation(eval_dataset), eval_split or split, None)
    elif controls:
        data, held_out = hold_out(data)
        kept = "no prompts can be held out" if held_out is None else f"{held_out.rows:,} prompts are held out"
        say(f"{kept} for the comparison with the controls; {data.rows:,} train")
    needed = settings.rollouts * engine.processes // settings.group_size
    if data.rows < needed:
        raise KeepsightError(
            f"{data.rows} prompts are fewer than the {needed} that are answered at a time ({settings.rollouts} "
            f"completions on each of {engine.processes} devices, {settings.group_size} per prompt). Lower "
            "--batch-size, --grad-accum or --rows-per-rollout."
        )
    check_engine(
        engine,
        "pvm",
        on_gpu=settings.on_gpu,
        text_only=data.text_only + (held_out.text_only if held_out else 0),
        reentrant_works=plan.pvm.detach_visual,
        checkpointing=settings.checkpoints_gradients,
    )
    preflight.say_data(data, "prompts", base, settings.max_length, say)
    data = data.mixed()
    scaled = {"group": "within their group", "batch": "over the batch", "none": "not at all"}[settings.scale_rewards]
    say(f"GRPO: loss {settings.loss_type}, clip {settings.clip:g}, KL {settings.kl:g}, advantages scaled {scaled}")
    say(about_rule(plan.pvm))
    job = _Job(str(source), base, plan, data, held_out, processor, rewards, engine, on_log, callbacks or [], say)
    report = job.train("pvm-grpo", learner, folder, settings, checkpoint, resume, overwrite)
    if not controls:
        return report

    beside = {"full": " and the language model", "lora": " and a LoRA", "none": ""}[policy]
    outcomes = [Outcome.of("pvm-grpo", f"the memory{beside}", report, settings.lr)]
    for control, other in learners:
        changed = replace(settings, lr=control.rate(settings.lr, whole_model_too=True))
        where = control_folder(folder, control)
        last = output.last_checkpoint(where)[0] if resume and other.learns else None
        started = replace(job, base=_start(control, base, adapters))
        say(f"control {control.name} in {where}, from {started.base}")
        result = started.train(f"control {control.name}", other, where, changed, last, resume, False)
        more = beside if control.name == "mlp" else ""
        outcomes.append(Outcome.of(control.name, WHAT[control.name] + more, result, changed.lr))
    judged = "the evaluation data" if eval_dataset is not None else "prompts held out of the training data"
    comparison = Comparison(
        tuple(outcomes),
        f"Rewards are means over {settings.group_size} completions of every prompt, on "
        f"{judged if held_out is not None else 'the training data alone'}. Same data, order of data, steps and seed "
        f"({settings.seed}) for all.",
    )
    if engine.is_main:
        comparison.write(folder)
    return replace(report, comparison=comparison)


def _what_learns(
    source: str,
    base: str,
    adapters: list[AdapterInfo],
    pvm: PvmConfig | None,
    policy: PolicyChoice,
    rank: int,
    settings: GrpoSettings,
) -> tuple[Learner, MemoryPlan]:
    memories = [info for info in adapters if info.method == "PVM"]
    others = [info for info in adapters if info.method not in ("PVM", "LORA")]
    if others or (adapters and not memories):
        raise KeepsightError(
            f"{source} is a {(others or adapters)[0].method} adapter. This stage refines a PVM, or puts a new one on a "
            "plain VLM: name a folder that keepsight train pvm wrote, or a base model."
        )
    before = [info for info in adapters if info.method == "LORA"]
    if before and policy != "lora":
        raise KeepsightError(f"{source} was trained with a LoRA on its language model; go on with --policy lora.")
    if memories and pvm is not None:
        raise KeepsightError(f"{source} has a memory already, so the settings of a new one have no effect. Leave them.")
    if memories:
        pvm = config_from_adapter(PvmConfig, memories[0].config)
    plan = plan_memory(base, pvm)
    if not memories and settings.lr * settings.gate_lr_multiplier < 1e-4:
        warnings.warn(
            f"{source} has no memory yet. A new one's gates start at 0 and learn at "
            f"{settings.lr * settings.gate_lr_multiplier:g}, so it will hardly be used. Train it first (keepsight "
            "train pvm), as the paper does, or raise --gate-lr-multiplier.",
            KeepsightWarning,
            stacklevel=3,
        )
    lora = ranked_lora(plan.backbone, rank)[0] if policy == "lora" and not before else None
    return (
        Learner(
            memory=plan.pvm if memories else pvm or PvmConfig(),
            memory_from=memories[0].path if memories else None,
            policy=policy,
            lora=lora,
            policy_from=before[0].path if before else None,
        ),
        plan,
    )


def _check_kl(learner: Learner, settings: GrpoSettings) -> None:
    if settings.kl and learner.policy != "none":
        raise KeepsightError(
            f"--kl {settings.kl:g} with --policy {learner.policy}: the reference is the policy as it was at the start, "
            "which TRL finds by switching the memory's adapter, and the language model that learns beside it would be "
            "its trained self there. Leave --kl at 0, as the paper does, or train the memory alone (--policy none)."
        )


def _check_groups(settings: GrpoSettings, engine: Engine) -> None:
    together = settings.rollouts * engine.processes
    if together % settings.group_size:
        raise KeepsightError(
            f"{together} completions are written at a time (batch_size x grad_accum, or rows_per_rollout, on "
            f"{engine.processes} devices), which are no whole groups of {settings.group_size}. Choose a multiple."
        )


def _control(control: Control, learner: Learner, plan: MemoryPlan, adapters: list[AdapterInfo]) -> Learner:
    """A control of this stage, from where its own first stage left it, if the memory's folder holds that."""
    made, before = control_learner(control, learner, plan), _first_stage(control, adapters)
    if before is None or not (before / CONFIG).is_file():
        return made
    if control.name == "lora":
        return replace(made, policy_from=before)
    if control.name == "mlp":
        return replace(made, memory_from=before)
    return made


def _start(control: Control, base: str, adapters: list[AdapterInfo]) -> str:
    """What a control of this stage starts on: the language model that its own first stage has tuned, or `base`."""
    before = _first_stage(control, adapters)
    return str(before) if control.name == "sft" and before is not None and (before / "config.json").is_file() else base


def _first_stage(control: Control, adapters: list[AdapterInfo]) -> Path | None:
    """Where the control of the same name beside the memory's first stage is, or would be."""
    memory = next((info for info in adapters if info.method == "PVM"), None)
    return None if memory is None else control_folder(memory.path, control)


@dataclass(frozen=True)
class _Job:
    """What the memory and its controls have in common."""

    source: str
    base: str
    plan: MemoryPlan
    data: CheckedData
    held_out: CheckedData | None
    processor: Any
    rewards: list[Reward]
    engine: Engine
    on_log: OnLog | None
    callbacks: list[Any]
    say: preflight.Say

    def train(
        self,
        name: str,
        learner: Learner,
        folder: Path,
        settings: GrpoSettings,
        checkpoint: Path | None,
        resume: bool,
        overwrite: bool,
    ) -> TrainReport:
        record = {
            "source": self.source,
            "base": self.base,
            "prompts": self.data.rows,
            **self.data.agreed(),
            **learner_record(learner, self.plan),
            **record_of(settings),
        }
        if checkpoint is not None:
            output.check_record(folder, record)
        if self.engine.is_main and learner.learns:
            self._check_space(learner, folder, settings, checkpoint)

        def build(loaded: tuple[Any, Learner]) -> Any:
            model, now = loaded
            return make_grpo_trainer(
                model,
                self.processor,
                now,
                settings,
                self.rewards,
                folder,
                self.data,
                self.held_out,
                self.on_log,
                self.callbacks,
            )

        def card(trainer: Any) -> str:
            return self._card(trainer, name, learner, settings)

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

    def _check_space(self, learner: Learner, folder: Path, settings: GrpoSettings, checkpoint: Path | None) -> None:
        together = settings.rollouts * self.engine.processes // settings.group_size
        per_step = settings.batch_size * settings.grad_accum * self.engine.processes // settings.group_size
        steps = preflight.total_steps(settings, max(1, self.data.rows // together * together // per_step))
        there = len(list(folder.glob("checkpoint-*"))) if checkpoint is not None else 0
        preflight.check_space(folder, *sizes(learner, self.plan), steps, settings, there)

    def _card(self, trainer: Any, name: str, learner: Learner, settings: GrpoSettings) -> str:
        state = trainer.state
        rewards = [entry["reward"] for entry in state.log_history if entry.get("reward") is not None]
        told = f"{rewards[0]:.4f} at first, {rewards[-1]:.4f} at last" if rewards else "not logged"
        policy = {"none": "frozen", "lora": "trained by a LoRA, in policy/", "full": "trained, in policy/"}
        where = policy[learner.policy] if learner.memory is not None else "trained"
        rows = [
            *memory_lines(trainer),
            ("language model", where),
            ("training", f"GRPO, {state.global_step} steps on {self.data.rows:,} prompts; seed {settings.seed}"),
            *mix_lines(self.data),
            ("rewards", ", ".join(f"{reward.name} ({reward.weight:g})" for reward in self.rewards)),
            ("mean reward", told),
            ("learning rate", f"{settings.lr:g}"),
            *base_lines(settings),
        ]
        title = "A persistent visual memory (PVM)" if name == "pvm-grpo" else f"The {name} of a visual memory"
        return result_card(self.base, f"{title} for {self.base}", rows, trainer)
