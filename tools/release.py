"""Build the wheel and the source archive, check both, and try the wheel as a stranger would.

    python tools/release.py [--tag v0.1.0] [--out dist]      # `make release`

The version stands in src/keepsight/__init__.py and nowhere else; a tag must equal it. The wheel is installed into an
empty environment, with the versions of the lock, and the README's first block of code runs from another folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from install import (
    environment,
    get_uv,
    install_with_pip,
    install_with_uv,
    make_venv,
    pinned,
    pip_settings,
    uv_options,
)

ROOT = Path(__file__).parent.parent
UNWANTED = re.compile(r"(^|/)(tests|studies|benchmarks|__pycache__)(/|$)")


def version() -> str:
    """The version of the package."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/keepsight/__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


def check_versions(tag: str | None) -> None:
    """Stop unless tag, changelog and citation name the package's version."""
    now = version()
    if tag is not None and tag != f"v{now}":
        sys.exit(f"The tag is {tag}, and the package's version is {now}: expected v{now}.")
    if not re.search(rf"^## .*{re.escape(now)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        sys.exit(f"CHANGELOG.md has no section for {now}.")
    if f"version: {now}" not in (ROOT / "CITATION.cff").read_text():
        sys.exit(f"CITATION.cff does not name version {now}.")


def build(python: Path, out: Path) -> Path:
    """The wheel, after both archives were built and checked."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([python, "-m", "build", "--outdir", out, ROOT], check=True, stdout=subprocess.DEVNULL)
    archives = sorted(out.iterdir())
    subprocess.run([python, "-m", "twine", "check", "--strict", *archives], check=True)
    [wheel] = out.glob("*.whl")
    [source] = out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened, tarfile.open(source) as unpacked:
        extra = [name for name in (*opened.namelist(), *unpacked.getnames()) if UNWANTED.search(name)]
    if extra:
        sys.exit(f"An archive holds what only the repository needs, such as {extra[0]}.")
    return wheel


def try_out(wheel: Path, lock: Path) -> None:
    """Install the wheel into an empty environment, and run the README's first block from another folder."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = make_venv(folder / "env")
        settings = pip_settings(python, lock)
        uv = get_uv(python, pinned(lock).get("uv"))
        wanted = f"{wheel.resolve()}[lab]"
        if uv:
            install_with_uv(uv, [*uv, *uv_options(python, settings), wanted], lock, environment(settings))
        else:
            install_with_pip([str(python), "-m", "pip", "install", "--quiet", wanted], lock)
        here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        for command in (["-c", block.group(1)], ["-m", "keepsight.cli", "--version"]):
            done = subprocess.run([python, *command], cwd=folder, env=here, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"With the wheel in an empty environment, this fails:\n{' '.join(command)}\n{done.stderr}")
            print(done.stdout.strip())


def main(argv: list[str] | None = None) -> None:
    """Build, check and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", help="what the release is tagged with")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the archives")
    given = parser.parse_args(argv)
    check_versions(given.tag or None)
    wheel = build(Path(sys.executable), given.out)
    try_out(wheel, ROOT / "locks" / "dev.txt")
    print(f"{wheel.name} is ready, with its source archive, in {given.out}.")


if __name__ == "__main__":
    main()
