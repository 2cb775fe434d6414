"""What is installed is what was tested: the locks, pyproject.toml's ranges and the package's imports agree."""

import ast
import base64
import importlib.util
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import keepsight

ROOT = Path(__file__).parents[2]
PACKAGE = Path(keepsight.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MINORS_MATTER = ("torch", "transformers", "peft", "trl")
PYTHONS = ("3.11", "3.12", "3.13")

# Which extra a part of the package may need. Every part may need what stands in `dependencies`.
PARTS = {
    "cli": {"lab"},
    "data": {"train"},
    "diagnose": {"lab"},
    "lab": {"lab"},
    "serve": {"serve", "vllm", "train"},  # train: serve/vllm/rollouts.py, which training alone imports
    "train": {"train", "4bit"},
}
DISTRIBUTIONS = {"PIL": "pillow", "functorch": "torch", "sklearn": "scikit-learn", "yaml": "pyyaml"}
#: Asked for by the user's own accelerate config, and refused by name where it is missing; and what stands in
#: evaluate/lmms*.py, which only lmms-eval imports, in its environment; and triton, which torch's builds for CUDA bring
#: along on Linux: pvm's `fused()` says so where it is missing.
UNDECLARED = {"deepspeed", "lmms-eval", "av", "triton"}
#: What one study alone needs, which asks for it by name (docs/eye.md).
OF_A_STUDY = {"resvg-py", "gguf"}


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "tools"))  # they import each other
install, compatibility = load_tool("install"), load_tool("compatibility")


def requirements(*extras):
    """All direct requirements of keepsight with some extras; an extra's extras included."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, EXTRAS[extra]):
            found += requirements(*requirement.extras) if requirement.name == "keepsight" else [requirement]
    return found


def locked(lock, python, platform):
    """Name -> version of what a lock says for one Python and platform."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform],
        "os_name": "nt" if platform == "win32" else "posix",
        "platform_machine": "arm64" if platform == "darwin" else "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found = {}
    for name, version, marker in install.locked(ROOT / "locks" / lock):
        line = Requirement(f"{name}=={version}{marker}")
        if line.marker is None or line.marker.evaluate(environment):
            assert name not in found, f"{name} twice for Python {python} on {platform}"
            found[name] = Version(version)
    return found


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ["dev.txt", "oldest.txt"])
def test_every_requirement_is_locked_within_its_range(lock, python, platform):
    versions = locked(lock, python, platform)
    for requirement in requirements("dev"):
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is not in locks/{lock}: make lock"
        assert versions[name] in requirement.specifier, f"locks/{lock} has {name} {versions[name]}: make lock"
    assert "uv" in versions  # the installer, which is no requirement of keepsight


@pytest.mark.parametrize("name", MINORS_MATTER)
def test_a_range_goes_from_the_oldest_lock_to_the_minor_above_the_newest(name):
    ranges = [r.specifier for r in requirements("dev") if r.name == name]
    newest, oldest = (locked(lock, "3.12", "linux")[name] for lock in ("dev.txt", "oldest.txt"))
    for specifier in ranges:
        bounds = {clause.operator: Version(clause.version) for clause in specifier}
        assert bounds.keys() == {">=", "<"}
        assert bounds["<"] == Version(f"{newest.major}.{newest.minor + 1}")
        assert bounds[">="].release[:2] == oldest.release[:2]


def test_locks_name_no_place_and_hash_everything_but_torch():
    for lock in sorted((ROOT / "locks").glob("*.txt")):
        text = lock.read_text()
        assert not re.search(r"https?:|file:|--index|--extra-index|--find-links|^-", text, re.MULTILINE)
        without = {name for name, rest in re.findall(r"^([\w.-]+)==[^\\\n]*(\\?)$", text, re.MULTILINE) if not rest}
        assert without == {"torch", "torchvision"}  # a version of these is built for CPUs and for several CUDAs


def imports(folder):
    """Third-party module -> the files that import it."""
    found = {}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"keepsight"}:
                found.setdefault(name, []).append(file)
    return found


def test_every_import_of_the_package_is_declared():
    for module, files in imports(PACKAGE).items():
        for file in files:
            part = file.relative_to(PACKAGE).parts[0]
            declared = {canonicalize_name(r.name) for r in requirements(*PARTS.get(part, ()))}
            name = canonicalize_name(DISTRIBUTIONS.get(module, module))
            assert name in declared | UNDECLARED, f"{file.relative_to(PACKAGE)} imports {module}"


def test_every_import_of_the_tests_is_declared():
    declared = {canonicalize_name(r.name) for r in requirements("dev", "vllm")}
    folders = ("tests", "benchmarks", "examples", "recipes", "studies", "tools")
    ours = {path.stem for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in ("", ".py")}
    for folder in folders:
        for module, files in imports(ROOT / folder).items():
            name = canonicalize_name(DISTRIBUTIONS.get(module, module))
            assert module in ours | set(folders) or name in declared | OF_A_STUDY, (
                f"{files[0].relative_to(ROOT)} imports {module}"
            )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("trl>=1.16,<1.17", "trl>=1.16"),
        ("trl<1.17,>=1.16", "trl>=1.16"),
        ("torch", "torch"),
        ("keepsight[a,b]<=2 ; python_version < '3.12'", "keepsight[a,b]; python_version < '3.12'"),
    ],
)
def test_newest_means_without_upper_bounds(given, expected):
    assert install.without_upper_bound(given) == expected


def test_newest_asks_for_everything_that_the_tests_need():
    asked = {canonicalize_name(Requirement(line).name) for line in install.unbounded_requirements()}
    assert asked == {canonicalize_name(r.name) for r in requirements("dev")}
    assert not any("<" in line.partition(";")[0] for line in install.unbounded_requirements())


def test_an_environment_that_is_none_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="is no virtual environment"):
        install.make_venv(tmp_path)
    assert (tmp_path / "thesis.txt").is_file()


def test_a_page_keeps_the_rows_of_what_was_not_run_again():
    page = f"words\n{compatibility.START}\n{compatibility.END}\nmore words\n"
    result = {"date": "2030-01-01", "commit": "abc", "python": "3.12.1", "packages": {"torch": "2.15.0"}}
    good, bad = {"passed": 3, "failed": 0, "skipped": 1}, {"passed": 2, "failed": 1, "skipped": 1, "failures": ["a::b"]}
    nothing = dict.fromkeys(compatibility.NAMES)
    first = compatibility.page_with(page, nothing | {"locked": result | good, "newest": result | bad})
    assert first.startswith("words\n")
    assert first.endswith("\nmore words\n")
    assert "- newest: `a::b`" in first
    again = compatibility.page_with(first, nothing | {"newest": {**result, **good, "date": "2030-01-08"}})
    assert "| locked | 3.12.1 | 2.15.0 |" in again
    assert "2030-01-08" in again
    assert "a::b" not in again
    assert compatibility.page_with(again, nothing) == again


def test_pips_own_constraints_hold_for_uv_as_well() -> None:
    options = install.uv_options(Path("python"), {"constraint": "a.txt b.txt", "no-index": "1"})
    assert options[4:] == ["--no-index", "--constraints", "a.txt", "--constraints", "b.txt"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"no-index": "true"}, "PIP_NO_INDEX"),
        ({"index-url": "http://user:secret@127.0.0.1:9/simple"}, r"http://127\.0\.0\.1:9/simple, cannot be reached"),
        ({"proxy": "http://127.0.0.1:9"}, "^$"),
    ],
)
def test_an_index_that_cannot_be_reached_is_named(
    settings: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "pip_settings", lambda python: settings)
    assert re.search(said, install.why_unreachable(Path("python")))


def test_an_index_behind_a_password_is_asked_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_error(401 if len(asked) == 2 else 200)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"127.0.0.1:{server.server_port}/simple"
        monkeypatch.setattr(install, "pip_settings", lambda python: {"index-url": f"http://me:p%40ss@{address}/"})
        said = [install.why_unreachable(Path("python")) for _ in range(2)]
        server.shutdown()
    assert asked == [("/simple/pip/", "Basic " + base64.b64encode(b"me:p@ss").decode())] * 2
    assert said == ["", f"\nThe package index in use, http://{address}/, answers 401."]


def test_a_lock_that_is_not_there_is_named_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path / "environment"), "--lock", "locks/none.txt"])
    with pytest.raises(SystemExit):
        install.main()
    assert re.search(r"locks/none\.txt is no file; there are .*oldest\.txt", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_what_holds_the_newest_back_is_named() -> None:
    lock = {"torch": "2.15.0", "peft": "0.21.2", "numpy": "3.0"}
    assert install.held_back({"torch": "2.15.0+cpu", "peft": "0.22.0", "numpy": "2.0"}, lock, {"constraint": "a"}) == ""
    told = install.held_back({"torch": "2.9.1+cpu", "peft": "0.21.2"}, lock, {"constraint": "caps.txt"})
    assert told == (
        "Note: older than locks/dev.txt, held back by pip's own constraints (caps.txt): torch 2.9.1+cpu, not 2.15.0.\n"
    )
    assert "held back by the index in use: peft 0.20.9" in install.held_back({"peft": "0.20.9"}, lock, {})


@pytest.mark.parametrize(("options", "kept"), [(["-n", "2", "-q"], True), (["-q", "-k", "locks"], False)])
def test_a_part_of_the_tests_is_no_result(
    options: list[str], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compatibility, "RESULTS", tmp_path)
    monkeypatch.setattr(compatibility.sys, "executable", "true")  # it runs no tests and is content
    assert compatibility.run("newest", None, options) == 0
    assert (tmp_path / "newest.json").is_file() == kept
    assert ("not kept, as -k locks may leave tests out" in capsys.readouterr().out) != kept


@pytest.mark.parametrize("target", ["test", "test-oldest", "test-newest", "test-vllm"])
def test_what_make_runs_is_a_result(target: str) -> None:
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ((name, options),) = re.findall(r"compatibility\.py run (\w+) (.*)", shown)
    assert compatibility.left_out_by(name, options.split()) == []
    assert compatibility.left_out_by(name, ["--ignore=tests/pvm"])


def test_a_folder_beside_git_has_an_unknown_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compatibility.commit() == "unknown"


def test_a_result_stands_only_under_the_name_of_its_own_versions(tmp_path, monkeypatch, capsys):
    lock = tmp_path / "oldest.txt"
    lock.write_text("torch==0.0.1 ; python_version >= '3.11' \\\n    --hash=sha256:00\ntrl==1.16.0\n")
    packages = {"torch": "0.0.1+cpu", "trl": "1.16.0", "peft": "9"}
    assert compatibility.beside(lock, packages) == []
    assert compatibility.beside(lock, packages | {"trl": "1.17.0"}) == ["trl 1.17.0, not 1.16.0"]
    monkeypatch.setattr(compatibility, "LOCKS", {"oldest": lock})
    monkeypatch.setattr(compatibility, "RESULTS", tmp_path / "results")
    assert compatibility.run("oldest", None, ["--no-such-option"]) == 2
    assert "not the lock's" in capsys.readouterr().out
    assert not list((tmp_path / "results").iterdir())
