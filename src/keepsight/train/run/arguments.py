"""Arguments common to all training functions: data, output folder, controls, callbacks; and their checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from keepsight.data.check import CheckedData, Kind, OverLong, Policy, Progress, check_dataset
from keepsight.data.collate import ConversationCollator
from keepsight.data.mixing import check_sources
from keepsight.data.mixture import for_evaluation
from keepsight.data.rehearsal import Rehearsal
from keepsight.data.tables.reading import Source
from keepsight.train.run import output, preflight
from keepsight.train.run.controls import Control, control_folder, hold_out
from keepsight.train.run.engines import Engine, current_engine
from keepsight.train.run.four_bit import check_four_bit
from keepsight.train.run.learner import PolicyChoice
from keepsight.train.run.settings import CommonSettings
from keepsight.train.run.trainer import OnLog


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Arguments of a training function; `keepsight.train.pvm.sft.train_pvm` tells what each of them means."""

    dataset: Any
    folder: Path
    eval_dataset: Any
    eval_split: str | None
    split: str
    check: Literal["full", "quick"]
    resume: bool
    overwrite: bool
    controls: Sequence[Control]
    say: preflight.Say
    on_log: OnLog | None
    on_check: Callable[[int, int], None] | None

    @property
    def engine(self) -> Engine:
        """What launched the processes."""
        return current_engine()

    def begin(self, settings: CommonSettings) -> None:
        """Refuse settings and a folder that cannot be used."""
        preflight.check_settings(settings)
        if self.engine.is_main:
            output.check_output(self.folder, self.resume, self.overwrite)

    def check_base(self, base: str | Path, settings: CommonSettings, policy: PolicyChoice = "none") -> None:
        """Refuse a base that cannot be held, or attended with, as the settings ask."""
        preflight.check_kernel(settings, base)
        names = tuple(control.name for control in self.controls)
        check_four_bit(base, settings.load_in_4bit, self.engine, policy, names)

    def checkpoint(self) -> Path | None:
        """Where to go on from."""
        return preflight.find_checkpoint(self.folder, self.say) if self.resume and not self.overwrite else None

    def of_control(self, control: Control) -> RunArguments:
        """The same for a control, which has a folder of its own."""
        return replace(self, folder=control_folder(self.folder, control), overwrite=False)

    def read(
        self,
        collator: ConversationCollator,
        *,
        kind: Kind,
        text_only: Policy,
        max_length: int | None = None,
        over_long: OverLong = "error",
        need_answer: bool = False,
    ) -> tuple[CheckedData, CheckedData | None]:
        """Read and check data: columns, images, chat template, lengths, answers where a reward compares with them.

        Args:
            collator: of the base's processor.
            kind, text_only, max_length, over_long, need_answer: as in `check_dataset`.

        Returns:
            (for training, for evaluation); with controls and no data for evaluation, a tenth is held out.
        """

        def read(dataset: Any, split: str, progress: Progress | None = None) -> CheckedData:
            def checked(source: Source) -> CheckedData:
                counts, ignore = max_length is not None, source.reading.ignore
                return check_dataset(
                    source,
                    kind=kind,
                    text_only=text_only,
                    decode=self.check == "full" or counts,
                    rehearse=Rehearsal(collator, kind == "chat", count=counts, ignore=ignore),
                    max_length=max_length,
                    over_long=over_long,
                    need_answer=need_answer,
                    progress=progress,
                )

            return check_sources(dataset, split, checked).good()

        data = read(self.dataset, self.split, self.on_check)
        if self.eval_dataset is not None:
            return data, read(for_evaluation(self.eval_dataset), self.eval_split or self.split)
        if not self.controls:
            return data, None
        data, held_out = hold_out(data)
        many = "too few samples to hold any out" if held_out is None else f"{held_out.rows:,} samples are held out"
        self.say(f"{many} for the comparison with the controls; {data.rows:,} train")
        return data, held_out
