"""The papers' claims on latency beside what a GPU measured, from the benchmarks' raw results and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.lab.study.results import Finding

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PVM_TOKEN = 1.0461
"""PVM paper: time per token with the memory over time without."""
VISMEM_SAMPLE = (1.082, 1.438)
"""VisMem paper: time per sample with memories over time without, over benchmarks."""


@dataclass(frozen=True)
class Cost:
    """A claim on what a memory costs, and what was measured."""

    claim: str
    source: str
    found: str
    word: Finding


def costs(results: Path = RESULTS) -> list[Cost]:
    """All claims on latency, judged."""
    return [_decoding(results), _latents(results), _training(results)]


def _raw(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"


def _decoding(results: Path) -> Cost:
    file = _raw(results / "decode" / "cuda-8b-bfloat16-eager.json")
    ratios = {found["visual_tokens"]: found["summary"]["ratio_to_base"]["pvm"] for found in file["results"]}
    word: Finding = "cannot be tested here"
    if all(ratio["q3"] <= PVM_TOKEN for ratio in ratios.values()):
        word = "holds"
    elif all(ratio["q1"] > PVM_TOKEN for ratio in ratios.values()):
        word = "does not hold"
    found = "; ".join(f"{size:,}: {_spread(ratio)}" for size, ratio in ratios.items())
    return Cost(
        f"With PVM a token takes {PVM_TOKEN} times as long and no longer (8B).",
        "PVM paper, latency",
        f"8B, eager, {file['conditions']['device']}, median and quartiles by visual tokens: {found}. Eager decoding "
        "times the host and not the GPU.",
        word,
    )


def _latents(results: Path) -> Cost:
    file = _raw(results / "vismem" / "cuda-7b-bfloat16.json")
    row = next(r for r in file["results"] if r["form"] == "literal" and r["invocations"] == 2)
    ratio, rounds = row["ratio_to_plain"], file["arguments"]["repeats"]
    low, high = VISMEM_SAMPLE
    return Cost(
        f"With VisMem a sample takes {low} to {high} times as long, by benchmark, and no longer (7B).",
        "VisMem paper, latency",
        f"7B, {file['conditions']['device']}, 2 memories in {file['arguments']['tokens']} text tokens, "
        f"{row['visual_tokens']:,} visual tokens, {rounds} rounds: {_spread(ratio)}.",
        "holds" if ratio["q3"] <= high else "does not hold",
    )


def _training(results: Path) -> Cost:
    file = _raw(results / "train" / "sft-cuda-8b-bfloat16.json")
    summary = file["summary"]
    ratio, peak = summary["pvm"]["ratio"], summary["pvm"]["peak_bytes"] / summary[file["reference"]]["peak_bytes"]
    return Cost(
        "A step of PVM's supervised training takes no longer than one of LoRA of equal size (8B).",
        "ours (the reader's question)",
        f"8B, {file['conditions']['device']}, checkpointing: {_spread(ratio)}; peak memory {peak:.2f}.",
        "holds" if ratio["q3"] <= 1 else "does not hold",
    )


def section(found: list[Cost], page: str) -> str:
    """The claims as a section of the report; `page` is a link to the conditions."""
    lines = ["## What a memory costs", ""]
    lines += [f"Random weights, medians and quartiles of paired rounds; conditions: [{Path(page).name}]({page}).", ""]
    lines += ["| claim | from | measured, as a ratio | found here |", "|---|---|---|---|"]
    lines += [f"| {cost.claim} | {cost.source} | {cost.found} | **{cost.word}** |" for cost in found]
    return "\n".join([*lines, ""])
