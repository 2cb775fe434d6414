"""Outside the tested range keepsight says so, once; within it, nothing."""

import os
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet

from keepsight.tested import LIBRARIES, why_untested

ATTACH = """
from peft import get_peft_model
import keepsight
for _ in range(2):
    model, _ = keepsight.load("keepsight/reference")
    get_peft_model(model, keepsight.PvmConfig())
"""


@pytest.mark.parametrize("version", ["5.17.0", "5.24.9", "5.24.0+cpu", "5.20.0.dev0", "5.24.1rc1"])
def test_the_tested_range_is_not_spoken_of(version):
    assert why_untested("transformers", version, SpecifierSet(">=5.17,<5.25")) is None


@pytest.mark.parametrize(
    ("version", "range_", "words"),
    [
        ("5.26.0", ">=5.17,<5.25", "transformers 5.26.0 is newer than what was tested (5.24)"),
        ("5.25.0.dev0", ">=5.17,<5.25", "transformers 5.25.0.dev0 is newer than what was tested (5.24)"),
        ("6.0.0", ">=5.17,<6", "transformers 6.0.0 is newer than what was tested (<6,>=5.17)"),
        ("5.16.2", ">=5.17,<5.25", "transformers 5.16.2 is older than what was tested (5.17)"),
    ],
)
def test_beyond_it_the_sentence_names_both_versions(version, range_, words):
    assert why_untested("transformers", version, SpecifierSet(range_)).startswith(words)


def test_a_process_says_it_once_of_each_library_at_the_first_model(tmp_path):
    ranges = "".join(f"Requires-Dist: {name}>=1,<99\n" for name in LIBRARIES)
    for name, version, more in [*((name, "99.1.0", "") for name in LIBRARIES), ("keepsight", "0.1.0", ranges)]:
        record = tmp_path / f"{name}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", ATTACH],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in LIBRARIES:
        assert done.stderr.count(f"KeepsightWarning: {name} 99.1.0 is newer than what was tested") == 1
