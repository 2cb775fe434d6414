"""Refine a persistent visual memory together with its language model, by GRPO through TRL.

The defaults are the paper's second stage (arXiv 2605.00814, section 5): the language model and the memory learn,
vision encoder and projector stay frozen, AdamW at a constant 1e-6, 64 completions per step, 8 of a prompt, temperature
1, no KL term, completions that were cut off teach nothing, 0.1 for the form and 0.9 for the right answer. What the
paper leaves open stands in `GrpoSettings` and in docs/train.md: loss, clipping, scaling of advantages. Where a whole
language model is too much, a LoRA on it (`policy="lora"`) or the memory alone (`policy="none"`) can learn instead:
these two are keepsight's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from keepsight.checkpoints.adapters import AdapterInfo
from keepsight.checkpoints.load import load_processor
from keepsight.checkpoints.sources import check_sources
from keepsight.data.check import CheckedData
from keepsight.data.collate import ConversationCollator
from keepsight.errors import KeepsightError
from keepsight.pvm import PvmConfig
from keepsight.train.pvm.grpo_trainer import make_grpo_trainer
from keepsight.train.pvm.job import PvmJob, about_rule, check_pvm_engine
from keepsight.train.pvm.starts import control_of, first_stage, what_learns
from keepsight.train.pvm.writer import Writer
from keepsight.train.rewards.rewards import Reward, load_rewards, needs_answer
from keepsight.train.run import preflight
from keepsight.train.run.arguments import RunArguments
from keepsight.train.run.controls import Control
from keepsight.train.run.engines import Engine
from keepsight.train.run.learner import Learner, PolicyChoice
from keepsight.train.run.report import TrainReport, memory_lines, mix_lines
from keepsight.train.run.settings import GrpoSettings
from keepsight.train.run.trainer import OnLog
from keepsight.words import counted

__all__ = ["GrpoSettings", "TrainReport", "train_pvm_grpo"]


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
    writer: Writer | None = None,
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
        output_dir: gets checkpoints and the result.
        policy: what of the language model learns beside the memory.
        lora_rank: of policy="lora", on all linear maps of the decoder.
        pvm: the memory of a plain VLM; default: `PvmConfig()`.
        eval_dataset: prompts for the evaluation. With controls and without it, a tenth of the data is held out.
        settings: how to train.
        controls: what to train after the memory, for comparison. They start where the memory started: from the same
            base; or, where the memory's folder holds its own control of that name, from that.
        writer: of the completions, where that is not transformers: `keepsight.serve.vllm.rollouts.VllmRollouts`.
            Completions of controls are written by transformers in any case.
        split, eval_split, check, resume, overwrite, say, on_log, on_check, callbacks: as in
            `keepsight.train.pvm.sft.train_pvm`.

    Raises:
        KeepsightError, FileNotFoundError: before training, for anything that would spoil it.
        RewardError: naming a reward that cannot be loaded, or does not return a finite number for each completion.
        TrainingDivergedError: if the loss becomes NaN or infinite; earlier checkpoints stay.
        ImportError: if the `train` extra is not installed.
    """
    preflight.require_trl()
    settings, folder = settings or GrpoSettings(), Path(output_dir)
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
    rewards, engine = load_rewards(settings.rewards), asked.engine
    asked.begin(settings)
    base, adapters = check_sources(source)
    learner, plan = what_learns(str(source), base, adapters, pvm, policy, lora_rank, settings)
    asked.check_base(base, settings, policy)
    _check_kl(learner, settings)
    _check_groups(settings, engine)
    if writer is not None:
        writer.check(base, plan.pvm, learner, settings, engine)
    learners = [(control, control_of(control, learner, plan, adapters)) for control in controls]
    checkpoint, processor = asked.checkpoint(), load_processor(base)
    data, held_out = asked.read(
        ConversationCollator(processor),
        kind="prompt",
        text_only=settings.text_only,
        max_length=settings.max_length,
        over_long=settings.over_long,
        need_answer=needs_answer(rewards),
    )
    for prompts in (data, held_out):
        _check_images(processor, prompts)
    needed = settings.rollouts * engine.processes // settings.group_size
    if data.rows < needed:
        raise KeepsightError(
            f"{data.rows} prompts are fewer than the {needed} that are answered at a time ({settings.rollouts} "
            f"completions on each of {engine.processes} devices, {settings.group_size} per prompt). Lower "
            "--batch-size, --grad-accum or --rows-per-rollout."
        )
    check_pvm_engine(engine, settings, plan, data, held_out)
    preflight.say_data(data, "prompts", base, settings.max_length, say)
    data = data.mixed()
    scaled = {"group": "within their group", "batch": "over the batch", "none": "not at all"}[settings.scale_rewards]
    say(f"GRPO: loss {settings.loss_type}, clip {settings.clip:g}, KL {settings.kl:g}, advantages scaled {scaled}")
    say(about_rule(plan.pvm))
    if writer is not None:
        say(f"completions are written by {writer}{'; those of controls by transformers' if learners else ''}")
    job = GrpoJob(
        name=GrpoJob.stage,
        source=str(source),
        adapters=adapters,
        base=base,
        asked=asked,
        learner=learner,
        plan=plan,
        settings=settings,
        data=data,
        held_out=held_out,
        processor=processor,
        rewards=rewards,
        writer=writer,
        checkpoint=checkpoint,
        callbacks=callbacks or [],
    )
    what = {"full": "the memory and the language model", "lora": "the memory and a LoRA", "none": "the memory"}[policy]
    judged = "the evaluation data" if eval_dataset is not None else "prompts held out of the training data"
    where = judged if held_out is not None else "the training data alone"
    note = f"Rewards are means over {settings.group_size} completions of every prompt, on {where}."
    return job.with_controls(what, learners, note)


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


def _check_images(processor: Any, prompts: CheckedData | None) -> None:
    """Refuse several images a prompt where the base must be told how many there are, which TRL's GRPO does not."""
    if prompts is None or "batch_num_images" not in getattr(processor.image_processor, "model_input_names", ()):
        return
    most = max((len(images) for images in prompts.dataset["images"]), default=0)
    if most > 1:
        raise KeepsightError(
            f"A prompt has {most} images. This base cuts a lone image into tiles and several not, and TRL's GRPO does "
            "not hand on how many there are: give every prompt one image."
        )


@dataclass(frozen=True, kw_only=True)
class GrpoJob(PvmJob[GrpoSettings]):
    """Reinforcement learning of a memory and its policy, or of a control."""

    stage = "pvm-grpo"

    source: str
    adapters: list[AdapterInfo]
    rewards: list[Reward]
    writer: Writer | None

    def trainer(self, loaded: tuple[Any, Learner]) -> Any:
        trainer = make_grpo_trainer(self, *loaded)
        if self.writer is not None and self.name == self.stage:  # controls are no models that it knows
            self.writer.attach(trainer, self.base)
        return trainer

    def samples(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "base": self.base,
            "prompts": self.data.rows,
            **self.data.agreed(),
            **({} if self.writer is None else {"writer": str(self.writer)}),
        }

    def steps_per_epoch(self) -> int:
        settings, processes = self.settings, self.engine.processes
        together = settings.rollouts * processes // settings.group_size
        per_step = settings.batch_size * settings.grad_accum * processes // settings.group_size
        return max(1, self.data.rows // together * together // per_step)

    def control_settings(self, control: Control) -> GrpoSettings:
        return replace(self.settings, lr=control.rate(self.settings.lr, whole_model_too=True))

    def control_base(self, control: Control) -> str:
        """The language model that the control's own first stage has tuned, if there is one."""
        before = first_stage(control, self.adapters) if control.name == "sft" else None
        return str(before) if before is not None and (before / "config.json").is_file() else self.base

    def told(self, trainer: Any) -> list[tuple[str, str]]:
        settings, state = self.settings, trainer.state
        rewards = [entry["reward"] for entry in state.log_history if entry.get("reward") is not None]
        done = f"{counted(state.global_step, 'step')} on {counted(self.data.rows, 'prompt')}"
        policy = {"none": "frozen", "lora": "trained by a LoRA, in policy/", "full": "trained, in policy/"}
        return [
            *memory_lines(trainer),
            ("language model", policy[self.learner.policy] if self.learner.memory is not None else "trained"),
            ("training", f"GRPO, {done}; seed {settings.seed}"),
            *mix_lines(self.data),
            ("rewards", ", ".join(f"{reward.name} ({reward.weight:g})" for reward in self.rewards)),
            ("mean reward", f"{rewards[0]:.4f} at first, {rewards[-1]:.4f} at last" if rewards else "not logged"),
            ("learning rate", f"{settings.lr:g}"),
        ]
