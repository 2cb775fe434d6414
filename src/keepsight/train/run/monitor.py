"""What a run shows of itself while it goes on: gates, the memory's gradients, speed, memory used."""

from __future__ import annotations

import time
from typing import Any

import torch

from keepsight.train.run.accounting import peak_memory
from keepsight.train.run.engines import whole

_MEMORY = ("pvm_blocks.", "vismem_memory.")


def gates_of(model: torch.nn.Module) -> dict[int, float]:
    """Decoder layer -> value of the active memory's gate."""
    found = {}
    for name, parameter in model.named_parameters():
        if "pvm_blocks." in name and name.endswith(".gate") and ".ref." not in name:  # TRL's copy, for a KL term
            found[int(name.partition(".layers.")[2].partition(".")[0])] = whole(parameter).float().item()
    return dict(sorted(found.items()))


def memory_gradient_norm(model: torch.nn.Module) -> float | None:
    """Norm of the gradients of all trained tensors of a memory; None where an engine keeps gradients to itself."""
    total, seen = 0.0, False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in name for part in _MEMORY) and parameter.grad is not None:
            total += float(whole(parameter.grad).float().pow(2).sum())
            seen = True
    return total**0.5 if seen else None


class Speed:
    """Tokens per second between one look and the next."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def __call__(self, tokens: float) -> float | None:
        """Tokens per second since the last call, given all tokens so far; None at first."""
        now, last = time.perf_counter(), self._last
        self._last = (now, tokens)
        if last is None or now <= last[0] or tokens < last[1]:
            return None
        return (tokens - last[1]) / (now - last[0])


def memory_used() -> dict[str, float]:
    """The most memory held so far, in GiB, under a name that says where."""
    size, device = peak_memory()
    return {"gpu_memory_gib" if device == "cuda" else "memory_gib": size / 2**30}


def line(values: dict[str, Any], step: int, total: int) -> list[str]:
    """What a logging step tells, in one line for a terminal, or none."""
    head = f"step {step:>{len(str(total))}}/{total}"
    if "eval_loss" in values or "eval_reward" in values:
        told = [
            f"{name.removeprefix('eval_')} {values[name]:.4f}"
            for name in ("eval_loss", "eval_reward")
            if name in values
        ]
        return [f"{head}  eval {'  '.join(told)}"]
    if "loss" not in values:
        return []
    words = [f"loss {values['loss']:.4f}"]
    for name, said, form in (
        ("blindfolded_loss", "blindfolded", ".4f"),
        ("sighted_loss", "sighted", ".4f"),
        ("reward", "reward", ".3f"),
        ("frac_reward_zero_std", "no signal", ".0%"),
        ("completions/mean_length", "length", ".0f"),
        ("completions/clipped_ratio", "cut off", ".0%"),
        ("kl", "kl", ".4f"),
        ("mean_token_accuracy", "token accuracy", ".3f"),
        ("learning_rate", "lr", ".2e"),
        ("memory_grad_norm", "memory grad", ".2e"),
        ("num_tokens", "tokens", ",.0f"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("gpu_memory_gib", "GPU GiB", ".1f"),
    ):
        if values.get(name) is not None and not (name == "mean_token_accuracy" and "reward" in values):
            words.append(f"{said} {values[name]:{form}}")
    gates = " ".join(f"{name.partition('/')[2]}:{v:+.4f}" for name, v in values.items() if name.startswith("gate/"))
    return [f"{head}  {'  '.join(words)}{f'  gates {gates}' if gates else ''}"]
