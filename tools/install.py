"""Makes a virtual environment with keepsight and all that its tests need.

    python tools/install.py .venv --lock locks/dev.txt   # exactly what was tested
    python tools/install.py .venv-newest                 # the newest of everything: no lock, no upper bounds

uv installs, as it does so in parallel and checks the lock's hashes; pip does where uv cannot be had (or INSTALLER=pip),
and checks none. pip's own settings (index, certificates, proxy, constraints) hold for both, but no constraints beside a
lock, which says every version itself. TORCH_INDEX=URL adds an index to look for torch in.
"""

from __future__ import annotations

import argparse
import ast
import base64
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)  # TRL's and so that of the tests; the package itself allows an older one
PROBE_SECONDS = 60


def main() -> None:
    """Make the environment that the command line describes."""
    parser = argparse.ArgumentParser(description="Make a virtual environment with keepsight and what its tests need.")
    parser.add_argument("venv", type=Path)
    parser.add_argument("--lock", type=Path, help="a file of locks/; without one, the newest of everything")
    given = parser.parse_args()
    if given.lock and not given.lock.is_file():
        parser.error(f"{given.lock} is no file; there are {', '.join(map(str, (ROOT / 'locks').glob('*.txt')))}")
    python = make_venv(given.venv)
    settings = pip_settings(python, given.lock)
    uv = get_uv(python, pinned(given.lock).get("uv") if given.lock else None)
    installer = [*uv, *uv_options(python, settings)] if uv else [str(python), "-m", "pip", "install"]
    if given.lock:
        wanted = ["-e", f"{ROOT}[dev]"]
    else:
        run([*installer, "--no-deps", "-e", str(ROOT)], environment(settings))
        wanted = unbounded_requirements()
    if uv:
        install_with_uv(uv, [*installer, *wanted], given.lock, environment(settings))
    else:
        install_with_pip([*installer, *wanted], given.lock)
    if given.lock:
        check_against(given.lock, python)
    else:
        lift_upper_bounds(python)
        print(held_back(installed(python), pinned(ROOT / "locks" / "dev.txt"), settings), end="", flush=True)
    tell_of_cuda(python)


def make_venv(folder: Path) -> Path:
    """A new, empty environment with pip; returns its Python."""
    if sys.version_info < OLDEST_PYTHON:
        found, needed = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
        sys.exit(
            f"keepsight's tests need Python {needed} or newer, as TRL does; this is {found}. "
            f"Name a newer one: make test PYTHON=python3.12"
        )
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and (folder.is_file() or any(folder.iterdir())):
        sys.exit(f"{folder} is there and is no virtual environment. Name another folder: make test VENV=FOLDER")
    print(f"Making {folder} (Python {platform.python_version()})", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)]).returncode:
        sys.exit(f"{folder} could not be made; the lines above say why. On Debian, install python3-venv.")
    return folder.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def get_uv(python: Path, version: str | None) -> list[str] | None:
    """The command `uv` in an environment, installed there by pip; None if it cannot be had."""
    if os.environ.get("INSTALLER") == "pip":
        return None
    command = [str(python), "-m", "pip", "install", "-qq", "uv" + (f"=={version}" if version else "")]
    if subprocess.run(command).returncode == 0:
        return [str(python), "-m", "uv"]
    print("uv cannot be had here: pip installs, and checks no hashes.", flush=True)
    return None


def pip_settings(python: Path, lock: Path | None = None) -> dict[str, str]:
    """What pip is configured with (`pip config list`); the environment's word is the last, as it is for pip.

    Beside a lock, which says every version itself, pip's own constraints are left out.
    """
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for section, key, value in re.findall(r"^(global|install|:env:)\.([\w-]+)=(.+)$", listed, re.MULTILINE):
        found[section][key] = str(ast.literal_eval(value))
    settings = {**found["global"], **found["install"], **found[":env:"]}
    if lock is not None and (constraint := settings.pop("constraint", None)):
        print(f"{lock} says every version: pip's own constraints ({constraint}) are left out.", flush=True)
    return settings


def environment(settings: dict[str, str], more_indexes: bool = True) -> dict[str, str]:
    """Environment variables that tell uv what pip was told. UV_* variables that are set stay as they are."""
    indexes = [os.environ.get("TORCH_INDEX", ""), *settings.get("extra-index-url", "").split()]
    told = {
        "UV_DEFAULT_INDEX": settings.get("index-url"),
        "UV_INSECURE_HOST": " ".join(settings.get("trusted-host", "").split()),
        "UV_KEYRING_PROVIDER": "subprocess" if settings.get("keyring-provider") == "subprocess" else None,
        "SSL_CERT_FILE": settings.get("cert"),
        "HTTPS_PROXY": settings.get("proxy"),
        "HTTP_PROXY": settings.get("proxy"),
        "UV_PYTHON_DOWNLOADS": "never",
    }
    if more_indexes:
        told["UV_INDEX"] = " ".join(filter(None, indexes))
        told["UV_FIND_LINKS"] = ",".join(settings.get("find-links", "").split())
        told["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # all indexes count alike, as they do for pip
    return {**{key: value for key, value in told.items() if value}, **os.environ}


def uv_options(python: Path, settings: dict[str, str]) -> list[str]:
    """What follows `uv` in a command that installs into an environment."""
    options = ["--no-index"] if without_index(settings) else []
    for file in settings.get("constraint", "").split():  # of pip's configuration, or PIP_CONSTRAINT
        options += ["--constraints", file]
    return ["pip", "install", "--python", str(python), *options]


def without_index(settings: dict[str, str]) -> bool:
    """Whether pip was told to look in no index (PIP_NO_INDEX)."""
    return settings.get("no-index", "").lower() in ("1", "true", "yes", "on")


def install_with_uv(uv: list[str], command: list[str], lock: Path | None, variables: dict[str, str]) -> None:
    """Run uv's command, for torch's CPU build where there is no GPU and the index of that build answers."""
    if lock:
        command = [*command, "--constraints", str(lock), "--build-constraints", str(lock)]
    torch = f"torch=={pinned(lock)['torch']}" if lock else "torch"
    chosen = os.environ.get("TORCH_INDEX") or os.environ.get("UV_TORCH_BACKEND") or "--no-index" in command
    if wants_cpu_build() and not chosen and cpu_index_answers(uv, torch, variables):
        if subprocess.run([*command, "--torch-backend", "cpu"], env=variables).returncode == 0:
            return
        print("That did not work with torch's CPU build from its own index; now from the index in use.", flush=True)
    run(command, variables)


def install_with_pip(command: list[str], lock: Path | None) -> None:
    """Run pip's command. pip wants hashes of all or of none: the lock's are left out."""
    if os.environ.get("TORCH_INDEX"):
        command = [*command, "--extra-index-url", os.environ["TORCH_INDEX"]]
    variables = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        if lock:
            versions = Path(folder, "versions.txt")
            versions.write_text("".join(f"{name}=={version}{marker}\n" for name, version, marker in locked(lock)))
            variables["PIP_CONSTRAINT"] = str(versions)  # instead of the one of pip's configuration
        run(command, variables)


def run(command: list[str], variables: dict[str, str]) -> None:
    """Run a command that has to work; its own words are the error."""
    if subprocess.run(command, env=variables).returncode:
        hint = "" if command[2] == "pip" else " To try it with pip alone: make test INSTALLER=pip"
        sys.exit(f"The installation failed; the lines above say why.{hint}{why_unreachable(Path(command[0]))}")


def why_unreachable(python: Path) -> str:
    """A line where the index is the likely reason: none is to be asked, or that in use does not answer; or nothing."""
    settings = pip_settings(python)
    if without_index(settings):
        return (
            "\npip is set up to ask no index (PIP_NO_INDEX, or no-index in its configuration), and not all is at hand."
        )
    if settings.get("proxy"):
        return ""  # which this does not ask through
    index = settings.get("index-url") or "https://pypi.org/simple"
    name_and_password = re.search(r"//([^/@]*)@", index)
    headers = {"User-Agent": "pip"}
    if name_and_password:  # which urllib takes for a part of the host's name
        words = urllib.parse.unquote(name_and_password[1]).encode()
        headers["Authorization"] = f"Basic {base64.b64encode(words).decode()}"
    request = urllib.request.Request(named(index).rstrip("/") + "/pip/", headers=headers)
    try:
        urllib.request.urlopen(
            request, timeout=20, context=ssl.create_default_context(cafile=settings.get("cert"))
        ).close()
    except urllib.error.HTTPError as error:
        return f"\nThe package index in use, {named(index)}, answers {error.code}."
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return (
            f"\nThe package index in use, {named(index)}, cannot be reached from here ({reason}): is there a "
            "network, and is pip's index-url right?"
        )
    return ""


def named(index: str) -> str:
    """An index's address without the password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//", index, count=1)


def wants_cpu_build() -> bool:
    """Whether torch's CPU build is another one than the general index's, and the right one for this machine."""
    has_gpu = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    return sys.platform == "linux" and not has_gpu


def cpu_index_answers(uv: list[str], torch: str, variables: dict[str, str]) -> bool:
    """Whether the index of torch's CPU builds, which uv knows, can be reached and has this version."""
    impatient = {**variables, "UV_HTTP_TIMEOUT": "20", "UV_HTTP_RETRIES": "1"}
    command = [*uv, "pip", "compile", "--quiet", "--no-deps", "--torch-backend", "cpu", "-"]
    try:
        done = subprocess.run(
            command, input=torch, env=impatient, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def tell_of_cuda(python: Path) -> None:
    """One line where a machine without a GPU got the CUDA build of torch."""
    if wants_cpu_build() and any(name.startswith("nvidia-") for name in installed(python)):
        print(
            "Note: no index that was reached has torch's CPU build, so its CUDA build is installed: it works, and\n"
            "      takes some GB more. Where you know an index with CPU builds: make test TORCH_INDEX=URL",
            flush=True,
        )


def held_back(found: dict[str, str], lock: dict[str, str], settings: dict[str, str]) -> str:
    """One line where the newest of everything is older than what was locked once; or nothing."""

    def numbers(version: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]

    names = [name for name in ("torch", "transformers", "peft", "trl") if name in found and name in lock]
    older = [f"{n} {found[n]}, not {lock[n]}" for n in names if numbers(found[n]) < numbers(lock[n])]
    why = f"pip's own constraints ({settings['constraint']})" if "constraint" in settings else "the index in use"
    return f"Note: older than locks/dev.txt, held back by {why}: {'; '.join(older)}.\n" if older else ""


def unbounded_requirements(extra: str = "dev") -> list[str]:
    """pyproject.toml's requirements of an extra, without their upper bounds."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def of_extra(name: str) -> list[str]:
        result = []
        for line in project["optional-dependencies"][name]:
            nested = re.fullmatch(r"keepsight\[(.+)\]", line)
            result += [r for inner in nested[1].split(",") for r in of_extra(inner.strip())] if nested else [line]
        return result

    return sorted({without_upper_bound(line) for line in [*project["dependencies"], *of_extra(extra)]})


def without_upper_bound(requirement: str) -> str:
    """`trl>=1.16,<1.17` as `trl>=1.16`."""
    wanted, semicolon, marker = requirement.partition(";")
    name, clauses = re.fullmatch(r"\s*([\w.-]+(?:\[[^]]*\])?)\s*(.*?)\s*", wanted).groups()  # type: ignore[union-attr]
    return name + ",".join(c for c in clauses.split(",") if not c.strip().startswith("<")) + semicolon + marker


def lift_upper_bounds(python: Path) -> None:
    """Take the upper bounds out of keepsight's metadata in an environment, so that nothing beyond them is warned of."""
    program = "import importlib.metadata as m; print(m.distribution('keepsight').locate_file(''))"
    command = [str(python), "-I", "-c", program]
    site = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (file,) = Path(site).glob("keepsight-*.dist-info/METADATA")
    start = "Requires-Dist: "
    lines = file.read_text().split("\n")
    lines = [start + without_upper_bound(x.removeprefix(start)) if x.startswith(start) else x for x in lines]
    file.write_text("\n".join(lines))


def locked(lock: Path) -> list[tuple[str, str, str]]:
    """(name, version, marker with its semicolon or nothing) of every line of a lock."""
    return re.findall(r"^([\w.-]+)==([^\s;]+)((?: ;[^\\\n]*[^\\\s])?)", lock.read_text(), re.MULTILINE)


def pinned(lock: Path) -> dict[str, str]:
    """Name -> version, of what a lock holds once for every Python and platform."""
    return {name: version for name, version, _ in locked(lock)}


def installed(python: Path) -> dict[str, str]:
    """Name -> version of everything in an environment."""
    program = (
        "import importlib.metadata as m, re\n"
        "for d in m.distributions(): print(re.sub('[-_.]+', '-', d.metadata['Name']).lower(), d.version)"
    )
    listed = subprocess.run([str(python), "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in listed.splitlines())


def check_against(lock: Path, python: Path) -> None:
    """End with an error if an environment holds a package that a lock does not, or another version of it."""
    allowed = {(name, version) for name, version, _ in locked(lock)}
    tools = {"pip", "setuptools", "keepsight"}  # `venv` brings the first two
    wrong = [
        f"{name} {version}"
        for name, version in sorted(installed(python).items())
        if name not in tools and (name, version.partition("+")[0]) not in allowed
    ]
    if wrong:
        sys.exit(f"Not in {lock}: {', '.join(wrong)}. pyproject.toml has changed since it was made: make lock")


if __name__ == "__main__":
    main()
