"""The install line in an error works for how keepsight was installed."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import keepsight.installed
from keepsight.installed import MissingExtraError, install_line


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, 'pip install "keepsight[train]"'),
        (
            {"url": "file:///home%20of/keepsight", "dir_info": {"editable": True}},
            'pip install -e "/home of/keepsight[train]"',
        ),
        ({"url": "file:///src/keepsight", "dir_info": {}}, 'pip install "/src/keepsight[train]"'),
        (
            {"url": "https://example.com/k.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            'pip install "keepsight[train] @ git+https://example.com/k.git@abc"',
        ),
        (
            {"url": "file:///tmp/keepsight-0.1.0-py3-none-any.whl", "archive_info": {}},
            'pip install "keepsight[train] @ file:///tmp/keepsight-0.1.0-py3-none-any.whl"',
        ),
    ],
)
def test_as_it_was_installed(
    origin: dict[str, Any] | None, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "keepsight-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: keepsight\nVersion: 0.1.0\n")
    if origin is not None:
        (folder / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert install_line("train") == line
    assert str(MissingExtraError("It needs TRL.", "train")) == f"It needs TRL. Install it: {line}"


def test_a_clone_that_was_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    clone = Path(keepsight.installed.__file__).parents[2]
    assert (clone / "pyproject.toml").is_file()
    assert install_line("lab") == f'pip install -e "{clone}[lab]"'
