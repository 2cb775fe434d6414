"""The README keeps its promises: its code runs as printed, its links lead somewhere, its commands exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "LOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]


def test_python_of_the_readme_runs_as_printed(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 15
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trainable params" in done.stdout
    assert re.findall(r"^# (read .*)$", blocks[0], re.MULTILINE)[0] in done.stdout  # the output that the page shows
    assert (tmp_path / "my-memory" / "adapter_model.safetensors").is_file()
    assert "KeepsightWarning" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_commands_of_the_docs_exist():
    from keepsight.cli import COMMANDS

    for page in PAGES:
        for line in re.findall(r"^ *(?:\$ )?keepsight ([a-z-]+(?: [a-z-]+)?)", page.read_text(), re.MULTILINE):
            first, _, second = line.partition(" ")
            assert first in COMMANDS, f"{page.name}: keepsight {line}"
            command = getattr(importlib.import_module(COMMANDS[first][0]), COMMANDS[first][1])
            if second and isinstance(command, typer.Typer):
                known = get_command(command).commands
                assert second in known, f"{page.name}: keepsight {line}"


def test_nothing_says_to_install_from_an_index_what_is_not_in_it():
    if "not yet published" not in (ROOT / "CHANGELOG.md").read_text():
        pytest.skip("it is published")
    told = [*PAGES, *(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "examples").glob("*"), *ROOT.glob("recipes/**/*")]
    files = [path for path in told if path.is_file() and path.suffix in {".md", ".ipynb", ".py", ".sh"}]
    from_index = r'pip install (?:[^\n`#]* )?"?keepsight[\[" ]'
    assert [str(path) for path in files if re.search(from_index, path.read_text().replace('\\"', '"'))] == []


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)`?", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_nothing_committed_names_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".json", ".toml", ".html", ".yaml", ".sh", ""}
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.suffix in suffixes and path.is_file() and path.name != "test_readme.py":
            text = path.read_text(errors="ignore")
            found += [name for pattern in (r"/root/", r"/home/\w+/", r"/Users/\w+/") if re.search(pattern, text)]
    assert found == []


def test_the_image_of_the_examples_is_the_one_that_ships():
    shipped = ROOT / "src" / "keepsight" / "lab" / "digits.png"
    assert (ROOT / "examples" / "digits.png").read_bytes() == shipped.read_bytes()
