"""The demo's experiment over many seeds: each pretrains its own base, trains its own adapters, draws its own images.

    python benchmarks/lab/seeds.py --seeds 0 1 2 3 4 5 6 7 8 9 --keep DIR --out benchmarks/results/lab-seeds

Seed 0 uses the base that ships with keepsight (which is what pretraining with seed 0 gives). Writes `seed-N.json`, each
like the demo's results.json, and after every job `summary.json`. Results that stand there already are kept: a run may
be stopped and goes on; `--again pvm` measures a method anew.

Choices are made on validation glyphs: `--validation` trains PVM, reads with it on those alone and stops there. Test
glyphs are read by a later run without it, with the adapters that were kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from quiet import asked

import keepsight
from keepsight.lab import evaluation
from keepsight.lab.demo.methods import DemoSettings, measure, read_method, training_facts
from keepsight.lab.demo.run import assemble, conditions
from keepsight.lab.experiments import train
from keepsight.lab.pretraining import PRETRAINING_RECORD, PretrainConfig, one_thread, pretrain
from keepsight.lab.reference import load_reference, reference_path

METHODS = ("base", "pvm", "lora", "mlp", "pvm_plain", "pvm_paper", "lora_long")
PAPER = {"pvm_lr": 1e-4, "gate_factor": 1.0, "causal": False, "blindfold_share": 0.0}
"""What the paper trains a memory with, as far as it can be taken over: one learning rate for everything, gates
included, and the published rule. Data, steps and batches are the lab's, as for all methods."""
CAUSAL = ("on", "gate_off", "noise", "swapped", "swapped_follows")


def base_of(seed: int, keep: Path) -> Path | None:
    """The seed's base, pretrained if it is not there yet; None for the shipped one."""
    if seed == 0:
        return None
    folder = keep / f"base-{seed}"
    if not (folder / PRETRAINING_RECORD).is_file():
        pretrain(folder, PretrainConfig(seed=seed))
    return folder


def trained_pvm(settings: DemoSettings, keep: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter of the settings' seed and what training says of itself, trained if it is not there yet."""
    folder = keep / f"pvm-{settings.seed}"
    record = folder / "training.json"
    plan = json.loads(json.dumps(settings.plan.as_dict()))
    if record.is_file() and (found := json.loads(record.read_text(encoding="utf-8")))["plan"] == plan:
        return folder, found["facts"]
    with one_thread():
        model, processor = load_reference(settings.base)
        trained = train(model, processor, "pvm", settings.plan, settings.seed)
        far = settings.lengths[-1]
        batches = evaluation.question_batches(processor, far, settings.rows, settings.seed, "validation")
        facts = training_facts(trained, settings.plan)
        facts["validation_accuracy_by_length"] = {str(far): evaluation.accuracy(trained.model, batches).as_dict()}
    trained.model.save_pretrained(str(folder), save_embedding_layers=False)
    record.write_text(json.dumps({"plan": plan, "facts": facts}), encoding="utf-8")
    return folder, facts


def measured(name: str, settings: DemoSettings, keep: Path) -> dict[str, Any]:
    """One job's results on test glyphs."""
    if name == "pvm":
        folder, facts = trained_pvm(settings, keep)
        with one_thread():
            result = facts | read_method(name, *keepsight.load(folder), settings, lambda *_: None)
    elif name == "pvm_paper":
        paper = replace(settings, plan=replace(settings.plan, **PAPER))
        with one_thread():
            result = measure("pvm_plain", paper, keep, lambda *_: None) | {"plan": PAPER}
    else:
        with one_thread():
            result = measure(name, settings, keep, lambda *_: None)
    return result | {"conditions": conditions(0)}


def summarise(folder: Path) -> dict[str, Any]:
    """Mean, spread, lowest and highest accuracy over seeds, by method and length; and every claim that did not hold."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed-*.json"))]
    lengths = [str(n) for n in runs[0]["lengths"]]

    def over(values: list[float]) -> dict[str, Any]:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found = {"mean": statistics.mean(values), "sd": spread, "min": min(values), "max": max(values)}
        return {name: round(value, 4) for name, value in found.items()} | {"seeds": len(values)}

    def by_length(method: str, key: str = "accuracy_by_length") -> dict[str, Any]:
        there = [run[method][key] for run in runs if method in run]
        return {n: over([entry[n]["accuracy"] for entry in there]) for n in lengths}

    there = [method for method in METHODS if any(method in run for run in runs)]
    summary = {
        "seeds": {method: [run["seed"] for run in runs if method in run] for method in there},
        "train_length": runs[0]["train_length"],
        "plan": runs[0]["plan"],
        "accuracy_by_length": {method: by_length(method) for method in there},
    }
    if "base" in there:
        summary["masked_filler_accuracy_by_length"] = by_length("base", "masked_filler_accuracy_by_length")
    if "pvm" in there:
        causal = [run["pvm"]["causal"] for run in runs if "pvm" in run]
        summary["causal"] = {"length": causal[0]["length"]} | {n: over([c[n] for c in causal]) for n in CAUSAL}
    summary["did_not_hold"] = {
        f"seed-{run['seed']}": [entry["name"] for entry in run["verdict"] if not entry["held"]]
        for run in runs
        if "verdict" in run
    }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--again", nargs="+", default=(), choices=METHODS, help="measure these anew")
    parser.add_argument("--validation", action="store_true", help="train PVM, read on validation glyphs, stop there")
    parser.add_argument("--keep", type=Path, required=True, help="folder for bases and adapters, used if there")
    args = asked(parser)
    for name in ("pvm",) if args.validation else args.methods:
        for seed in args.seeds:
            settings = replace(DemoSettings(), seed=seed, base=base_of(seed, args.keep))
            if args.validation:
                _, facts = trained_pvm(settings, args.keep)
                print(f"seed {seed} on validation glyphs: {facts}", flush=True)
                continue
            file = args.out / f"seed-{seed}.json"
            former = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            jobs = {method: former[method] for method in METHODS if method in former}
            if name in jobs and name not in args.again:
                continue
            jobs[name] = measured(name, settings, args.keep)
            print(
                seed, name, {n: entry["accuracy"] for n, entry in jobs[name]["accuracy_by_length"].items()}, flush=True
            )
            pretraining = (settings.base or reference_path()) / PRETRAINING_RECORD
            results = assemble(jobs, settings, quick=False)
            results |= {method: jobs[method] for method in METHODS if method in jobs}  # the demo has no `pvm_paper`
            results["conditions"] = former.get("conditions", jobs[name]["conditions"])  # of jobs that name none
            results["pretraining"] = json.loads(pretraining.read_text(encoding="utf-8"))
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            summary = summarise(args.out)
            (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print("for the demo's report: python benchmarks/lab/draw_seeds.py")


if __name__ == "__main__":
    main()
