"""Renews the locks: what `make demo`, `make test` and `make test-oldest` install.

    python tools/lock.py [FOLDER]      # `make lock`; FOLDER is where uv is put, default .venv-lock

locks/dev.txt holds the newest of everything within pyproject.toml's ranges, locks/oldest.txt the same with the oldest
minor of the four libraries below. Both are for every Python from 3.11 and every platform.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from install import OLDEST_PYTHON, ROOT, environment, get_uv, make_venv, pip_settings, unbounded_requirements

MINORS_MATTER = ("torch", "transformers", "peft", "trl")  # each minor of these has broken somebody
SEVERAL_BUILDS = ("torch", "torchvision")  # the same version for CPUs and for each CUDA, each with hashes of its own
HEADER = (
    "# Made by `make lock` from pyproject.toml: {what}.\n"
    "# Do not edit it; tests/project/test_locks.py compares the two.\n"
)


def main() -> None:
    """Renew both locks."""
    python = make_venv(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-lock"))
    uv = get_uv(python, None)
    if uv is None:
        sys.exit("Only uv makes locks for all platforms.")
    # Of one index alone: a folder of some wheels beside it would give a lock with the hashes of those only.
    variables = environment(pip_settings(python), more_indexes=False)
    compile_lock(uv, variables, "dev.txt", "the newest of everything that it allows", [])
    oldest = [f"{name}=={minor}.*" for name, minor in oldest_minors().items()]
    compile_lock(uv, variables, "oldest.txt", f"the same with {', '.join(oldest)}", oldest)


def oldest_minors() -> dict[str, str]:
    """Library -> the oldest minor that pyproject.toml allows, such as "5.17"."""
    lines = [re.fullmatch(r"([\w-]+)>=(\d+\.\d+)", line) for line in unbounded_requirements()]
    found = dict(match.groups() for match in lines if match)
    return {name: found[name] for name in MINORS_MATTER}


def compile_lock(uv: list[str], variables: dict[str, str], name: str, what: str, more: list[str]) -> None:
    """Write one lock: `more` narrows what pyproject.toml allows."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, installer = Path(folder, "constraints.txt"), Path(folder, "installer.txt")
        constraints.write_text("\n".join(more))
        installer.write_text("uv")  # no requirement of ours: pip can do without it
        command = [*uv, "pip", "compile", "--quiet", "pyproject.toml", "--extra", "dev", str(installer), "--universal"]
        command += ["--python-version", ".".join(map(str, OLDEST_PYTHON)), "--constraints", str(constraints)]
        command += ["--generate-hashes", "--no-header", "--no-annotate"]
        done = subprocess.run(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"locks/{name} stays as it is; uv says above why.")
    text = done.stdout
    for package in SEVERAL_BUILDS:
        text = re.sub(rf"^({package}==.*?) \\\n(?:    --hash=.*\n)+", r"\1\n", text, flags=re.MULTILINE)
    (ROOT / "locks" / name).write_text(HEADER.format(what=what) + text)
    print(f"locks/{name}: {len(re.findall('^[^ #]', text, re.MULTILINE))} lines")


if __name__ == "__main__":
    main()
