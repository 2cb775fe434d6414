"""The house keeps its plan: imports go down, nothing goes round in circles, no folder hides its story in a crowd."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CROWD = 16
#: Folders that are still more crowded than that, and by how much; they may only shrink.
CROWDED: dict[str, int] = {}


def test_imports_keep_the_contract() -> None:
    """`.importlinter` is the plan; `lint-imports` says which import breaks it."""
    call = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as c; c()",
        "--no-cache",
    ]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[done.stdout.find("Broken contracts") :] + done.stderr


def test_no_folder_is_a_crowd() -> None:
    places = ("src/keepsight", "studies", "benchmarks", "tests", "tools")
    files = [file for place in places for file in (ROOT / place).rglob("*.py")]
    count = Counter(file.parent.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py")
    assert {folder: n for folder, n in count.items() if n > CROWDED.get(folder, CROWD)} == {}
    assert {folder: n for folder, n in CROWDED.items() if count[folder] < n} == {}, "it has shrunk: say so here"


def test_one_word_is_one_class() -> None:
    found = Counter(
        node.name
        for file in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in found.items() if count > 1] == []


def test_the_picture_is_drawn_from_the_contract() -> None:
    place = importlib.util.spec_from_file_location("picture", ROOT / "tools" / "picture.py")
    assert place is not None
    assert place.loader is not None
    picture = importlib.util.module_from_spec(place)
    place.loader.exec_module(picture)
    assert picture.PICTURE.read_text() == picture.draw(), "run python tools/picture.py"


def test_nothing_that_is_loaded_may_bring_code() -> None:
    """transformers asks at the terminal whether to run a model's own code, unless it is told."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "from_pretrained":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if ast.unparse(node.func).startswith("Auto") and given.get("trust_remote_code") != "False":
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "recipes", "tools"])
def test_scripts_ask_for_what_is_there(folder: str) -> None:
    """No test runs all of them, and the type checker reads none."""
    asked, absent = 0, []
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and name.startswith("keepsight") and ".vllm." not in name:
                module = importlib.import_module(name)
                asked += 1
                for alias in node.names:
                    if not hasattr(module, alias.name) and importlib.util.find_spec(f"{name}.{alias.name}") is None:
                        absent.append(f"{file.relative_to(ROOT)}:{node.lineno}: {name}.{alias.name}")
    assert asked
    assert absent == []


@pytest.mark.parametrize(
    "module", ["keepsight", "keepsight.train", "keepsight.pvm", "keepsight.vismem", "keepsight.diagnose"]
)
def test_every_public_name_is_there(module: str) -> None:
    """Lazy faces name modules in strings, which no type checker follows."""
    face = importlib.import_module(module)
    names = {*getattr(face, "__all__", ()), *getattr(face, "_PUBLIC", ())}
    assert names
    for name in sorted(names):
        assert getattr(face, name) is not None
