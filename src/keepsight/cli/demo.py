"""`keepsight demo`: see a VLM lose its image and get it back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keepsight.cli.common.console import Interrupted, err, out, quiet, say, with_examples
from keepsight.cli.common.progress import Progress
from keepsight.errors import KeepsightError
from keepsight.installed import MissingExtraError

_ROWS = (
    ("base", "base"),
    ("pvm", "PVM"),
    ("lora", "LoRA"),
    ("mlp", "parallel MLP"),
    ("pvm_plain", "PVM, no warm-up"),
    ("lora_long", "LoRA, full length"),
)


@with_examples(
    ("all of it; then open keepsight-demo/report.html", "keepsight demo"),
    ("less of it, in under two minutes", "keepsight demo --quick"),
    ("on a base of your own", "keepsight lab pretrain --seed 1 --output-dir base-1 && keepsight demo --base base-1"),
)
def demo(
    folder: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for results, plots and report.")] = Path(
        "keepsight-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, images and methods; under two minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Of adapters, training data and test images.", min=0)] = 0,
    base: Annotated[
        Path | None, typer.Option(help="A base made by `keepsight lab pretrain`. Default: the one that ships.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes of one thread each. Default: one per core, at most 4.", min=0)
    ] = None,
) -> None:
    """See a VLM lose its image and get it back: a few minutes, no GPU, no download.

    A tiny VLM reads handwritten digits in short and long outputs. A memory (PVM) and two controls of the same size,
    LoRA and a parallel MLP, are trained on the same data with the language model frozen. All are read at lengths far
    beyond their training. Then the memory is tampered with, to see whether it is really used.
    """
    quiet()
    from keepsight.lab.demo.methods import DemoSettings
    from keepsight.lab.demo.run import check_output, run_demo
    from keepsight.lab.digits import load_glyphs

    check_output(folder)
    load_glyphs()  # a missing extra is found before the work
    _need_matplotlib()
    if base is not None and not (base / "config.json").is_file():
        raise KeepsightError(f"{base} is no base: it has no config.json. Make one: keepsight lab pretrain -o {base}")
    settings = DemoSettings.quick(seed, base) if quick else DemoSettings(seed=seed, base=base)
    names = dict(_ROWS)
    say(
        "A tiny VLM reads digits; a memory and two controls of the same size learn to help it. "
        + ("Under two minutes on two cores." if quick else "A few minutes on two cores; --quick does less.")
    )
    try:
        with Progress("the demo") as show:
            for row in settings.rows_of_study:
                show(names[row], 0, 1, "waiting")

            def finish(row: str, result: dict[str, Any]) -> None:
                show(names[row], 1, 1, "done")
                if not err.is_terminal:
                    far = settings.lengths[-1]
                    accuracy = result["accuracy_by_length"][str(far)]["accuracy"]
                    say(f"{names[row]}: reads {accuracy:.1%} after {far:,} tokens")

            results = run_demo(
                folder,
                settings,
                quick=quick,
                workers=workers,
                on_progress=lambda row, what, share: show(names[row], min(share, 0.99), 1, what),
                on_done=finish,
            )
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped by Ctrl-C; no results were written.") from stop
    print_results(results, folder)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("The demo draws its plots with matplotlib.", "lab") from error


def print_results(results: dict[str, Any], folder: Path) -> None:
    """The tables and the verdict, on stdout."""
    from rich.table import Table

    from keepsight.lab.demo.seeds import in_words

    lengths, limit = results["lengths"], results["train_length"]
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": None, "pad_edge": False}
    title = f"Digits read correctly, by generated tokens before the answer (trained up to {limit}; * beyond)"
    table = Table(title=title, **look)
    table.add_column("")
    for length in lengths:
        table.add_column(f"{length}{'*' if length > limit else ''}", justify="right")
    table.add_column("trained", justify="right")
    table.add_column("s", justify="right")
    for name, label in _ROWS:
        if name not in results:
            continue
        entry = results[name]
        cells = [f"{entry['accuracy_by_length'][str(n)]['accuracy']:.1%}" for n in lengths]
        seconds = f"{entry['training_seconds']:.0f}" if name != "base" else ""
        style = "bold cyan" if name == "pvm" else None
        table.add_row(label, *cells, f"{entry['trainable_parameters']:,}", seconds, style=style)
        if name == "base":
            masked = entry["masked_filler_accuracy_by_length"]
            table.add_row(
                "  filler masked", *(f"{masked[str(n)]['accuracy']:.1%}" for n in lengths), "", "", style="dim"
            )
    out.print()
    out.print(table)
    causal = results["pvm"]["causal"]
    battery = Table(title=f"Is the memory used? PVM after {causal['length']:,} tokens", show_header=False, **look)
    for key, label in (
        ("on", "memory on"),
        ("gate_off", "gate off"),
        ("noise", "memory replaced by noise"),
        ("swapped", "another image's memory, scored for the own image"),
        ("swapped_follows", "the same answers, scored for the other image"),
    ):
        battery.add_row(label, f"{causal[key]:.1%}")
    out.print()
    out.print(battery)
    out.print()
    for entry in results["verdict"]:
        mark = "[green]held[/green]        " if entry["held"] else "[red]did not hold[/red]"
        out.print(f"{mark} {entry['claim']}.", highlight=False, soft_wrap=True)
    if results["study"]:
        out.print()
        out.print(in_words(results["study"]), highlight=False, markup=False, soft_wrap=True)
    out.print()
    out.print(
        f"regime: {results['regime']}. {results['regime_note']}",
        style="dim",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    out.print(
        f"{results['seconds']:.0f} s. Read on: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True
    )
