"""Figures of the demo's experiment over seeds and of the studies, from their committed raw results (see figures.py)."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from keepsight.lab.study.results import Interval, interval  # noqa: E402
from studies.eye.shares import interval as wilson  # noqa: E402

STUDIES, BENCHMARKS = ROOT / "studies" / "results", ROOT / "benchmarks" / "results"

# Raw results


@cache
def raw(path: Path) -> Any:
    """A committed result file."""
    return json.loads(path.read_text(encoding="utf-8"))


def cells(study: str, row: str) -> dict[str, dict[str, float]]:
    """The values of a study's row, by seed."""
    found = {path.stem.rpartition("-")[2]: raw(path)["values"] for path in (STUDIES / study).glob(f"{row}-?.json")}
    assert found, f"no results of {study}, {row}"
    return found


def mean(study: str, row: str, column: str) -> Interval:
    """The mean over seeds."""
    return interval([values[column] for values in cells(study, row).values()])


def seeds_of_the_lab() -> list[dict[str, Any]]:
    """The demo's experiment, seed by seed."""
    return [raw(path) for path in sorted((BENCHMARKS / "lab-seeds").glob("seed-*.json"))]


def lab_summary() -> dict[str, Any]:
    """Its means and ranges."""
    return raw(BENCHMARKS / "lab-seeds" / "summary.json")


def table(head: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """A markdown table; the first column is text."""
    rule = "|---|" + ("---:|" if numbers else "---|") * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def thousands(number: int | str) -> str:
    """2048 -> 2,048."""
    return f"{int(number):,}"


def spread(entry: dict[str, float], digits: int = 3) -> str:
    """Median and quartiles."""
    return f"{entry['median']:.{digits}f} [{entry['q1']:.{digits}f}, {entry['q3']:.{digits}f}]"


# The demo's experiment over seeds (benchmarks/lab/seeds.py)

LAB_ROWS = {
    "base": "the VLM itself",
    "masked": "the same, filler hidden from attention (control)",
    "mlp": "parallel MLP, no image (the paper's control)",
    "lora": "LoRA",
    "pvm_paper": "PVM with the paper's settings",
    "pvm_plain": "PVM, ours without the warm-up",
    "pvm": "**PVM with keepsight's blindfold**",
    "lora_long": "LoRA trained at 2,048 tokens",
}
LAB_LENGTHS = ("32", "256", "512", "1024", "2048")


def lab_entry(method: str, length: str) -> dict[str, float]:
    """Mean, lowest and highest of a method at a length."""
    summary = lab_summary()
    if method == "masked":
        return summary["masked_filler_accuracy_by_length"][length]
    return summary["accuracy_by_length"][method][length]


def lab(method: str, length: str, what: str = "mean") -> str:
    """`lab pvm 2048`: the mean over seeds; `range`, `low`, `high`: of seeds; `seed-N`: of one."""
    if what.startswith("seed-"):
        run = raw(BENCHMARKS / "lab-seeds" / f"{what}.json")
        key = "masked_filler_accuracy_by_length" if method == "masked" else "accuracy_by_length"
        return f"{100 * run['base' if method == 'masked' else method][key][length]['accuracy']:.0f} %"
    entry = lab_entry(method, length)
    if what == "range":
        return f"{100 * entry['min']:.0f} to {100 * entry['max']:.0f} %"
    return f"{100 * entry[{'mean': 'mean', 'low': 'min', 'high': 'max'}[what]]:.0f} %"


def lab_table() -> str:
    """All methods by length: mean (lowest-highest)."""
    first, rows = seeds_of_the_lab()[0], []
    for method, label in LAB_ROWS.items():
        size = first.get(method, {}).get("trainable_parameters")
        found = [lab_entry(method, length) for length in LAB_LENGTHS]
        words = [f"{100 * e['mean']:.0f} ({100 * e['min']:.0f}-{100 * e['max']:.0f})" for e in found]
        if label.startswith("**"):
            words = [f"**{word}**" for word in words]
        rows.append([label, thousands(size) if size else "-", str(found[0]["seeds"]), *words])
    return table(["", "parameters", "seeds", *map(thousands, LAB_LENGTHS)], rows)


def lab_pvm_table() -> str:
    """PVM on all seeds: mean with standard deviation, lowest and highest."""
    found = [lab_entry("pvm", length) for length in LAB_LENGTHS]
    return table(
        ["PVM, seeds 0 to 9", *map(thousands, LAB_LENGTHS)],
        [
            ["mean (standard deviation)", *(f"{100 * e['mean']:.1f} ({100 * e['sd']:.1f})" for e in found)],
            ["lowest - highest", *(f"{100 * e['min']:.1f} - {100 * e['max']:.1f}" for e in found)],
        ],
    )


def lab_seeds_table() -> str:
    """All methods on the first three seeds, seed by seed."""
    runs = seeds_of_the_lab()[:3]
    named = {
        "base": ("base", "accuracy_by_length"),
        "base, filler masked": ("base", "masked_filler_accuracy_by_length"),
        "base, positions squeezed": ("base", "squeezed_positions_accuracy_by_length"),
        "**PVM**": ("pvm", "accuracy_by_length"),
        "LoRA": ("lora", "accuracy_by_length"),
        "parallel MLP": ("mlp", "accuracy_by_length"),
        "PVM, ours without the warm-up": ("pvm_plain", "accuracy_by_length"),
        "PVM with the paper's settings": ("pvm_paper", "accuracy_by_length"),
        "LoRA trained at full length": ("lora_long", "accuracy_by_length"),
    }
    rows = [
        [label, *(" ".join(f"{100 * run[m][key][n]['accuracy']:.0f}" for run in runs) for n in LAB_LENGTHS)]
        for label, (m, key) in named.items()
    ]
    return table(["generated tokens", *map(thousands, LAB_LENGTHS)], rows)


def lab_causal(key: str) -> str:
    """`on`, `gate_off`, `noise`, `swapped`, `swapped_follows`: the mean over seeds at 1,024 tokens."""
    return f"{100 * lab_summary()['causal'][key]['mean']:.0f} %"


def lab_causal_table() -> str:
    """The same with lowest and highest."""
    named = {
        "on": "memory on",
        "gate_off": "gate off (equals the base)",
        "noise": "memory is noise of the same RMS",
        "swapped": "another image's memory, own image scored",
        "swapped_follows": "the same answers, other image scored",
    }
    found = {label: lab_summary()["causal"][key] for key, label in named.items()}
    return table(
        ["PVM at 1,024 tokens, seeds 0 to 9", "mean", "lowest - highest"],
        [[n, f"{100 * e['mean']:.1f}", f"{100 * e['min']:.1f} - {100 * e['max']:.1f}"] for n, e in found.items()],
    )


def lab_swapped_near(key: str) -> str:
    """The same at 32 tokens: lowest to highest over seeds."""
    found = [run["pvm"]["causal_by_length"]["32"][key] for run in seeds_of_the_lab()]
    return f"{100 * min(found):.0f} to {100 * max(found):.0f} %"


def lab_curve(name: str, what: str = "far") -> str:
    """Where a run of benchmarks/lab/curves.py ended, on validation glyphs; `far` is 2,048 tokens."""
    *_, last = raw(BENCHMARKS / "lab-curves" / f"{name}.json")["looks"].values()
    return f"{100 * last[what]:.0f} %"


def lab_tries(method: str) -> str:
    """How many settings of a method the committed sweep holds."""
    return str(sum(entry["method"] == method for entry in raw(BENCHMARKS / "lab-seeds" / "sweep.json")["tries"]))


# The studies (python -m studies run)


def study(name: str, row: str, column: str, how: str = "") -> str:
    """`study vismem-memory long 1024`: the mean over seeds in percent; `±`: with half its interval."""
    found = mean(name, row, column)
    return f"{100 * found.mean:.1f} %" + (f" ± {100 * found.half:.1f}" if how else "")


def gap(name: str, row: str, other: str, column: str) -> str:
    """A row minus another, seed by seed, in points with its 95 % interval. `other` may be of another study: `s/row`."""
    there, _, against = other.rpartition("/")
    mine, theirs = cells(name, row), cells(there or name, against)
    return interval([mine[s][column] - theirs[s][column] for s in sorted(mine.keys() & theirs.keys())]).points()


def reading_table() -> str:
    """One memory before the answers, by length (docs/vismem.md)."""
    rows = (
        ("base", ("pvm-length", "base")),
        ("random latents of equal norm", ("vismem-memory", "long_noise")),
        ("the visual embeddings put in again, no training", ("vismem-memory", "embeddings")),
        ("long, warm start only", ("vismem-memory", "warm_long")),
        ("**long, warm start and stage I**", ("vismem-memory", "long")),
        ("the same, latents of another image", ("vismem-memory", "long_other")),
        ("long, trained and read with all text states", ("vismem-memory", "long_all_text")),
        ("short, warm start and stage I", ("vismem-memory", "short")),
        ("the same, latents of another image", ("vismem-memory", "short_other")),
        ("long, stage I from scratch (the paper)", ("vismem-memory", "scratch_long")),
        ("short, stage I from scratch (the paper)", ("vismem-memory", "scratch_short")),
        ("LoRA trained at up to 2,048 tokens", ("pvm-length", "lora_long")),
    )
    lengths = ("512", "1024", "2048")
    body = [[label, *(study(*where, length, "±").replace(" %", "") for length in lengths)] for label, where in rows]
    return table(["% of facts read, generated tokens before", *map(thousands, lengths)], body)


# The eye


def _eye() -> Any:
    return raw(STUDIES / "eye" / "cpu.json")


def _share(right: int, count: int, spread: bool = True) -> str:
    low, high = wilson(right, count)
    return f"{100 * right / count:.0f} %" + (f" [{low:.0f}, {high:.0f}]" if spread else "")


def eye_read(style: str, image: str) -> str:
    """Names read at the gate's distances; `style` is `seen` or a style's name, `image` is `single` or `grids`."""
    row = next(
        row
        for row in _eye()["rows"]
        if row["task"] == "name" and row["style"].startswith(style) and row["image"].startswith(image)
    )
    short, *far = row["right"]
    shares = " and ".join(_share(one, row["n"], False) for one in far)
    return f"{_share(short, row['n'])} of {row['n']} at distance 0, {shares} at 1,024 and 2,048 positions"


def eye_alone(style: str) -> str:
    """What the tower alone tells of a style: by the nearest word, and by the nearest average of the seen styles."""
    alone = _eye()["encoder alone"][style]
    words, averages = (_share(alone[key], alone["n"]) for key in ("named", "right"))
    return f"{words} of {alone['n']} by the nearest word, {averages} by the nearest average of the seen styles"


def eye_holds() -> str:
    """The verdict."""
    if _eye()["gate"]["holds"]:
        return "The gate holds."
    return "The gate does not hold, so nothing measured with this eye says anything about dilution."


def eye_minutes() -> str:
    """CPU minutes of the making."""
    spent = _eye()["conditions"]["make_cpu_seconds"]
    return f"{sum(spent.values()) / 60:.0f} CPU minutes"
