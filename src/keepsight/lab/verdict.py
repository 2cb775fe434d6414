"""What the numbers say, in sentences that are only claimed where the numbers of this run bear them out."""

from __future__ import annotations

from typing import Any

CHANCE = 0.1
"""Ten digits."""
NEEDED = {"base", "pvm", "lora", "mlp"}
"""Jobs without which there is no verdict."""


def accuracy_at(results: dict[str, Any], method: str, length: int, key: str = "accuracy_by_length") -> float:
    """Accuracy of `method` at `length` generated tokens."""
    return results[method][key][str(length)]["accuracy"]


def standard_error(accuracy: float, n: int) -> float:
    """Binomial standard error of a mean over `n` answers."""
    return (accuracy * (1 - accuracy) / n) ** 0.5


def verdict(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Claims with what was measured for them, each marked `held` or not in this run.

    Args:
        results: as assembled, with at least `base`, `pvm`, `lora`, `mlp`.

    Returns:
        Entries of `name`, `claim`, `held` and `measured` (a sentence with this run's numbers).
    """
    lengths = results["lengths"]
    short, far = lengths[0], lengths[-1]
    at = {m: (accuracy_at(results, m, short), accuracy_at(results, m, far)) for m in ("base", "pvm", "lora", "mlp")}
    masked = accuracy_at(results, "base", far, "masked_filler_accuracy_by_length")
    causal = results["pvm"]["causal"]
    base_there = accuracy_at(results, "base", causal["length"])
    rival = max(at["lora"][1], at["mlp"][1])
    entries = [
        (
            "base_falls",
            "The base loses its image in long outputs",
            at["base"][1] < 0.7 * at["base"][0],
            f"It reads {at['base'][0]:.0%} of the digits after {short} generated tokens and {at['base'][1]:.0%} after "
            f"{far:,}.",
        ),
        (
            "fall_is_dilution",
            "What it loses, it loses to the number of text keys",
            masked - at["base"][1] > 0.7 * (at["base"][0] - at["base"][1]) > 0,
            f"With the filler hidden from attention and all distances kept, it reads {masked:.0%} after {far:,} "
            f"tokens.",
        ),
        (
            "pvm_keeps",
            "With the memory it keeps most of its short-range accuracy",
            at["pvm"][1] > 0.8 * at["pvm"][0],
            f"{at['pvm'][0]:.0%} after {short} tokens, {at['pvm'][1]:.0%} after {far:,} "
            f"({far / results['train_length']:.0f} times the training length).",
        ),
        (
            "pvm_ahead",
            "The memory is clearly ahead of both controls of the same size far beyond the training length",
            at["pvm"][1] > rival + 0.1,
            f"After {far:,} tokens: PVM {at['pvm'][1]:.0%}, LoRA {at['lora'][1]:.0%}, parallel MLP {at['mlp'][1]:.0%}.",
        ),
        (
            "gate_off_is_base",
            "With the gate off it is the base again",
            abs(causal["gate_off"] - base_there) < 1e-6,
            f"{causal['gate_off']:.1%} with the gate off, {base_there:.1%} for the base, on the same questions.",
        ),
        (
            "answers_follow_memory",
            "With another image in memory, the answers follow the other image",
            causal["swapped_follows"] > 0.7 and causal["swapped"] < 0.3,
            f"After {causal['length']:,} tokens, {causal['swapped_follows']:.0%} of the answers are right for the "
            f"image in memory and "
            f"{causal['swapped']:.0%} for the image that the language model was shown.",
        ),
    ]
    return [{"name": n, "claim": c, "held": bool(h), "measured": m} for n, c, h, m in entries]
