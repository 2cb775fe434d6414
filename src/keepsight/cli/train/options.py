"""Options common to the training commands: data, output folder and memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from keepsight.cli.common.console import UsageError, first_of_all, warn
from keepsight.cli.common.options import is_default
from keepsight.data.mixture import Mixture, for_evaluation, mixture_of_words
from keepsight.data.tables.reading import COLUMNS_HELP, IGNORE_HELP, IMAGE_FOLDER_HELP
from keepsight.errors import KeepsightError
from keepsight.train.rewards import DEFAULT_REWARDS
from keepsight.train.run.fields import DATA, MEMORY, REWARD, RUN, setting
from keepsight.train.run.settings import REWARDS_HELP


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train on, and where to."""

    dataset: tuple[str, ...] = setting(
        (),
        "A .jsonl, .json, .csv, .tsv or .parquet file, a dataset folder, or a hub id; repeat for several. With a "
        "weight behind each, they are mixed in these shares: -d photos.jsonl=3 -d charts.jsonl=1.",
        DATA,
        "--data",
        "--dataset",
        "-d",
    )
    columns: tuple[str, ...] = setting((), COLUMNS_HELP, DATA)
    ignore: tuple[str, ...] = setting((), IGNORE_HELP, DATA)
    image_folder: Path | None = setting(None, IMAGE_FOLDER_HELP, DATA)
    eval_dataset: tuple[str, ...] = setting((), "Data for evaluation; repeat for several.", DATA)
    eval_split: str | None = setting(None, "Which split of --eval-dataset. Default: as --split.", DATA)
    split: str = setting("train", "Which split of the dataset, if it has several.", DATA)
    check: Literal["full", "quick"] = setting(
        "full", "full opens every image before training; quick only looks whether it is there.", DATA
    )
    output_dir: Path | None = setting(None, "Gets checkpoints and the result.", RUN, "--output-dir", "-o")
    resume: bool = setting(
        False,
        "Go on from the last whole checkpoint in --output-dir.",
        RUN,
        "--resume",
    )
    overwrite: bool = setting(
        False,
        "Start anew; what is there is moved aside, not deleted.",
        RUN,
        "--overwrite",
    )
    control: tuple[str, ...] = setting(
        (),
        "Then train the same without the memory, and set both side by side: lora, mlp, sft, none (the base), several "
        "with commas; sft=1e-5 for a learning rate of its own.",
        RUN,
    )
    dry_run: bool = setting(
        False, "Train nothing: print what would be trained, the memory it needs, and one traced step.", RUN, "--dry-run"
    )
    tokens: int | None = setting(
        None, "With --dry-run: tokens of a sample. Default: the longest of the data, else 2048.", RUN
    )

    def __post_init__(self) -> None:
        if not self.dry_run:
            self.checked()  # before anything slow is imported

    def checked(self) -> tuple[Mixture, Path]:
        """Data and folder; refuses what contradicts itself or is missing."""
        if self.resume and self.overwrite:
            raise KeepsightError("--resume goes on with a run and --overwrite starts anew; give one of them.")
        if not self.dataset or self.output_dir is None:
            asked = (("--data", self.dataset), ("--output-dir", self.output_dir))
            missing = " and ".join(name for name, value in asked if not value)
            raise UsageError(f"Missing option {missing}; only --dry-run does without")
        self.held_out()
        return self.data(), self.output_dir

    def data(self) -> Mixture:
        """The data to train on, with what was said of their columns."""
        return mixture_of_words(self.dataset, self.columns, self.ignore, self.image_folder)

    def held_out(self) -> Mixture | None:
        """The data for evaluation; None where none are given."""
        if not self.eval_dataset:
            return None
        return for_evaluation(mixture_of_words(self.eval_dataset, self.columns, self.ignore, self.image_folder))

    def named(self) -> dict[str, Any]:
        """What training functions take under the same name."""
        names = ("split", "eval_split", "check", "resume", "overwrite")
        return {"eval_dataset": self.held_out(), **{name: getattr(self, name) for name in names}}

    def warn_of_idle(self, settings: Any) -> None:
        """Warn of options that have no effect as the others are."""
        evaluates = bool(self.eval_dataset)
        idle = {
            "--tokens": not self.dry_run and self.tokens is not None and "without --dry-run",
            "--control": self.dry_run and self.control and "with --dry-run, which is of the memory's own run",
            "--eval-split": not evaluates and self.eval_split is not None and "without --eval-dataset",
            "--eval-steps": not (evaluates or self.control)
            and getattr(settings, "eval_steps", None) is not None
            and "without --eval-dataset",
            "--keep-language": self.dry_run
            and getattr(settings, "keep_language", None) is not None
            and "with --dry-run, which is of the samples alone: a text in half of the steps adds two forwards and "
            "a backward of an image and 128 tokens",
            "--warm-start-lr": not getattr(settings, "warm_start_steps", 1)
            and not is_default(settings, "warm_start_lr")
            and "without --warm-start-steps",
        }
        for name, why in idle.items():
            if why and first_of_all():
                warn(f"{name} has no effect {why}.")


@dataclass(frozen=True, kw_only=True)
class VisMemTrainOptions(TrainOptions):
    """The same for a VisMem's stages."""

    text_only: Literal["error", "skip", "keep"] = setting(
        "error", "What to do with samples without an image (they have long-term memory only).", DATA
    )
    rewards: tuple[str, ...] = setting(DEFAULT_REWARDS, REWARDS_HELP, REWARD, "--reward")
    control: tuple[str, ...] = setting(
        (),
        "Then train the same without the memory, and set both side by side: lora (as many parameters as the memory), "
        "sft (the whole language model), none (the base), several with commas; sft=1e-5 for a rate of its own.",
        RUN,
    )


@dataclass(frozen=True, kw_only=True)
class PvmOptions:
    """A PVM's settings. Defaults are PvmConfig's, which is slow to import."""

    layers: str | None = setting(None, "Decoder layers that get a block, e.g. 8,16,24. Default: as the paper.", MEMORY)
    width: int | None = setting(None, "Latent width. Default: 512, or what fits.", MEMORY)
    causal: bool = setting(
        True,
        "Text reads the images before it, or (as published) all images.",
        MEMORY,
        "--causal/--published-rule",
    )

    def config(self) -> Any:
        """The PvmConfig."""
        from keepsight.pvm import PvmConfig

        return PvmConfig(layers=self._layers(), width=self.width, causal=self.causal)

    def given(self) -> Any:
        """The PvmConfig; None where nothing was asked for."""
        return None if all(is_default(self, name) for name in ("layers", "width", "causal")) else self.config()

    def _layers(self) -> list[int] | None:
        if self.layers is None:
            return None
        try:
            return [int(part) for part in self.layers.replace(" ", ",").split(",") if part]
        except ValueError as error:
            raise KeepsightError(
                f"--layers {self.layers}: expected numbers with commas between them, such as 8,16,24."
            ) from error


@dataclass(frozen=True, kw_only=True)
class VisMemOptions:
    """A VisMem's settings. Defaults are VisMemConfig's, which is slow to import."""

    num_queries: int = setting(8, "K, queries that the query builder makes.", MEMORY)
    num_short: int = setting(8, "N_s, latents of a short-term memory.", MEMORY)
    num_long: int = setting(16, "N_l, latents of a long-term memory.", MEMORY)
    long_input: Literal["states", "tokens"] = setting(
        "states",
        "What a long-term memory is formed from. states: hidden states of the image and the latest text. tokens: the "
        "paper's words, the input embeddings of everything so far.",
        MEMORY,
    )
    max_text_states: int | None = setting(
        None,
        "Form memories from the latest so many text states only. Default: all, as the paper; with long outputs the "
        "long-term former then loses the image as the model does. The laboratory needed 8.",
        MEMORY,
    )
    delimiters: tuple[str, ...] = setting(
        (",", ".", ";", ":", "?", "!", "\n"),
        "What ends a clause; repeat for several. Invocation tokens start as the first, and a language model goes on as "
        "behind it: of a comma in mid-sentence, of a colon with an answer.",
        MEMORY,
    )

    def config(self) -> Any:
        """The VisMemConfig."""
        from keepsight.vismem import VisMemConfig

        return VisMemConfig(**{**asdict(self), "delimiters": list(self.delimiters)})
