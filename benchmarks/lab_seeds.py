"""The demo's experiment over several bases: each seed pretrains its own base, trains its own adapters, draws its own
test images.

    python benchmarks/lab_seeds.py --seeds 0 1 2 --out benchmarks/results/lab-seeds

Seed 0 uses the base that ships with keepsight (which is what pretraining with seed 0 gives). Writes `seed-N.json`,
each like the demo's results.json, and `summary.json`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers

from keepsight.lab.demo import assemble, conditions
from keepsight.lab.jobs import Settings
from keepsight.lab.pretraining import PRETRAINING_RECORD, PretrainConfig, pretrain
from keepsight.lab.reference import reference_path
from keepsight.lab.workers import run_jobs

METHODS = ("base", "pvm", "lora", "mlp", "pvm_plain", "lora_long")


def summarise(folder: Path) -> dict[str, object]:
    """Mean, lowest and highest accuracy over the seeds in `folder`, by method and length; and every claim that did not
    hold."""
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed-*.json"))}
    first = next(iter(runs.values()))

    def over(values: list[float]) -> dict[str, float]:
        return {"mean": round(sum(values) / len(values), 4), "min": min(values), "max": max(values)}

    def by_length(method: str, key: str = "accuracy_by_length") -> dict[str, dict[str, float]]:
        return {str(n): over([run[method][key][str(n)]["accuracy"] for run in runs.values()]) for n in first["lengths"]}

    causal = ("on", "gate_off", "noise", "swapped", "swapped_follows")
    return {
        "seeds": [run["seed"] for run in runs.values()],
        "train_length": first["train_length"],
        "accuracy_by_length": {method: by_length(method) for method in METHODS if method in first},
        "masked_filler_accuracy_by_length": by_length("base", "masked_filler_accuracy_by_length"),
        "causal": {key: over([run["pvm"]["causal"][key] for run in runs.values()]) for key in causal},
        "did_not_hold": {
            name: [entry["name"] for entry in run["verdict"] if not entry["held"]] for name, run in runs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bases", type=Path, help="keep pretrained bases in this folder, and use those that are there")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        for seed in args.seeds:
            base = None
            if seed:
                base = (args.bases or Path(scratch)) / f"base-{seed}"
                if not (base / PRETRAINING_RECORD).is_file():
                    pretrain(base, PretrainConfig(seed=seed))
            settings = replace(Settings(), seed=seed, base=base)
            begin = time.perf_counter()
            jobs = run_jobs(
                settings,
                Path(scratch) / str(seed),
                args.workers,
                on_progress=lambda *_: None,
                on_done=lambda name, result: print(
                    name, {n: entry["accuracy"] for n, entry in result["accuracy_by_length"].items()}, flush=True
                ),
            )
            results = assemble(jobs, settings, quick=False)
            results["seconds"] = round(time.perf_counter() - begin, 1)
            results["conditions"] = conditions(args.workers)
            folder = reference_path() if base is None else base
            results["pretraining"] = json.loads((folder / PRETRAINING_RECORD).read_text(encoding="utf-8"))
            (args.out / f"seed-{seed}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "summary.json").write_text(json.dumps(summarise(args.out), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
