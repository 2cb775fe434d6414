"""Starting up imports nothing heavy, and PEFT knows the memories in whatever order things are imported."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import keepsight
from keepsight.early import after_import
from keepsight.shipped import resolve_adapter

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "numpy", "PIL")
REPORT = f"""
import sys, json, atexit
atexit.register(lambda: print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr))
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("--help", 0),
        ("--version", 0),
        ("genrate", 2),
        ("generate --imgae x.png", 2),
        ("train pvm --learning-rate 1", 2),
        ("train pvm keepsight/reference", 2),
        ("train pvm keepsight/reference -d data.jsonl -o out --lr 0", 1),
        *((f"{command} --help", 0) for command in ("generate", "info", "serve", "diagnose", "demo", "convert")),
        *((f"{command} --help", 0) for command in ("train pvm", "train pvm-grpo", "train vismem-formation")),
        *((f"{command} --help", 0) for command in ("data check", "export vllm", "lab pretrain", "train cost")),
    ],
)
def test_help_and_typing_errors_import_nothing_heavy(line: str, status: int) -> None:
    done = run(f"{REPORT}\nfrom keepsight.cli import main\nsys.argv[0] = 'keepsight'\nmain()", *line.split())
    assert done.returncode == status, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_importing_keepsight_imports_nothing_heavy() -> None:
    done = run(f"{REPORT}\nimport keepsight\ndir(keepsight)\nkeepsight.KeepsightError")
    assert json.loads(done.stderr.splitlines()[-1]) == [], done.stderr


def test_every_public_name_is_there() -> None:
    for name in [*keepsight.__all__, "diagnose"]:
        assert getattr(keepsight, name) is not None
        assert name in dir(keepsight)
    assert keepsight.PvmConfig is importlib.import_module("keepsight.pvm").PvmConfig
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = keepsight.laod


KNOWN = """
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
for name in ("PVM", "VISMEM"):
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)].__module__.startswith("keepsight."), name
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name)].__module__.startswith("keepsight."), name
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import peft, keepsight",
        "import keepsight; from peft import PeftModel",
        "import keepsight.vismem",
        "import keepsight.peft_method",
        "from keepsight import load, MemoryPolicy",
        "import threading\ndef both(name): __import__(name)\n"
        "names = ('keepsight.vismem', 'peft', 'keepsight.pvm', 'keepsight.checkpoints.load')\n"
        "import keepsight\nthreads = [threading.Thread(target=both, args=(name,)) for name in names]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
    ],
)
def test_peft_knows_the_memories_whatever_is_imported_first(imports: str) -> None:
    done = run(imports + KNOWN)
    assert done.returncode == 0, done.stderr


def test_an_adapter_loads_after_nothing_but_two_imports() -> None:
    code = """
import keepsight
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText
from keepsight.shipped import reference_path
base = AutoModelForImageTextToText.from_pretrained(reference_path())
print(type(PeftModel.from_pretrained(base, sys.argv[1]).base_model).__name__)
"""
    done = run(f"import sys{code}", str(resolve_adapter("keepsight/reference-vismem")))
    assert done.stdout.strip() == "VisMemModel", done.stderr


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of an importable module `lately`, a stand-in for PEFT; what the import hook leaves behind is removed."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.invalidate_caches()
    (tmp_path / "lately.py").write_text("value = 1\nimport time; time.sleep(0.05); whole = True\n")
    yield tmp_path / "lately.py"
    for name in ("lately", "lately_too"):
        sys.modules.pop(name, None)


def test_the_action_runs_once_when_the_module_is_whole(module: Path) -> None:
    seen = []
    after_import(("lately", "lately_too"), lambda: seen.append(sys.modules["lately"].whole))
    assert importlib.util.find_spec("lately").origin == str(module)
    assert seen == []
    found = importlib.import_module("lately")
    assert seen == [True]
    assert type(found.__spec__.loader).__name__ == type(found.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(found)
    importlib.import_module("lately")
    assert seen == [True]


def test_the_action_waits_for_the_outer_of_two(module: Path) -> None:
    module.with_name("lately_too.py").write_text("import lately\nalso_whole = True\n")
    seen = []
    after_import(("lately", "lately_too"), lambda: seen.append(sys.modules["lately_too"].also_whole))
    importlib.import_module("lately_too")
    assert seen == [True]


def test_the_action_runs_at_once_behind_an_import(module: Path) -> None:
    importlib.import_module("lately")
    seen = []
    after_import(("lately", "lately_too"), lambda: seen.append(True))
    assert seen == [True]
    importlib.reload(sys.modules["lately"])
    assert seen == [True]


def test_an_import_that_fails_is_tried_again(module: Path) -> None:
    seen = []
    after_import(("lately", "lately_too"), lambda: seen.append(True))
    right = module.read_text()
    module.write_text("raise OSError('no such kernel')")
    with pytest.raises(OSError, match="no such kernel"):
        importlib.import_module("lately")
    assert "lately" not in sys.modules
    assert seen == []
    module.write_text(right + "# another length, so that no cached bytecode is taken\n")
    importlib.invalidate_caches()
    importlib.import_module("lately")
    assert seen == [True]


def test_a_missing_module_stays_missing(module: Path) -> None:
    module.unlink()
    importlib.invalidate_caches()
    after_import(("lately", "lately_too"), lambda: pytest.fail("there is nothing"))
    with pytest.raises(ModuleNotFoundError, match="No module named 'lately'"):
        importlib.import_module("lately")


def test_an_action_that_fails_is_heard_and_tried_again(module: Path) -> None:
    errors = [KeyError("first")]

    def action() -> None:
        if errors:
            raise errors.pop()

    after_import(("lately", "lately_too"), action)
    with pytest.raises(KeyError):
        importlib.import_module("lately")
    importlib.import_module("lately")


def test_threads_see_the_module_with_the_action_done(module: Path) -> None:
    seen: list[bool] = []
    done: list[int] = []
    after_import(("lately", "lately_too"), lambda: done.append(1))

    def use() -> None:
        importlib.import_module("lately")
        seen.append(bool(done))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen, done) == ([True] * 8, [1])
