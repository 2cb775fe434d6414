"""What does the attention meter cost? Plain generation against metered generation, in turn, and what the meter keeps.

    python benchmarks/diagnose.py --quick                     # seconds, any machine: does it run? Nothing to quote
    python benchmarks/diagnose.py                             # the built-in VLM, 8,192 tokens, every 16th measured
    python benchmarks/diagnose.py --model Qwen/Qwen3-VL-8B-Instruct --dtype bfloat16 --device cuda   # needs a GPU
    python benchmarks/diagnose.py --show benchmarks/results/diagnose/*.json

Target: at most 1.25 x the time of plain generation, and no growth in memory beyond the result. Both write
the same number of tokens in the same process; compared are pairs of neighbouring turns, in alternating order. On
a CPU the clock is the process' own CPU time, so that other processes do not count; on a GPU it is wall-clock time.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from shared.measuring import conditions, make_console, spread

import keepsight
from keepsight.diagnose import AttentionMeter, Reader, Sample
from keepsight.diagnose.cases import stand_in_images

TARGET = 1.25


def turn(reader: Reader, inputs: dict[str, Any], steps: int, every: int | None) -> tuple[float, Any]:
    """Seconds of one generation of `steps` tokens, and its trace if it was metered."""
    on_gpu = reader.model.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    meter = None if every is None else AttentionMeter(reader.model, every=every)
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
    begin = clock()
    if meter is None:
        reader.write(inputs, steps)
    else:
        with meter:
            reader.write(inputs, steps)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - begin, None if meter is None else meter.trace


def kept(trace: Any) -> int:
    """Bytes of a trace's arrays."""
    return sum(value.nbytes for value in vars(trace).values() if hasattr(value, "nbytes"))


def held(reader: Reader, inputs: dict[str, Any], steps: int, every: int) -> dict[str, int]:
    """Bytes of the tensors that a meter holds at the end of a generation: at half the steps, and at all of them."""
    found = {}
    for count in (steps // 2, steps):
        with AttentionMeter(reader.model, every=every) as meter:
            reader.write(inputs, count)
            records = [tensor for pair in meter._records.values() for tensor in pair]
            other = [value for value in vars(meter).values() if torch.is_tensor(value)]
        result = kept(meter.trace)
        found[str(count)] = {
            "records": sum(t.untyped_storage().nbytes() for t in records),
            "other": sum(t.untyped_storage().nbytes() for t in other),
            "result": result,
        }
    return found


def show(files: list[str]) -> None:
    """Print results."""
    table = Table(title="Attention meter: metered / plain generation")
    for name in ("file", "device", "tokens", "every", "layers", "median", "quartiles", "pairs", "kept, kB"):
        table.add_column(name)
    for file in files:
        found = json.loads(Path(file).read_text())
        ratio = spread([b / a for a, b in found["pairs"]])
        table.add_row(
            Path(file).stem,
            found["conditions"]["device"],
            f"{found['steps']:,}",
            str(found["every"]),
            str(found["layers"]),
            f"{ratio['median']:.3f}",
            f"{ratio['q1']:.3f} to {ratio['q3']:.3f}",
            str(len(found["pairs"])),
            f"{found['kept_bytes'] / 1000:.0f}",
        )
    make_console().print(table)


def main(argv: list[str]) -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="keepsight/reference")
    parser.add_argument("--steps", type=int, default=8192)
    parser.add_argument("--every", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", help="results file (JSON)")
    parser.add_argument("--note", default="")
    parser.add_argument("--quick", action="store_true", help="64 tokens, one pair")
    parser.add_argument("--show", nargs="+", metavar="FILE")
    given = parser.parse_args(argv)
    if given.show:
        show(given.show)
        return
    steps, pairs = (64, 1) if given.quick else (given.steps, given.pairs)
    model, processor = keepsight.load(given.model, dtype=given.dtype, device=given.device)
    reader = Reader(model, processor)
    from PIL import Image

    side = 32 if given.model == "keepsight/reference" else 896
    [[image]] = stand_in_images([Image.new("RGB", (side, side))], 1)
    inputs = reader.inputs(Sample("describe", (image,)))
    turn(reader, inputs, 32, given.every)
    turn(reader, inputs, 32, None)
    found = []
    trace = None
    for number in range(pairs):
        order = (None, given.every) if number % 2 == 0 else (given.every, None)
        times = {}
        for every in order:
            times[every], seen = turn(reader, inputs, steps, every)
            trace = seen or trace
        found.append([times[None], times[given.every]])
        print(f"pair {number + 1}: {times[given.every] / times[None]:.3f} x", file=sys.stderr)
    result = {
        "benchmark": "diagnose",
        "model": given.model,
        "steps": steps,
        "every": given.every,
        "layers": len(trace.layers),
        "pairs": found,
        "kept_bytes": kept(trace),
        "held_bytes": held(reader, inputs, min(steps, 1024), given.every),
        "target": TARGET,
        "conditions": conditions(
            "benchmarks/diagnose.py",
            argv,
            ["src/keepsight/diagnose", "benchmarks/diagnose.py"],
            model.device,
            given.note,
        ),
    }
    if given.out:
        Path(given.out).parent.mkdir(parents=True, exist_ok=True)
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n")
        show([given.out])
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
