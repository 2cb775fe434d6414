"""Every benchmark that wants a GPU, at the sizes of released models, in one go: for a machine that is lent for minutes.

Each step is a process of its own with a limit of its own, and writes its results as they come: what was measured before
the time was up stays. The tests of kernels, streams and captured graphs come first, the table comes last.

    python benchmarks/gpu.py                # 9 minutes at most, on a GPU with 80 GB
    python benchmarks/gpu.py --only decode  # the steps whose names begin so
    python benchmarks/gpu.py --rehearse     # the same steps, tiny, on a CPU: does every line run? Nothing to quote

A machine without a network needs torch and transformers, and the other requirements as wheels: `make gpu-wheels`
where there is a network, then `pip install --no-index --find-links wheels ...` there. vLLM is not among the steps: it
pins a torch of its own, and starting it twice takes minutes (`serve_vllm.py` measures it).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """One benchmark at one size.

    Attributes:
        name: of the step and of its result file.
        script: in this folder; "pytest" for tests.
        arguments: what is measured.
        rehearsal: the same on a CPU.
        folder: of its results.
        limit: seconds.
        kind: how its result is read.
    """

    name: str
    script: str
    arguments: str
    rehearsal: str
    folder: str
    limit: int
    kind: str


STEPS = (
    Step(
        "tests",
        "pytest",
        "tests/pvm/test_fused.py tests/pvm/test_overlap.py -k 'test_fused or captured or decoding_steps'",
        "tests/pvm/test_fused.py tests/pvm/test_overlap.py -k 'compile or captured or decoding_steps'",
        "",
        70,
        "tests",
    ),
    Step("decode-8b-graph", "decode.py", "--shape 8b --graph --repeats 15", "--graph --quick", "decode", 130, "decode"),
    Step(
        "decode-8b-graph-batch16",
        "decode.py",
        "--shape 8b --graph --batch 16 --visual-tokens 256 1024 --repeats 12",
        "--graph --batch 2 --quick",
        "decode",
        70,
        "decode",
    ),
    Step(
        "sft-8b",
        "train.py",
        "sft --shape 8b --visual-tokens 1024 --text-tokens 1024 --repeats 8",
        "sft --quick",
        "train",
        70,
        "train",
    ),
    *(
        Step(
            f"grpo-7b-{words}-words",
            "train.py",
            f"grpo --shape 7b --visual-tokens 256 --text-tokens {words} --repeats 3 --warmup 1",
            "grpo --quick",
            "train",
            limit,
            "train",
        )
        for words, limit in ((32, 50), (128, 60))
    ),
    Step(
        "vismem-7b",
        "vismem.py",
        "--shape 7b --visual-tokens 1024 --invocations 2 8 --repeats 2",
        "--quick",
        "vismem",
        90,
        "vismem",
    ),
)


def run(step: Step, out: Path, rehearse: bool) -> str:
    """Run a step; what became of it, in a word or two."""
    device, given = "cpu" if rehearse else "cuda", shlex.split(step.rehearsal if rehearse else step.arguments)
    if step.kind == "tests":
        call = ["-m", "pytest", "-q", "-p", "no:benchmark", "--device", device, *given]
    else:
        named = [*given, *(["--device", device] if rehearse else [])]
        call = [str(HERE / step.script), *named, "--name", step.name, "--out", str(out / step.folder)]
    print(f"== {step.name}: {step.script} {shlex.join(given)}", flush=True)
    begin, limit = time.monotonic(), step.limit * (10 if rehearse else 1)  # a busy CPU imports for a minute
    try:
        done = subprocess.run([sys.executable, *call], cwd=HERE.parent, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit} s"
    took = f"{time.monotonic() - begin:.0f} s"
    return f"done in {took}" if done.returncode == 0 else f"failed (exit {done.returncode}) after {took}"


def figures(step: Step, file: Path) -> list[tuple[str, str]]:
    """What a result file says: (what was measured, figure); of a file that was not written, nothing."""
    if not file.is_file():
        return []
    report: dict[str, Any] = json.loads(file.read_text())

    def spread(found: dict[str, float]) -> str:
        return f"{found['median']:.4f} x [{found['q1']:.4f}, {found['q3']:.4f}]"

    if step.kind == "decode":
        return [
            (f"{name} / base, {r['visual_tokens']:,} visual tokens", spread(r["summary"]["ratio_to_base"][name]))
            for r in report["results"]
            for name in ("pvm", "beside", "fused", "fused-beside")
        ]
    if step.kind == "train":
        rows = report["summary"].items()
        return [(f"{n} / {report['reference']}", spread(r["ratio"])) for n, r in rows if n != report["reference"]]
    return [
        (f"{r['form']}, {r['invocations']} memories / plain", spread(r["ratio_to_plain"]))
        for r in report["results"]
        if r["form"] != "plain"
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the steps; 0 if each came to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="the steps whose names begin so")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU: does every line run?")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the result files")
    args = parser.parse_args(argv)
    steps = [step for step in STEPS if step.name.startswith(args.only)]
    if not steps:
        parser.error(f"--only {args.only}: no step begins so; there are {', '.join(step.name for step in STEPS)}.")
    if not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here; --rehearse runs the same steps, tiny, on a CPU.")
    args.out = args.out.resolve()
    ends = {step.name: run(step, args.out, args.rehearse) for step in steps}
    table = Table(title="Rehearsal on a CPU: nothing to quote" if args.rehearse else "Measured on this machine, now")
    for column in ("step", "end", "ratio", r"median \[quartiles] of paired rounds"):
        table.add_column(column)
    for step in steps:
        folder = args.out / step.folder / ("quick" if args.rehearse else "")
        nothing = "-" if step.kind == "tests" else "nothing was written"
        for what, figure in figures(step, folder / f"{step.name}.json") or [("-", nothing)]:
            table.add_row(step.name, ends[step.name], what, figure)
    from shared.measuring import make_console

    make_console().print(table)
    return 0 if all(end.startswith("done") for end in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
