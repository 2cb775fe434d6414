"""Cells of the study of *when* to invoke: every policy on the same enumerated scripts."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from keepsight.lab.reference import REFERENCE_NAME
from keepsight.lab.study.study import Bench, Measured
from keepsight.vismem import VisMemBranch, add_memory_tokens
from studies.pvm.cells import narration_base
from studies.vismem.cells import name_of, share_of, with_memory
from studies.vismem.invocation import (
    ACTIONS,
    BLOCKS,
    BUDGET,
    SCORED_FACTS,
    Bank,
    Choose,
    InvocationPlan,
    Invoker,
    at_random,
    best_clock,
    best_schedule,
    by_clock,
    by_model,
    by_schedule,
    index_of,
    make_bank,
    play,
    stage_two,
)
from studies.vismem.valuing import best_values, by_value

BANK = "bank.safetensors"
SAMPLES = 32
"""Plays per script of a policy that chooses by chance."""
AGES = ((0, 250), (250, 500), (500, 1000), (1000, 4000))
"""Generated tokens before a decision, for the rates of invocation."""


def banks_of(bench: Bench, settings: dict[str, Any], seed: int) -> tuple[Any, Bank, Bank]:
    """`(model, bank of train scripts, bank of test scripts)`; the banks are kept."""
    model, processor, _ = with_memory(bench, settings, seed)
    scripts = settings["scripts"]

    def make(split: Any, layouts: int, begin: float) -> Bank:
        key = {"plan": settings.get("plan", {}), "split": split, **scripts, "layouts": layouts}

        def write(folder: Path) -> None:
            rng = np.random.default_rng([seed, 9000 + ("train", "validation", "test").index(split)])
            progress = share_of(bench, f"every outcome of the {split} scripts", begin, 0.3)
            bank = make_bank(model, processor, layouts, scripts["rows"], scripts["max_gap"], split, rng, progress)
            bank.save(folder / BANK)

        return Bank.load(bench.keep(name_of("bank", settings.get("config", {}), key, seed), write) / BANK)

    learn = make("train", scripts["train"], 0.3)
    return model, learn, make(settings["split"], scripts["test"], 0.6)


def when_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """One policy on the test scripts.

    Settings: `policy`: "never", "always", "random" (`probability`), "learned" (`invocation`: an `InvocationPlan`),
    "clock", "schedule", "hindsight"; `types` for the first three (1 short, 2 long); `scripts`: `train` and `test`
    layouts of `rows` scripts each, filler up to `max_gap`; and what `with_memory` takes.

    Values:
        `score`; `invocations` per script; `long`: the share of long ones; `rate_<age>`: share of decisions of an age
        that invoke; for "learned" `sampled`, the score when actions are sampled and not the most probable.
    """
    model, learn, test = banks_of(bench, settings, seed)
    policy, facts = settings["policy"], dict[str, Any]()
    draw = torch.Generator().manual_seed(6000 + seed)
    values: dict[str, float] = {}
    types = tuple(settings.get("types", (1, 2)))
    choose: Choose
    if policy == "hindsight":
        best = test.scores.argmax(-1)
        actions, scripts = torch.tensor(ACTIONS)[best], torch.arange(len(best))
        return Measured(_summary(test, scripts, actions), _answers(test))
    if policy == "learned":
        plan = InvocationPlan(**settings.get("invocation", {}))
        facts = {"stage_two": stage_two(model, learn, plan, seed), "invocation": asdict(plan)}
        sampled = _summary(test, *_played(test, by_model(test, Invoker.of(model), draw), SAMPLES))
        values = {"sampled": sampled["score"], "sampled_invocations": sampled["invocations"]}
        choose = by_model(test, Invoker.of(model), None)
    elif policy == "clock":
        threshold, kind = best_clock(learn)
        facts = {"threshold": threshold, "kind": kind}
        choose = by_clock(test, threshold, kind)
    elif policy == "value":
        fitted, penalty = best_values(learn, settings["states"])
        facts = {"penalty": penalty}
        choose = by_value(test, fitted)
    elif policy == "schedule":
        facts = {"schedule": list(best_schedule(learn))}
        choose = by_schedule(best_schedule(learn))
    else:
        probability = {"never": 0.0, "always": 1.0}.get(policy, settings.get("probability", 0.0))
        choose = at_random(probability, types, draw)
    chance = policy == "random" or (policy == "always" and len(types) > 1)
    values |= _summary(test, *_played(test, choose, SAMPLES if chance else 1))
    return Measured(values, _answers(test), facts)


def _played(bank: Bank, choose: Choose, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    scripts = torch.arange(len(bank.scores)).repeat_interleave(times)
    return scripts, play(bank, scripts, choose)


def _summary(bank: Bank, scripts: torch.Tensor, actions: torch.Tensor) -> dict[str, float]:
    invoked = actions > 0
    values = {
        "score": float(bank.scores[scripts, index_of(actions)].mean()),
        "invocations": float(invoked.sum(-1).float().mean()),
    }
    if invoked.any():
        values["long"] = float((actions == 2).sum() / invoked.sum())
    times = bank.times[scripts]
    for low, high in AGES:
        there = (times >= low) & (times < high)
        if there.any():
            values[f"rate_{low}"] = float(invoked[there].float().mean())
    return values


def _answers(bank: Bank) -> int:
    return len(bank.scores) * BLOCKS * SCORED_FACTS


@lru_cache(maxsize=1)
def labels() -> dict[str, str]:
    """Ages for readers."""
    return {f"rate_{low}": f"invoked at {low:,}-{high:,}" for low, high in AGES}


def train_shipped(bench: Bench, settings: dict[str, Any], out: Path, seed: int = 0) -> dict[str, float]:
    """Make the memory that ships as `keepsight/reference-vismem`: warm start, stage I, stage II by the paper's reward.

    Weights are rounded to float16 on disk. A sequence may hold as many memories as stage II's scripts.

    Returns:
        Stage II's log.
    """
    model, learn, _ = banks_of(bench, settings, seed)
    _, processor = narration_base(bench, seed)
    log = stage_two(model, learn, InvocationPlan(), seed)
    config = VisMemBranch.of(model).config
    config.max_invocations, config.inference_mode = BUDGET, True
    config.base_model_name_or_path = REFERENCE_NAME
    add_memory_tokens(processor, model)
    model.save_pretrained(str(out), save_embedding_layers=False)
    processor.save_pretrained(str(out))
    weights = out / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(str(weights)).items()}, str(weights))
    weights.chmod(0o644)  # safetensors writes for the owner alone
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    return log
