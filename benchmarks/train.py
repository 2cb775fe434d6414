"""What training a memory costs per step, beside what one would do otherwise.

sft    one optimiser step of PVM-SFT, of PEFT LoRA with as many parameters, and of the parallel-MLP control: the same
       frozen base, the same batch, TRL's loss head, AdamW; in turn, in an order that rotates from round to round.
grpo   one step of VisMem's stage I, and one of TRL's stock GRPOTrainer on a LoRA: the same base, prompts, group, reward
       and number of written words, two memories per trajectory.

Weights are random and images are noise: what is learned differs, what it costs does not.

    python benchmarks/train.py sft --shape 8b --visual-tokens 1024 --text-tokens 1024     # needs a GPU with 40 GB
    python benchmarks/train.py grpo --shape 7b                                            # needs a GPU with 80 GB
    python benchmarks/train.py sft --quick                                                # smoke run, seconds

Raw samples and conditions go to benchmarks/results/train/NAME.json; benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from shared.measuring import conditions, make_console, place, spread

from keepsight.errors import KeepsightWarning

RESULTS = Path(__file__).parent / "results" / "train"
_SHARED = (
    "src/keepsight/backbone",
    *(f"benchmarks/{name}.py" for name in ("train", "training/stepping", "shared/shapes", "shared/measuring")),
)
MEASURED = {
    "sft": (*_SHARED, "benchmarks/training/sft.py", "src/keepsight/pvm", "src/keepsight/train/run/learner.py"),
    "grpo": (
        *_SHARED,
        "benchmarks/training/grpo.py",
        "src/keepsight/vismem",
        *(
            f"src/keepsight/train/{name}.py"
            for name in (
                "grpo",
                "rollout",
                "vismem_prefix",
                "vismem_replay",
                "vismem_stage",
                "vismem_stages",
                "vismem_trainer",
                "vismem_update",
            )
        ),
    ),
}


def show(report: dict[str, Any]) -> None:
    """The table of one result file."""
    found = report["conditions"]
    table = Table(title=f"{report['kind']}, {report['settings']['shape']}, {found['device']}", title_justify="left")
    for column in (
        "variant",
        "trained",
        "ms / step",
        f"x {report['reference']}",
        "peak memory",
        f"x {report['reference']}",
    ):
        table.add_column(column, justify="right")
    summary = report["summary"]
    for name, row in summary.items():
        ratio = row["ratio"]
        table.add_row(
            name,
            f"{report['settings']['trained'][name]:,}",
            f"{row['ms']['median']:.1f}",
            f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]",
            f"{row['peak_bytes'] / 2**20:,.1f} MB",
            f"{row['peak_bytes'] / summary[report['reference']]['peak_bytes']:.3f}",
        )
    make_console().print(table)


def summarise(samples: dict[str, list[float]], peaks: dict[str, int], reference: str) -> dict[str, Any]:
    """Milliseconds per step, and their ratio to the reference's of the same round."""
    return {
        name: {
            "ms": spread([1000 * value for value in values]),
            "ratio": spread([a / b for a, b in zip(values, samples[reference], strict=True)]),
            "peak_bytes": peaks[name],
        }
        for name, values in samples.items()
    }


def main(argv: list[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sft", "grpo"), nargs="?", default="sft")
    parser.add_argument("--shape", default="tiny", help="sft: tiny, 4b, 8b; grpo: tiny, 7b")
    parser.add_argument("--visual-tokens", type=int, default=256)
    parser.add_argument("--text-tokens", type=int, default=256, help="sft: question and answer; grpo: words written")
    parser.add_argument("--batch", type=int, default=1, help="sft: rows; grpo: prompts")
    parser.add_argument("--group", type=int, default=8, help="grpo: trajectories per prompt")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base; default: bfloat16 on a GPU")
    parser.add_argument("--name")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="does it run? Nothing to quote")
    parser.add_argument("--show", nargs="+", type=Path, help="print the tables of result files")
    args = parser.parse_args(argv)
    if args.show:
        for path in args.show:
            show(json.loads(path.read_text()))
        return None
    warnings.simplefilter("ignore", KeepsightWarning)  # random weights, and said so
    if args.quick:
        args.visual_tokens, args.text_tokens, args.group, args.repeats, args.warmup = 16, 24, 2, 2, 1
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    args.checkpointing = device.type == "cuda" if args.checkpointing is None else args.checkpointing
    found = conditions(
        "benchmarks/train.py", sys.argv[1:] if argv is None else argv, MEASURED[args.kind], device, args.note
    )
    if args.kind == "sft":
        from training import sft as kind
    else:
        from training import grpo as kind  # type: ignore[no-redef]
    samples, peaks, more = kind.measure(args, device, getattr(torch, args.dtype))
    keep = (
        "shape",
        "visual_tokens",
        "text_tokens",
        "batch",
        "checkpointing",
        "dtype",
        "repeats",
        "warmup",
        "quick",
    )
    report = {
        "kind": args.kind,
        "reference": kind.REFERENCE,
        "conditions": found,
        "clock": "wall" if device.type == "cuda" else "process time",
        "settings": {name: getattr(args, name) for name in keep} | more,
        "summary": summarise(samples, peaks, kind.REFERENCE),
        "samples_seconds": samples,
    }
    show(report)
    file = place(args.out, args.name or f"{args.kind}-{device.type}-{args.shape}-{args.dtype}", args.quick)
    file.write_text(json.dumps(report, indent=1) + "\n")
    return file


if __name__ == "__main__":
    main()
