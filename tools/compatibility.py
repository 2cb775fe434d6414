"""What was tested with what: runs the tests and keeps the result with the versions, and writes docs/compatibility.md.

    python tools/compatibility.py run NAME [--unless-as OTHER] [PYTEST OPTIONS]   # all tests: into .results/NAME.json
    python tools/compatibility.py show [NAME ...]                                 # what .results holds
    python tools/compatibility.py write                                           # .results into docs/compatibility.md

Each environment's Python runs it for its own tests (see the Makefile). `--unless-as` does not run what OTHER's run has
just tested: the same Python with the same version of every package.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from install import ROOT, pinned

RESULTS = ROOT / ".results"
PAGE = ROOT / "docs" / "compatibility.md"
NAMES = ("locked", "oldest", "newest", "vllm")
LIBRARIES = ("torch", "transformers", "peft", "trl", "vllm")
LOCKS = {"locked": ROOT / "locks" / "dev.txt", "oldest": ROOT / "locks" / "oldest.txt"}
# With these, all tests of an environment run; the oldest releases have none of what the repository alone needs.
WHOLE = {"-q", "-v", "-n", *map(str, range(65)), "auto", "--dist", "worksteal", "tests_vllm"}
PACKAGE = {"oldest": {"--ignore=tests/project", "--ignore=tests/studies"}}
START, END = "<!-- results: written by `make compatibility` -->", "<!-- end of results -->"


def main() -> int:
    """Do what the command line asks; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the tests and keep what was tested with what.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run pytest, its options last")
    runs.add_argument("name", choices=NAMES)
    runs.add_argument("--unless-as", choices=NAMES, help="do not run if that run had the very same versions")
    shows = commands.add_parser("show")
    shows.add_argument("names", nargs="*", default=NAMES)
    commands.add_parser("write")
    given, pytest_options = parser.parse_known_args()
    if pytest_options and given.command != "run":
        parser.error(f"unknown: {' '.join(pytest_options)}")
    if given.command == "run":
        return run(given.name, given.unless_as, pytest_options)
    if given.command == "show":
        print("\n".join(lines_of(RESULTS, given.names)))
    else:
        PAGE.write_text(page_with(PAGE.read_text(), {name: read(name) for name in NAMES}))
    return 0


def run(name: str, unless_as: str | None, pytest_options: list[str]) -> int:
    """Run pytest and keep its result; returns its exit status."""
    RESULTS.mkdir(exist_ok=True)
    packages = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items())),
    }
    if name in LOCKS and (strange := beside(LOCKS[name], packages)):
        print(
            f"{name}: this environment is not the lock's ({', '.join(strange)}), so its result would stand under a name"
        )
        print("that it has not earned. Run it by make, or with the environment that make installed.")
        return 2
    other = read(unless_as) if unless_as else None
    if other and all(other[key] == result[key] for key in ("commit", "python", "packages")):
        print(f"{name}: the newest of everything is exactly what {unless_as} was tested with, so it is not run again.")
        (RESULTS / f"{name}.json").write_text(json.dumps({**other, "same_as": unless_as}, indent=1))
        return 0
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    status = subprocess.run(
        [sys.executable, "-m", "pytest", f"--junitxml={report}", *pytest_options], cwd=ROOT
    ).returncode
    result.update(counts(report) if report.exists() else {"broken": f"pytest ended with {status} and no report"})
    print("\n".join(lines(name, result)), flush=True)
    if more := left_out_by(name, pytest_options):
        print(f"{name}: not kept, as {' '.join(more)} may leave tests out.")
    else:
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1))
    return status


def left_out_by(name: str, pytest_options: list[str]) -> list[str]:
    """The options with which pytest may not run all tests of that name."""
    return [option for option in pytest_options if option not in WHOLE | PACKAGE.get(name, set())]


def beside(lock: Path, packages: dict[str, str]) -> list[str]:
    """The `LIBRARIES` that are installed in another version than a lock's, whatever their build, in words."""
    wanted = {name: version for name, version in pinned(lock).items() if name in LIBRARIES}
    found = {name: packages.get(name, "none").partition("+")[0] for name in wanted}
    return [f"{name} {found[name]}, not {version}" for name, version in wanted.items() if found[name] != version]


def commit() -> str:
    """The commit that is tested, with a + if files differ from it; "unknown" of a folder without git, or beside it."""
    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    if shutil.which("git") is None:
        return "unknown"
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def counts(report: Path) -> dict[str, Any]:
    """Of a JUnit report: how many tests passed, failed (errors included), were skipped; and which failed."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = sorted({f"{case.get('classname')}::{case.get('name')}" for case in failed})
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": names,
    }


def read(name: str) -> dict[str, Any] | None:
    """A result that is kept, or None."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """A result as a row of the table, and a list item for each failure."""
    packages = result["packages"]
    versions = [packages.get(library, packages.get(f"{library}-cpu", "-")) for library in LIBRARIES]
    numbers = [str(result.get(key, "-")) for key in ("passed", "failed", "skipped")]
    cells = [name, result["python"], *versions, *numbers, result["date"], result["commit"]]
    notes = [f"`{failure}`" for failure in result.get("failures", [])]
    notes += [result["broken"]] if "broken" in result else []
    notes += [f"the very versions of {result['same_as']}, not run again"] if "same_as" in result else []
    return [f"| {' | '.join(cells)} |", *(f"- {name}: {note}" for note in notes)]


def lines_of(folder: Path, names: Any) -> list[str]:
    """The lines of all results of those names that are kept."""
    found = {name: read(name) for name in names}
    return [line for name, result in found.items() if result for line in lines(name, result)]


def page_with(page: str, results: dict[str, dict[str, Any] | None]) -> str:
    """The page with new results between its markers; a name without a new one keeps its old lines."""
    before, after = page.partition(START)[0], page.partition(END)[2]
    old = page.partition(START)[2].partition(END)[0].splitlines()
    head = ["environment", "Python", *LIBRARIES, "passed", "failed", "skipped", "date", "commit"]
    rows, notes = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    for name in NAMES:
        result = results[name]
        of_name = lines(name, result) if result else [x for x in old if re.match(rf"(\| {name} \||- {name}: )", x)]
        rows += [line for line in of_name if line.startswith("|")]
        notes += [line for line in of_name if line.startswith("-")]
    return "\n".join([before + START, *rows, *([""] if notes else []), *notes, END + after])


if __name__ == "__main__":
    sys.exit(main())
