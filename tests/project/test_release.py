"""What a release rests on: one version, a site without a dead link, notebooks that run, workflows that call make."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def tool(name):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        place = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_version_from_one_place():
    release = tool("release")
    release.check_versions(f"v{release.version()}")
    with pytest.raises(SystemExit, match=r"expected v"):
        release.check_versions("v99.0.0")
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_site_builds_without_a_dead_link(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "site.py"), "--out", str(tmp_path / "site")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PvmConfig" in (tmp_path / "site" / "reference" / "keepsight.pvm" / "index.html").read_text()
    assert "fonts.googleapis" not in (tmp_path / "site" / "index.html").read_text()


def test_every_page_of_the_navigation_exists():
    def pages(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(value)

    listed = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert {page for page in listed if not page.startswith("reference/") and not (ROOT / page).is_file()} == set()
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert ours - listed == set(), "a page that the navigation does not show"


def test_a_page_of_the_reference_that_would_be_empty_ends_the_build():
    site = tool("site")
    assert "train_pvm" in site.reference("training", "keepsight.train")
    with pytest.raises(SystemExit, match=r"reference of keepsight.serve is empty"):
        site.reference("serving", "keepsight.serve")


def test_a_dead_link_ends_the_build(tmp_path, monkeypatch):
    site = tool("site")
    (tmp_path / "page.md").write_text("[gone](nowhere.md) and [there](page.md)")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "tracked", lambda: ["page.md"])
    with pytest.raises(SystemExit, match=r"page.md: the link nowhere.md leads nowhere"):
        site.gather(tmp_path / "out")


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.stem)
def test_workflows_call_make_targets_that_exist(file):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load(file.read_text())
    called = set()
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in job["steps"]:
            for name in re.findall(r"make (\S+)", step.get("run", "").replace("${{ matrix.target }}", "MATRIX")):
                called |= set(matrix) if name == "MATRIX" else {name}
    assert called - targets == set()
    assert workflow["permissions"]["contents"] == "read"


@pytest.mark.parametrize("file", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_run(file, tmp_path):
    """From top to bottom, in another folder; none is kept with outputs, which would grow old."""
    book = nbformat.read(file, as_version=4)
    assert not [cell for cell in book.cells if cell.get("outputs")]
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [
        cell["outputs"][-1]["data"]["text/plain"]
        for cell in book.cells
        if cell.get("outputs") and "data" in cell["outputs"][-1]
    ]
    assert said
