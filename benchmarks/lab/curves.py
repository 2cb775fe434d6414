"""Why seeds differ: loss, gates and quality of the look-up along training, on validation glyphs.

    python benchmarks/lab/curves.py --seeds 0 1 --shares 0 0.5 --bases DIR --out benchmarks/results/lab-curves

Trains the demo's PVM with and without a blindfolded share of the steps behind the warm-up, and reads in between, 2,048
tokens after the image: with the memory (`far`), with another image's memory and scored for that one (`follows`), and
under the blindfold (`far_blind`); and 64 tokens after it under the blindfold (`near_blind`).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from quiet import asked

from keepsight.lab import evaluation
from keepsight.lab.demo.methods import DemoSettings
from keepsight.lab.demo.run import conditions
from keepsight.lab.experiments import TrainStep, train
from keepsight.lab.pretraining import one_thread
from keepsight.lab.reference import load_reference
from keepsight.pvm import replace_memory
from keepsight.train.pvm.blindfold import blindfold

FAR, NEAR, ROWS, EVERY = 2048, 64, 16, 40


def look_up(model: Any, processor: Any, seed: int) -> dict[str, float]:
    """How good the look-up is now; validation glyphs."""
    far = evaluation.question_batches(processor, FAR, ROWS, seed, "validation")
    near = evaluation.question_batches(processor, NEAR, 4 * ROWS, seed, "validation")
    found = {"far": evaluation.accuracy(model, far)}
    with replace_memory(lambda embeds, valid: embeds.roll(1, 0)):
        found["follows"] = evaluation.score([evaluation.answers(model, batch) for batch in far], far, roll=1)
    with blindfold(model):
        found |= {"far_blind": evaluation.accuracy(model, far), "near_blind": evaluation.accuracy(model, near)}
    return {name: round(score.accuracy, 4) for name, score in found.items()}


def curve(seed: int, share: float, base: Path | None) -> dict[str, Any]:
    """One run with all its steps and looks."""
    model, processor = load_reference(base)
    plan = replace(DemoSettings().plan, blindfold_share=share)
    steps: list[list[float]] = []
    looks: dict[int, dict[str, float]] = {}

    def watch(step: TrainStep) -> None:
        steps.append([step.done, int(step.blindfolded), round(step.loss, 4), round(step.accuracy, 4), *step.gates])
        if step.done % EVERY == 0:
            looks[step.done] = look_up(model, processor, seed)
            print(f"seed {seed} share {share} step {step.done} gates {step.gates} {looks[step.done]}", flush=True)

    begin = time.process_time()
    with one_thread():
        train(model, processor, "pvm", plan, seed, watch=watch)
    return {
        "seed": seed,
        "split": "validation",
        "rows": {"far": ROWS, "near": 4 * ROWS, "answers_per_row": evaluation.SCORED},
        "plan": plan.as_dict(),
        "columns": ["step", "blindfolded", "loss", "accuracy", *(f"gate of layer {n}" for n in plan.layers)],
        "steps": steps,
        "looks": looks,
        "cpu_seconds": round(time.process_time() - begin, 1),
        "conditions": conditions(0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--bases", type=Path, help="folder of pretrained bases, as benchmarks/lab/seeds.py keeps them")
    args = asked(parser)
    for seed in args.seeds:
        for share in args.shares:
            found = curve(seed, share, args.bases / f"base-{seed}" if seed else None)
            name = f"seed-{seed}-share-{round(100 * share)}.json"
            (args.out / name).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
