"""How the lab's learning rates were chosen, on validation glyphs: four tries for PVM and the MLP, seven for LoRA.

    python benchmarks/lab/sweep.py --bases DIR DIR --out benchmarks/results/lab-seeds/sweep.json

A try's figure of merit is its accuracy averaged over all lengths and bases; long lengths count, so a control that
extrapolates well is preferred to one that fits well.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from quiet import asked

from keepsight.lab.evaluation import accuracy, question_batches
from keepsight.lab.experiments import TrainPlan, train
from keepsight.lab.reference import load_reference

LENGTHS = (32, 256, 512, 1024)
ROWS = 48
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRIES = [
    *(("pvm", {"pvm_lr": lr}) for lr in (1.5e-3, 3e-3, 6e-3, 1.2e-2)),
    *(("mlp", {"mlp_lr": lr}) for lr in (7.5e-4, 1.5e-3, 3e-3, 6e-3)),
    *(("lora", {"lora_lr": lr}) for lr in (1e-4, 3e-4, 1e-3, 3e-3)),
    *(("lora", {"lora_lr": lr, "lora_targets": ALL_LINEAR}) for lr in (1e-4, 3e-4, 1e-3)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", type=Path, nargs="+", required=True)
    parser.add_argument("--first", type=int, default=0, help="skip so many tries")
    args = asked(parser)
    torch.set_num_threads(1)
    tries = []
    for method, change in TRIES[args.first :]:
        plan, by_base = replace(TrainPlan(), **change), {}
        begin = time.perf_counter()
        for seed, base in enumerate(args.bases):
            model, processor = load_reference(base)
            trained = train(model, processor, method, plan, seed)
            by_base[base.name] = {
                str(n): accuracy(trained.model, question_batches(processor, n, ROWS, seed, "validation")).as_dict()
                for n in LENGTHS
            }
        values = [entry["accuracy"] for result in by_base.values() for entry in result.values()]
        tries.append({"method": method, **change, "mean": round(sum(values) / len(values), 4), "by_base": by_base})
        print(f"{method:5} {change} mean {tries[-1]['mean']:.4f} {time.perf_counter() - begin:.0f} s", flush=True)
        record = {
            "what": __doc__.splitlines()[0],
            "split": "validation",
            "rows": ROWS,
            "plan": TrainPlan().as_dict(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tries": tries,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
