"""Makes the peers' own test files importable: `transformers_tests` and `peft_tests`, as fetch.py unpacked them.

transformers' source distribution holds the modelling tester and not what it imports of two other folders. In their
place stand our generation tests, and nothing (what is exported to other formats is no business of a memory).
"""

from __future__ import annotations

import sys
import types
from importlib import metadata
from typing import Any

import fetch
from generation import GenerationTests


def prepare() -> None:
    """Put the test files on the import path.

    Raises:
        RuntimeError: if they are not there, or are not those of the installed packages.
    """
    if not fetch.STAMP.is_file() or fetch.STAMP.read_text() != fetch.PINS.read_text():
        raise RuntimeError("The peers' tests are not there: run python tests_peers/fetch.py, or make test-peers.")
    for name, version in fetch.pinned().items():
        if metadata.version(name) != version:
            raise RuntimeError(
                f"{name} {metadata.version(name)} is installed, and sources.txt names the tests of {version}: "
                "name the installed version there, with the sha256 of its source distribution."
            )
    if str(fetch.FOLDER) not in sys.path:
        sys.path.insert(0, str(fetch.FOLDER))
    _stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=GenerationTests)


def _stand_in(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(content)
    package = types.ModuleType(name.rpartition(".")[0])
    package.__path__ = []
    sys.modules[package.__name__], sys.modules[name] = package, module
