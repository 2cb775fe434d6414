"""`keepsight eval`: questions with known answers, memory on and off side by side, by the length of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keepsight.cli.common.console import (
    Interrupted,
    check_device,
    out,
    quiet,
    refuse_twins,
    say,
    warn,
    with_examples,
)
from keepsight.cli.common.model import BUILT_IN, Adapters, Base, Device, Dtype, Source
from keepsight.cli.common.progress import Progress, Waiting
from keepsight.data.mixture import for_evaluation, load_sources, mixture_of_words
from keepsight.data.tables.reading import COLUMNS_HELP, IGNORE_HELP, IMAGE_FOLDER_HELP
from keepsight.errors import KeepsightError
from keepsight.evaluate.scoring import Match
from keepsight.evaluate.settings import Compared, EvalSettings
from keepsight.words import counted, some


@with_examples(
    ("a memory on a file of questions with answers", "keepsight eval my-memory --data questions.jsonl"),
    ("a VisMem that may invoke short memories only", "keepsight eval my-vismem -d questions.jsonl --memory only_short"),
    ("the same benchmark tasks as everybody", "lmms_eval --model keepsight --model_args pretrained=my-memory ..."),
)
def evaluate(
    source: Source = BUILT_IN,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "--dataset", "-d", help="Questions with answers, in any format that training reads; repeat."
        ),
    ] = None,
    columns: Annotated[list[str] | None, typer.Option(help=COLUMNS_HELP)] = None,
    ignore: Annotated[list[str] | None, typer.Option(help=IGNORE_HELP)] = None,
    image_folder: Annotated[Path | None, typer.Option(help=IMAGE_FOLDER_HELP)] = None,
    split: Annotated[str, typer.Option(help="Which split of the datasets, if they have several.")] = "train",
    adapter: Adapters = None,
    memory: Annotated[
        Compared,
        typer.Option(help="What is compared with off: the memory as it is, or a policy of a VisMem."),
    ] = EvalSettings.memory,
    max_new_tokens: Annotated[
        int, typer.Option(help="Length limit of an answer.", min=1)
    ] = EvalSettings.max_new_tokens,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.", min=1)] = EvalSettings.batch_size,
    strata: Annotated[int, typer.Option(help="Groups by the length of the answers.", min=1)] = EvalSettings.strata,
    match: Annotated[
        Match,
        typer.Option(help="Right is: the answer that the text gives; its words anywhere in it; the same characters."),
    ] = EvalSettings.match,
    samples: Annotated[int | None, typer.Option(help="At most so many questions, the first.", min=1)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A JSON file: the table, and every answer.")] = Path(
        "keepsight-eval.json"
    ),
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = EvalSettings.seed,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Does a memory answer better, and where? Each question is answered with it and without, greedily.

    The table cuts the questions into groups by the length of the answers without the memory: a memory should help the
    long ones. Differences are paired, with 95 % bootstrap intervals over questions. Interrupted, it goes on when it is
    called again as it was.
    """
    from keepsight.checkpoints.load import load_checked, load_processor
    from keepsight.checkpoints.sources import check_sources
    from keepsight.diagnose.cases import read_dataset
    from keepsight.evaluate.keeping import Kept, fingerprint
    from keepsight.evaluate.run import evaluate as ask

    check_device(device)
    settings = EvalSettings(memory, max_new_tokens, batch_size, strata, match, seed)
    if not data:
        raise KeepsightError("--data is missing: a file of questions with answers (keepsight data check --for grpo).")
    if output.is_dir():
        raise KeepsightError(f"--output {output} is a folder; name a JSON file.")
    quiet()
    asked_for = for_evaluation(mixture_of_words(data, columns or (), ignore or (), image_folder))
    base_name, infos = check_sources(source, adapter or [], base)
    processor = load_processor(base_name, infos)
    with Waiting("checking the questions"):
        sources, _ = load_sources(asked_for, split)
        asked = [sample for one in sources for sample in read_dataset(one, processor=processor)][:samples]
    unanswered = [number for number, sample in enumerate(asked, 1) if sample.answer is None]
    if unanswered:
        raise KeepsightError(
            f"{len(unanswered)} of {counted(len(asked), 'question')} have no answer to compare with: number "
            f"{some(unanswered)}. Give them one (a column such as `answer`), or leave them out."
        )
    if not asked:
        raise KeepsightError("There is no question to ask.")
    refuse_twins(infos, "Leave one of them out.")
    methods = {info.method for info in infos}
    if memory != "on" and "VISMEM" not in methods:
        raise KeepsightError(f"--memory {memory} is a policy of a VisMem, and {source} carries none.")
    described = {"source": source, "base": base_name, "adapters": sorted(methods)}
    same = {
        "model": described | {"weights": [_version_of(info.path) for info in infos], "dtype": dtype},
        "--memory": memory,
        "--max-new-tokens": max_new_tokens,
    } | fingerprint(asked)
    kept = Kept(output.with_name(output.name + ".part"), same)
    if began := len(kept.answers(memory)) + len(kept.answers("off")):
        is_there = f"{counted(began, 'answer')} {'is' if began == 1 else 'are'} there already"
        say(f"{is_there} ({kept.file}): going on from there.")
    with Waiting(f"loading {base_name}"):
        model, _ = load_checked(base_name, infos, dtype=dtype, device=device, processor=processor)
    try:
        with Progress("the evaluation", announce=True) as progress:
            found = ask(model, processor, asked, settings, bool(methods & {"PVM", "VISMEM"}), progress, kept)
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"stopped by Ctrl-C. What was answered is in {kept.file}: the same command goes on behind it."
        ) from stop
    found.model = described
    found.save(output)
    kept.complete()
    _show(found)
    say(f"every answer: {output}")


def _version_of(adapter: Path) -> list[int]:
    """Changes when an adapter is trained anew."""
    file = adapter / "adapter_model.safetensors"
    return [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else []


def _interval(gain: Any, between: str) -> str:
    """Questions that all differ alike, or not at all, are resampled to themselves: that is no narrow interval."""
    if gain.low == gain.high:
        return "unknown: all alike"
    return f"{100 * gain.low:+.1f}{between}{100 * gain.high:+.1f}"


def _show(found: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    strata, whole = found.table()
    compared = found.on is not None
    title = "Questions answered rightly, by the length of the answer in tokens"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)  # 80 columns hold the longest policy
    for column in (
        "tokens",
        "questions",
        *(("memory off", f"memory {found.settings.memory}", "difference") if compared else ("right",)),
    ):
        table.add_column(column, justify="right")
    lengths = [f"{s.longest:,}" if s.shortest == s.longest else f"{s.shortest:,} to {s.longest:,}" for s in strata]
    for one, name in zip((*strata, whole), (*lengths, "all"), strict=True):
        row = [name, f"{one.n}", f"{one.off.value:.1%}"]
        if one.on is not None and one.difference is not None:
            gain = one.difference
            row += [
                f"{one.on.value:.1%}",
                escape(f"{100 * gain.value:+.1f} [{_interval(gain, ', ').removeprefix('unknown: ')}]"),
            ]
        table.add_row(*row, style="bold" if name == "all" else None)
    out.print(table)
    say(f"An answer is right by --match {found.rule}.")
    most = found.settings.max_new_tokens
    full = sum(answer.tokens >= most for answer in (*found.off, *(found.on or ())))
    if full:
        all_of_them = len(found.off) + len(found.on or ())
        warn(f"{full:,} of {all_of_them:,} answers reached the {most:,} of --max-new-tokens, and may be cut.")
    if not compared:
        say("This model carries no memory, so there is nothing to compare.")
        return
    gain = whole.difference
    assert gain is not None
    sure = "neither better nor worse that could be shown"
    if gain.low < gain.high and not gain.low <= 0 <= gain.high:
        sure = "better" if gain.low > 0 else "worse"
    out.print(
        f"With the memory: {sure} ({100 * gain.value:+.1f} points, 95 % interval {_interval(gain, ' to ')}, "
        f"over {counted(gain.n, 'question')}).",
        soft_wrap=True,
        highlight=False,
    )
