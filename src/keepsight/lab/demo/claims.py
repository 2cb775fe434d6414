"""The demo's claims, and their judges. Each claim is made only where the numbers of the run bear it out."""

from __future__ import annotations

from typing import Any

from keepsight.lab.study.results import Judgement, Results, judged
from keepsight.lab.study.study import Claim

CHANCE = 0.1
"""Ten digits."""
MASKED = "masked_filler_accuracy_by_length"


def accuracy_at(results: dict[str, Any], method: str, length: int, key: str = "accuracy_by_length") -> float:
    """Accuracy of `method` at `length` generated tokens, from the demo's `results.json`."""
    return results[method][key][str(length)]["accuracy"]


def standard_error(accuracy: float, n: int) -> float:
    """Binomial standard error of a mean over `n` answers."""
    return (accuracy * (1 - accuracy) / n) ** 0.5


class _OneSeed:
    """The numbers of the demo's one seed."""

    def __init__(self, results: Results):
        (self.seed,) = results.seeds("base", "pvm")
        self.results = results
        self.lengths = [int(length) for length in self.fact("base", "accuracy_by_length")]
        self.short, self.far = self.lengths[0], self.lengths[-1]
        self.causal: dict[str, Any] = self.fact("pvm", "causal")

    def fact(self, row: str, key: str) -> Any:
        return self.results.fact(row, key)[self.seed]

    def at(self, row: str, length: int, key: str = "accuracy_by_length") -> float:
        return self.fact(row, key)[str(length)]["accuracy"]


def _falls(results: Results) -> Judgement:
    run = _OneSeed(results)
    near, far = run.at("base", run.short), run.at("base", run.far)
    return judged(
        far < 0.7 * near,
        f"It reads {near:.0%} of the digits after {run.short} generated tokens and {far:.0%} after {run.far:,}.",
    )


def _is_dilution(results: Results) -> Judgement:
    run = _OneSeed(results)
    near, far, masked = run.at("base", run.short), run.at("base", run.far), run.at("base", run.far, MASKED)
    return judged(
        masked - far > 0.7 * (near - far) > 0,
        f"With the filler hidden from attention and all distances kept, it reads {masked:.0%} after {run.far:,} "
        "tokens.",
    )


def _keeps(results: Results) -> Judgement:
    run = _OneSeed(results)
    near, far, trained = run.at("pvm", run.short), run.at("pvm", run.far), run.fact("pvm", "train_length")
    return judged(
        far > 0.8 * near,
        f"{near:.0%} after {run.short} tokens, {far:.0%} after {run.far:,} ({run.far / trained:.0f} times the training "
        "length).",
    )


def _is_ahead(results: Results) -> Judgement:
    run = _OneSeed(results)
    pvm, lora, mlp = (run.at(row, run.far) for row in ("pvm", "lora", "mlp"))
    return judged(
        pvm > max(lora, mlp) + 0.1,
        f"After {run.far:,} tokens: PVM {pvm:.0%}, LoRA {lora:.0%}, parallel MLP {mlp:.0%}.",
    )


def _off_is_base(results: Results) -> Judgement:
    run = _OneSeed(results)
    base, off = run.at("base", run.causal["length"]), run.causal["gate_off"]
    return judged(
        abs(off - base) < 1e-6, f"{off:.1%} with the gate off, {base:.1%} for the base, on the same questions."
    )


def _follows(results: Results) -> Judgement:
    causal = _OneSeed(results).causal
    return judged(
        causal["swapped_follows"] > 0.7 and causal["swapped"] < 0.3,
        f"After {causal['length']:,} tokens, {causal['swapped_follows']:.0%} of the answers are right for the image in "
        f"memory and {causal['swapped']:.0%} for the image that the language model was shown.",
    )


_ALL = ("base", "pvm", "lora", "mlp")
CLAIMS = tuple(
    Claim(text, "ours", _ALL, judge, name)
    for name, text, judge in (
        ("base_falls", "The base loses its image in long outputs", _falls),
        ("fall_is_dilution", "What it loses, it loses to the number of text keys", _is_dilution),
        ("pvm_keeps", "With the memory it keeps most of its short-range accuracy", _keeps),
        (
            "pvm_ahead",
            "The memory is clearly ahead of both controls of the same size far beyond the training length",
            _is_ahead,
        ),
        ("gate_off_is_base", "With the gate off it is the base again", _off_is_base),
        ("answers_follow_memory", "With another image in memory, the answers follow the other image", _follows),
    )
)


def verdict(results: Results) -> list[dict[str, Any]]:
    """The claims with what was measured for them, each marked `held` or not in this run; none without all their rows.

    Returns:
        Entries of `name`, `claim`, `held` and `measured` (a sentence with this run's numbers).
    """
    found = [(claim, claim.judge(results)) for claim in CLAIMS if results.has(*claim.rows)]
    return [{"name": c.name, "claim": c.text, "held": j.word == "holds", "measured": j.because} for c, j in found]
