"""What starting up costs: the command line's help and its typing errors, `import keepsight`, and loading a model.

    python benchmarks/startup.py --out benchmarks/results/startup/NAME.json

Every row runs in processes of its own, in turn with the other rows. CPU seconds are the process's own, user and system,
as the kernel counts them; on a machine that is shared, other work makes them larger, never smaller, so the smallest of
the repetitions is the one to quote.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

CLI = [sys.executable, "-m", "keepsight.cli"]
#: What is started -> (its command line, the exit status it must have).
ROWS = {
    "python, nothing": ([sys.executable, "-c", ""], 0),
    "keepsight --help": ([*CLI, "--help"], 0),
    "keepsight --version": ([*CLI, "--version"], 0),
    "keepsight genrate": ([*CLI, "genrate"], 2),
    "keepsight train pvm --learning-rate 1": ([*CLI, "train", "pvm", "--learning-rate", "1"], 2),
    "keepsight train pvm --help": ([*CLI, "train", "pvm", "--help"], 0),
    "keepsight serve --help": ([*CLI, "serve", "--help"], 0),
    "import keepsight": ([sys.executable, "-c", "import keepsight"], 0),
    "import keepsight, peft": ([sys.executable, "-c", "import keepsight, peft"], 0),
    "import peft": ([sys.executable, "-c", "import peft"], 0),
    "keepsight.load of the built-in VLM": (
        [sys.executable, "-c", "import keepsight; keepsight.load('keepsight/reference')"],
        0,
    ),
}
SLOW = ("import keepsight, peft", "import peft", "keepsight.load of the built-in VLM")


def start(command: list[str], expected: int) -> dict[str, float]:
    """Run a process to its end; raises unless it has the expected exit status.

    Returns:
        CPU seconds, wall seconds, and the most memory it held, in MiB.
    """
    begin = time.perf_counter()
    null = os.open(os.devnull, os.O_RDWR)
    pid = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
    )
    os.close(null)
    _, status, used = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status) != expected:
        raise SystemExit(f"{command}: exit status {os.waitstatus_to_exitcode(status)}, expected {expected}")
    peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"cpu": used.ru_utime + used.ru_stime, "wall": time.perf_counter() - begin, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes per row")
    parser.add_argument("--slow-repeats", type=int, default=3, help="of the rows that import PEFT")
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--note", default="", help="what no program can find out, e.g. what else the machine did")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.repeats = max(1, args.repeats)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    for turn in range(args.repeats):
        for name, (command, expected) in ROWS.items():
            if turn < args.slow_repeats or name not in SLOW:
                samples[name].append(start(command, expected))
    # Only now: a process starts with the peak of the one that started it, so this one had to be small.
    import torch
    from rich.table import Table
    from shared.measuring import conditions, make_console, spread

    seen = conditions("benchmarks/startup.py", sys.argv[1:], ["src"], torch.device("cpu"), args.note)
    summary = {
        name: {key: spread([one[key] for one in found]) for key in ("cpu", "wall", "peak_mib")}
        for name, found in samples.items()
    }
    table = Table("", "CPU s, smallest", "median", "wall s, median", "MiB", box=None)
    for name, row in summary.items():
        cpu = row["cpu"]
        wall, memory = row["wall"]["median"], row["peak_mib"]["median"]
        table.add_row(name, f"{cpu['min']:.2f}", f"{cpu['median']:.2f}", f"{wall:.2f}", f"{memory:.0f}")
    make_console().print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"conditions": seen, "samples": samples, "summary": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
