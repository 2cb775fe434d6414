"""What a run of VisMem's training is asked for: settings, rewards and questions, checked before weights are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from peft import PeftConfig

from keepsight.checkpoints.sources import check_sources
from keepsight.data.check import CheckedData, check_dataset, load_dataset_any
from keepsight.data.collate import ConversationCollator
from keepsight.data.rehearsal import Rehearsal
from keepsight.errors import KeepsightError
from keepsight.train.rewards.rewards import Reward, load_rewards
from keepsight.train.run import output
from keepsight.train.run.controls import Control, hold_out
from keepsight.train.run.engines import check_engine, current_engine
from keepsight.train.run.preflight import Say, check_settings, load_processor
from keepsight.train.vismem.progress import OnLog
from keepsight.train.vismem.settings import RlSettings
from keepsight.vismem import VisMemConfig


@dataclass(frozen=True)
class Run:
    """What a run is asked for.

    Attributes:
        source: where the model comes from.
        folder: gets everything.
        settings: of the stage.
        rewards: what is scored.
        resume, overwrite: what to do with what is in the folder.
        say, on_log: who listens.
    """

    source: str | Path
    folder: Path
    settings: RlSettings
    rewards: list[Reward]
    resume: bool
    overwrite: bool
    say: Say
    on_log: OnLog | None

    @property
    def is_main(self) -> bool:
        """Whether this process talks and writes."""
        return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Questions:
    """Where questions come from, and how they are checked.

    Attributes:
        dataset, split: what `load_dataset_any` reads.
        eval_dataset, eval_split: the same for held-out questions.
        text_only, check: see `train_vismem_formation`.
        on_check: called as `on_check(done, total)`.
    """

    dataset: Any
    split: str
    eval_dataset: Any
    eval_split: str | None
    text_only: Literal["error", "skip", "keep"]
    check: Literal["full", "quick"]
    on_check: Callable[[int, int], None] | None

    def checked(self, run: Run, controls: Sequence[Control]) -> tuple[CheckedData, CheckedData | None]:
        """(for training, held out); with controls and no evaluation data, a tenth of the questions is held out."""
        held_out = None
        data = self._checked(run, self.dataset, self.split, self.on_check)
        if self.eval_dataset is not None:
            held_out = self._checked(run, self.eval_dataset, self.eval_split or self.split, None)
        elif controls:
            data, held_out = hold_out(data)
        for subject, words in data.told_lines():
            run.say(f"{subject}: {words}")
        for where, why in data.skipped[:5]:
            run.say(f"skipped {where}: {why}")
        more = f", {held_out.rows:,} are held out" if held_out is not None else ""
        run.say(f"{data.rows:,} questions are good{more}; loading {run.source}")
        return data, held_out

    def _checked(self, run: Run, dataset: Any, split: str, progress: Any) -> CheckedData:
        source = load_dataset_any(dataset, split)
        collator = ConversationCollator(load_processor(check_sources(str(run.source))[0]))
        return check_dataset(
            source,
            kind="prompt",
            text_only=self.text_only,
            decode=self.check == "full",
            rehearse=Rehearsal(collator, False, ignore=source.reading.ignore),
            need_answer=any(reward.name in ("answer", "match") for reward in run.rewards),
            progress=progress,
        ).good()


def rewards_of(given: Sequence[str | Reward | Callable[..., Any]]) -> list[Reward]:
    """Rewards by name, as they are, or made of functions f(prompts, completions, **columns)."""
    given = [given] if isinstance(given, str) else list(given)
    names = [one for one in given if isinstance(one, str)]
    ready = [one for one in given if isinstance(one, Reward)]
    functions = [one for one in given if not isinstance(one, (str, Reward))]
    made = [Reward(getattr(one, "__name__", type(one).__name__), 1.0, one) for one in functions]
    return [*(load_rewards(names) if names or not given else []), *ready, *made]


def check_run(run: Run) -> None:
    """Refuse engines, trackers, devices and output folders that cannot be used."""
    settings = run.settings
    check_engine(current_engine(), "vismem", on_gpu=settings.on_gpu)
    check_settings(cast(Any, settings))  # scheduler, trackers and device, which all settings have
    if run.resume and run.overwrite:
        raise KeepsightError("resume goes on with a run and overwrite starts anew; choose one of them.")
    if run.is_main:
        output.check_output(run.folder, run.resume, run.overwrite)


def record_of(run: Run, stage: str, config: VisMemConfig | None, data: CheckedData) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    free = {"logging_steps", "save_steps", "keep_checkpoints", "report_to", "device", "rows_per_rollout"}
    general = {f.name for f in fields(PeftConfig)} | {"token_ids", "delimiter_ids"}
    names = [f.name for f in fields(VisMemConfig) if f.name not in general and not f.name.startswith("base_")]
    memory = {} if config is None else {name: getattr(config, name) for name in names}
    chosen = {name: value for name, value in asdict(run.settings).items() if name not in free}
    rewards = [f"{reward.name}={reward.weight:g}" for reward in run.rewards]
    return {
        "stage": stage,
        "base": str(run.source),
        "samples": data.rows,
        "digest of the data": data.digest,
        "rewards": rewards,
        **memory,
        **chosen,
    }
