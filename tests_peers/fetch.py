"""Brings the tests of transformers and PEFT: downloads their source distributions and unpacks the tests in them.

    python tests_peers/fetch.py

pip downloads (its settings hold: index, certificates, proxy) exactly what sources.txt names, checked by its hashes.
Only `tests/` is unpacked, into the ignored folder tests_peers/.sources, as transformers_tests and peft_tests.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
PINS = HERE / "sources.txt"
FOLDER = HERE / ".sources"
#: Says which versions are unpacked.
STAMP = FOLDER / "sources.txt"


def pinned() -> dict[str, str]:
    """Name -> version of the source distributions."""
    return dict(re.findall(r"^([\w-]+)==(\S+)", PINS.read_text(), re.MULTILINE))


def main() -> None:
    """Fetch what is not there."""
    if STAMP.is_file() and STAMP.read_text() == PINS.read_text():
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        # Without isolation pip asks the package for its metadata with the setuptools that is installed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "--require-hashes", "-r", str(PINS), "-d", folder]
        if subprocess.run(command).returncode:
            sys.exit("The source distributions of tests_peers/sources.txt could not be downloaded; see above.")
        for name, version in pinned().items():
            unpack(Path(folder, f"{name}-{version}.tar.gz"), FOLDER / f"{name}_tests")
    STAMP.write_text(PINS.read_text())


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive's `tests/` to a folder, which becomes a package."""
    found = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.parts[1:2] != ("tests",) or ".." in path.parts:
                continue
            target = folder.joinpath(*path.parts[2:])
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            target.write_bytes(content.read())
            found += 1
    if not found:
        sys.exit(f"{archive.name} holds no tests/: its tests have to be rewritten, as those of TRL are.")
    (folder / "__init__.py").touch()


if __name__ == "__main__":
    main()
