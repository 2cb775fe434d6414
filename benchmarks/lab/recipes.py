"""Do the defaults of `keepsight train pvm` do what the demo shows? The command's own training, on its narrations.

    python benchmarks/lab/recipes.py --seeds 0 1 2 --out benchmarks/results/lab-recipes

Unlike the demo, this knows nothing of the laboratory: the narrations are a file of images and conversations like any
other, shuffled, of the full training length from the first step on, and every word of an answer counts in the loss.
Three runs of each seed differ in nothing but the recipe: the defaults, the defaults without the blindfold, and
`--recipe paper`. All have the shipped base, the demo's layers, width and learning rate, and as many steps. Accuracy is
read on validation glyphs, by length, as the demo does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from quiet import asked

import keepsight
from keepsight.lab import evaluation
from keepsight.lab.demo.methods import DemoSettings
from keepsight.lab.demo.run import conditions
from keepsight.lab.narration import VOCABULARY, make_narrations
from keepsight.lab.pretraining import one_thread
from keepsight.lab.reference import load_reference
from keepsight.train.pvm.sft import SftSettings, train_pvm

BASE = "keepsight/reference"
LENGTHS, ROWS = (32, 256, 1024, 2048), 32
RECIPES: dict[str, tuple[bool, dict[str, Any]]] = {  # causal, and what of the settings differs
    "default": (True, {}),
    "without the blindfold": (True, {"blindfold_steps": 0}),
    "paper": (False, {"blindfold_steps": 0, "gate_lr_multiplier": 1.0}),
}


def write_data(folder: Path, processor: Any, steps: int, seed: int) -> Path:
    """The demo's narrations of training length, as a file of conversations."""
    plan, rng = DemoSettings().plan, np.random.default_rng([seed, 5000])
    with (folder / "train.jsonl").open("w") as file:
        for step in range(steps):
            gaps = rng.integers(0, plan.max_gap + 1, plan.facts).tolist()
            batch = make_narrations(processor, gaps, plan.batch, "train", rng)
            for row, image in enumerate(batch.images):
                name = f"{step}-{row}.png"
                image.save(folder / name)
                words = " ".join(VOCABULARY[token] for token in batch.input_ids[row, batch.start : -1].tolist())
                messages = [{"role": "user", "content": "describe"}, {"role": "assistant", "content": words}]
                file.write(json.dumps({"images": [name], "messages": messages}) + "\n")
    return folder / "train.jsonl"


def run(data: Path, folder: Path, name: str, steps: int, seed: int) -> dict[str, Any]:
    """Train by one recipe, and read."""
    causal, changes = RECIPES[name]
    plan = DemoSettings().plan
    fixed = {"max_steps": steps, "batch_size": plan.batch, "grad_accum": 1, "lr": plan.pvm_lr, "warmup_ratio": 0.03}
    settings = SftSettings(**fixed, device="cpu", save_steps=steps, seed=seed, **changes)
    pvm = keepsight.PvmConfig(layers=list(plan.layers), width=plan.width, causal=causal)
    report = train_pvm(BASE, data, folder, pvm=pvm, settings=settings, check="quick")
    model, processor = keepsight.load(folder, device="cpu")
    found = {
        str(length): evaluation.accuracy(
            model, evaluation.question_batches(processor, length, ROWS, seed, "validation")
        ).as_dict()
        for length in LENGTHS
    }
    return {"accuracy_by_length": found, "gates": {str(k): round(v, 4) for k, v in report.gates.items()}}


def main(argv: list[str] | None = None) -> None:
    """One file per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=320)
    args = asked(parser, argv)
    _, processor = load_reference()
    for seed in args.seeds:
        begin = time.process_time()
        results: dict[str, Any] = {"seed": seed, "steps": args.steps, "split": "validation"}
        with tempfile.TemporaryDirectory() as folder, one_thread():
            data = write_data(Path(folder), processor, args.steps, seed)
            for index, name in enumerate(RECIPES):
                results[name] = run(data, Path(folder) / str(index), name, args.steps, seed)
                print(f"seed {seed}, {name}: {results[name]}", flush=True)
        results |= {"cpu_seconds": round(time.process_time() - begin), "conditions": conditions(0)}
        (args.out / f"seed-{seed}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
