"""The documentation site: the repository's own pages, laid out as they are, and a reference made from the docstrings.

    python tools/site.py            # `make docs`: into site/, every link and every reference checked
    python tools/site.py --serve    # the same at http://127.0.0.1:8000, made again as pages change on the next start

Pages stay where they are written and read well in any forge: this copies every tracked page, and every file that one
of them links to, into a folder that MkDocs builds strictly. A link that leads nowhere ends the build.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
#: Title of a page of the reference -> the public face it shows.
REFERENCE = {
    "keepsight": "keepsight",
    "keepsight.pvm": "keepsight.pvm",
    "keepsight.vismem": "keepsight.vismem",
    "keepsight.train": "keepsight.train",
    "keepsight.diagnose": "keepsight.diagnose",
    "keepsight.evaluate.run": "keepsight.evaluate.run",
    "keepsight.errors": "keepsight.errors",
}


def tracked() -> list[str]:
    """Every page of the repository."""
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True)
    return [name for name in found.stdout.decode().splitlines() if not name.startswith("tests")]


def gather(folder: Path) -> None:
    """Copy the pages and what they link to; write the pages of the reference."""
    broken = []
    for name in tracked():
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        for link in LINK.findall(text):
            target = (page.parent / link).resolve()
            if not target.is_relative_to(ROOT) or not target.exists():
                broken.append(f"{name}: the link {link} leads nowhere.")
            elif target.is_file() and target.suffix != ".md":
                place(target.read_bytes(), folder / target.relative_to(ROOT))
        place(listed(text, page).encode(), folder / name)
    if broken:
        sys.exit("\n".join(broken))
    for title, face in REFERENCE.items():
        place(reference(title, face).encode(), folder / "reference" / f"{title}.md")


def listed(text: str, page: Path) -> str:
    """A page whose links to folders lead to their README, or, where there is none, are plain words."""

    def instead(match: re.Match) -> str:
        words, link = match.groups()
        target = (page.parent / link).resolve()
        if not target.is_dir():
            return match.group(0)
        return f"[{words}]({link.rstrip('/')}/README.md)" if (target / "README.md").is_file() else words

    return re.sub(r"\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)\)", instead, text)


def reference(title: str, face: str) -> str:
    """A page that shows a public face: its names, each where it is defined."""
    import importlib

    module = importlib.import_module(face)
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if callable(value) and value.__module__ == face and not name.startswith("_")
    ]
    lines = [f"# {title}", "", (module.__doc__ or "").strip(), ""]
    for name in sorted(names):
        value = getattr(module, name)
        home = getattr(value, "__module__", "")
        if home.startswith("keepsight"):
            lines += [f"::: {home}.{value.__name__}", ""]
    if len(lines) == 4:
        sys.exit(f"The reference of {face} is empty: it has no __all__, and defines nothing itself.")
    return "\n".join(lines) + "\n"


def place(content: bytes, target: Path) -> None:
    """Write a file, and the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def build(out: Path) -> int:
    """Build the site; the exit status of MkDocs."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "pages"
        gather(source)
        settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        config = Path(name) / "mkdocs.yml"
        config.write_text(f"{settings}\ndocs_dir: {source}\nsite_dir: {out.resolve()}\n", encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(config)]
        ).returncode


def main(argv: list[str] | None = None) -> int:
    """Build, and show it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder to make")
    parser.add_argument("--serve", action="store_true", help="then show it at http://127.0.0.1:8000")
    given = parser.parse_args(argv)
    shutil.rmtree(given.out, ignore_errors=True)
    status = build(given.out)
    if status == 0 and given.serve:
        return subprocess.run([sys.executable, "-m", "http.server", "-b", "127.0.0.1", "-d", str(given.out)]).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
