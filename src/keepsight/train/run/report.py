"""Log lines of a run, its report, and the model card of its result."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keepsight.card import names_base
from keepsight.data.check import CheckedData
from keepsight.train.run.accounting import RunCost, peak_memory
from keepsight.train.run.engines import whole
from keepsight.train.run.flops import parameter_count

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
        ("language_divergence", "language", ".4f"),
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


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did, all measured in it.

    Attributes:
        output_dir: where the result is.
        steps: optimiser steps in all, those before a resume included.
        resumed_from: step of the checkpoint the run went on from, or None.
        trainable: trainable parameters.
        frozen: parameters that were not trained.
        untouched: frozen tensors, of none of which a bit changed; None where weights are partitioned over processes.
        first, last: what was logged at the first and the last logged step.
        tokens: tokens read in all steps.
        seconds: of the training loop in this session.
        data: what was checked, skipped and kept.
        metrics: evaluation after the last step, where there is evaluation data: "eval_loss", "eval_reward", ...
        cost: of the run, its earlier sessions included.
        gates: decoder layer -> final gate, of a PVM.
        comparison: with its controls, where any were asked for (a `keepsight.train.run.controls.Comparison`).
    """

    output_dir: Path
    steps: int
    resumed_from: int | None
    trainable: int
    frozen: int
    untouched: int | None
    first: dict[str, float]
    last: dict[str, float]
    tokens: int
    seconds: float
    data: CheckedData
    metrics: dict[str, float]
    cost: RunCost
    gates: dict[int, float] = field(default_factory=dict)
    comparison: Any = None

    @property
    def base_unchanged(self) -> bool | None:
        """True: no bit of any frozen tensor changed (else there is no report); None where that was not checked."""
        return None if self.untouched is None else True

    @property
    def first_loss(self) -> float | None:
        """The first logged training loss."""
        return self.first.get("loss")

    @property
    def last_loss(self) -> float | None:
        """The last logged training loss."""
        return self.last.get("loss")

    @property
    def first_reward(self) -> float | None:
        """The first logged mean reward; None in supervised training."""
        return self.first.get("reward")

    @property
    def last_reward(self) -> float | None:
        """The last logged mean reward; None in supervised training."""
        return self.last.get("reward")


def memory_lines(trainer: Any) -> list[tuple[str, str]]:
    """Rows of a result's README that tell of its memory; none if it has none."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = getattr(model, "peft_config", {}).get("default")
    if config is None or config.peft_type != "PVM":
        return []
    gates = ", ".join(f"layer {layer}: {gate:+.4f}" for layer, gate in gates_of(model).items())
    kind = "PVM" if config.branch == "memory" else "a parallel feed-forward branch, the control of PVM"
    return [
        ("method", f"{kind} (arXiv 2605.00814), {'causal' if config.causal else 'published'} rule"),
        ("layers", ", ".join(map(str, config.layers))),
        ("latent width", str(config.width)),
        ("gates", gates),
    ]


def base_lines(settings: Any) -> list[tuple[str, str]]:
    """Rows of a result's README that tell how the base was held in training, where not as it is stored."""
    return [("base in training", "four bits (NF4), not in the paper")] if settings.load_in_4bit else []


def mix_lines(data: CheckedData) -> list[tuple[str, str]]:
    """Rows of a result's README that tell in what shares several datasets were learned from."""
    mix = data.mix(full=False)
    return [] if mix is None else [("data", mix)]


def result_card(
    base: str,
    title: str,
    rows: list[tuple[str, str]],
    trainer: Any,
    tags: str = "keepsight, pvm, vision-language",
    library: str | None = None,
) -> str:
    """The README of a result, which is also its card on the hub.

    Args:
        base: that it is to be put on.
        title: of the card.
        rows: of its table, besides the number of trained parameters.
        trainer: what trained it.
        tags: for the hub.
        library: that loads it; default: PEFT for a model with an adapter.
    """
    count = sum(parameter_count(p) for p in trainer.model.parameters() if p.requires_grad)
    table = "\n".join(f"| {name} | {value} |" for name, value in [*rows, ("trained parameters", f"{count:,}")])
    if library is None:
        library = "peft" if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config") else "transformers"
    return f"""---
{names_base(base)}library_name: {library}
tags: [{tags}]
---

# {title}

Made with keepsight.

```python
import keepsight

model, processor = keepsight.load("this folder or its hub id")
```

| | |
|---|---|
{table}
"""
