"""Cells of VisMem's studies: train a memory (once per seed and plan, kept), then read with it in many ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from keepsight.lab.evaluation import SCORED, question_batches, score
from keepsight.lab.experiments import train
from keepsight.lab.narration import Narrations
from keepsight.lab.study.study import Bench, Measured
from keepsight.vismem import VisMemBranch
from studies.pvm.cells import narration_base
from studies.pvm.cells import plan_of as pvm_plan
from studies.vismem.reading import Reading, answers_with_plan, attach_vismem, decision_column, lab_config, noise_like
from studies.vismem.training import TrainingPlan, stage_one, warm_start

FACTS = "facts.json"


def plan_of(settings: dict[str, Any]) -> TrainingPlan:
    """The training plan that a cell's settings describe."""
    given: dict[str, Any] = settings.get("plan", {})
    plan: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return TrainingPlan(**plan)


def with_memory(bench: Bench, settings: dict[str, Any], seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """The seed's base with its VisMem as `settings["plan"]` and `settings["config"]` say, trained if it is not there.

    Settings `untrained` gives a memory as it is attached. The warm start is kept by itself, so that plans which differ
    in stage I share it. With settings `pvm` (a plan of `keepsight.lab.experiments`), a PVM trained by that plan is put
    beside it; neither was trained with the other.

    Returns:
        `(model, processor, facts about its training)`.
    """
    config, plan = settings.get("config", {}), plan_of(settings)
    model, processor = narration_base(bench, seed)
    if settings.get("untrained"):
        return attach_vismem(model, processor, seed, lab_config(**config)), processor, {}
    warm = {k: v for k, v in plan.as_dict().items() if k.startswith("warm_") or k == "kinds"}

    def make_warm(folder: Path) -> None:
        base, own = narration_base(bench, seed)
        memory = attach_vismem(base, own, seed, lab_config(**config))
        facts = {}
        if plan.warm_steps:
            facts = warm_start(memory, own, plan, seed, share_of(bench, "warm start", 0.0, 0.4))
        _keep(memory, folder, facts)

    def make(folder: Path) -> None:
        base, own = narration_base(bench, seed)
        start = bench.keep(name_of("warm", config, warm, seed), make_warm)
        memory = _load(base, start, trainable=True)
        facts = json.loads((start / FACTS).read_text(encoding="utf-8"))
        if plan.steps:
            facts |= stage_one(memory, own, plan, seed, share_of(bench, "stage I", 0.4, 0.5))
        _keep(memory, folder, facts)

    folder = bench.keep(name_of("memory", config, plan.as_dict(), seed), make)
    memory = _load(model, folder)
    if "pvm" in settings:
        put_pvm_beside(bench, settings["pvm"], model, seed)
    return memory, processor, json.loads((folder / FACTS).read_text(encoding="utf-8"))


def put_pvm_beside(bench: Bench, plan: dict[str, Any], model: Any, seed: int) -> Any:
    """Train a PVM on the seed's base, if it is not there, and put it on `model`, another copy of that base."""

    def make(folder: Path) -> None:
        progress = share_of(bench, "training a PVM", 0.0, 0.8)
        trained = train(*narration_base(bench, seed), "pvm", pvm_plan({"plan": plan}), seed, progress)
        trained.model.save_pretrained(str(folder), save_embedding_layers=False)

    folder = bench.keep(name_of("pvm", {}, plan, seed), make)
    return PeftModel.from_pretrained(model, str(folder), adapter_name="pvm").eval()


def read_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Accuracy at several lengths with one memory before the scored facts.

    Settings: `lengths`, `rows`, `split`; `plan`, `config` of the memory; `kind`; `content`: "own" (as formed), "other"
    (another image's), "noise" (Gaussian vectors of its norms), "embeddings" (the image's visual embeddings again),
    "embeddings_other", "embeddings_noise", "none"; `text_states`: read with this cap on H instead of the trained one.

    Values:
        by length, `mean`, and for another image's latents `follows_<length>`: the share of answers that are right for
        the other image.
    """
    model, processor, facts = with_memory(bench, settings, seed)
    if "text_states" in settings:
        VisMemBranch.of(model).config.max_text_states = settings["text_states"]
    content, kind = settings["content"], settings.get("kind", "long")
    other = content.endswith("other")
    generator = torch.Generator().manual_seed(
        seed + 100 * ["embeddings_noise", "short", "long"].index(content if content == "embeddings_noise" else kind)
    )
    values, follows = {}, {}
    for length in settings["lengths"]:
        bench.report(f"reading at {length:,} tokens", 0.9)
        batches = question_batches(processor, length, settings["rows"], seed, settings["split"])
        found = [_read(model, batch, kind, content, generator) for batch in batches]
        values[str(length)] = score(found, batches).accuracy
        if other:
            follows[f"follows_{length}"] = score(found, batches, roll=1).accuracy
    values["mean"] = float(np.mean(list(values.values())))
    return Measured(values | follows, settings["rows"] * SCORED, facts | {"parameters": _size(model)})


@torch.no_grad()
def _read(model: Any, batch: Narrations, kind: str, content: str, generator: torch.Generator) -> torch.Tensor:
    reading = Reading(model, batch, decision_column(batch))
    if content != "none":
        reading.invoke(kind)
        latents = reading.embeddings if content.startswith("embeddings") else reading.form(kind)
        if content.endswith("other"):
            latents = latents.roll(1, 0)
        elif content.endswith("noise"):
            latents = noise_like(latents, generator)
        reading.splice(kind, latents)
    return reading.predict(batch.answers[-SCORED:]).argmax(-1)


def policy_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Accuracy at several lengths with memories at the full stops behind all facts, at random.

    Settings: as above, and `probability` per full stop, `types` that are invoked, each equally likely. Rows that are
    read together share their plan; plans are drawn anew for every eight rows.
    """
    model, processor, facts = with_memory(bench, settings, seed)
    values, counts = {}, []
    for length in settings["lengths"]:
        bench.report(f"reading at {length:,} tokens", 0.9)
        rng = np.random.default_rng([seed, length, 8000])
        budget = 8 * (length + 32)
        batches = question_batches(processor, length, settings["rows"], seed, settings["split"], budget=budget)
        found = []
        for batch in batches:
            plan = {
                fact: str(rng.choice(settings["types"]))
                for fact in range(1, len(batch.answers))
                if rng.random() < settings["probability"]
            }
            counts.append(len(plan))
            with torch.no_grad():
                found.append(answers_with_plan(Reading(model, batch), plan))
        values[str(length)] = score(found, batches).accuracy
    values["mean"] = float(np.mean(list(values.values())))
    return Measured(values | {"invocations": float(np.mean(counts))}, settings["rows"] * SCORED, facts)


def share_of(bench: Bench, what: str, begin: float, share: float) -> Callable[[int, int], None]:
    """A progress callback that fills `share` of a cell's bar, from `begin`."""
    return lambda done, total: bench.report(f"{what} {done}/{total}", begin + share * done / total)


def name_of(what: str, config: dict[str, Any], plan: dict[str, Any], seed: int) -> str:
    """A folder's name that says what is in it."""
    text = json.dumps([config, plan], sort_keys=True)
    return f"vismem/{what}-{hashlib.sha256(text.encode()).hexdigest()[:12]}-{seed}"


def _keep(model: Any, folder: Path, facts: dict[str, Any]) -> None:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _load(model: Any, folder: Path, trainable: bool = False) -> Any:
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).eval()


def _size(model: Any) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if "vismem_memory" in n)
