"""How to install what a command misses, for the way in which keepsight itself was installed."""

from __future__ import annotations

import json
from pathlib import Path


class MissingExtraError(ImportError):
    """A library of one of keepsight's extras is not installed."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} Install it: {install_line(extra)}")


def install_line(extra: str) -> str:
    """The command that installs an extra of the keepsight that is running.

    A clone that was installed with `pip install -e` is not in an index, nor is what came from a URL.
    """
    origin = _origin()
    if origin is None:
        return f'pip install "keepsight[{extra}]"'
    url = origin.get("url", "")
    if "dir_info" in origin:
        from urllib.parse import unquote, urlparse

        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f'pip install {editable}"{Path(unquote(urlparse(url).path))}[{extra}]"'
    if "vcs_info" in origin:
        version = origin["vcs_info"].get("requested_revision") or origin["vcs_info"].get("commit_id")
        url = f"{origin['vcs_info'].get('vcs', 'git')}+{url}{f'@{version}' if version else ''}"
    return f'pip install "keepsight[{extra}] @ {url}"'


def _origin() -> dict | None:
    """Where keepsight was installed from, as pip and uv record it (PEP 610); None for an index.

    Code that runs from a clone's folder without having been installed is taken as a clone.
    """
    from importlib import metadata

    try:
        recorded = metadata.distribution("keepsight").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        clone = Path(__file__).parents[2]
        if not (clone / "pyproject.toml").is_file():
            return None
        return {"url": clone.as_uri(), "dir_info": {"editable": True}}
    return None if recorded is None else json.loads(recorded)
