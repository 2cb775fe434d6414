"""Brings packages from their registries: sizes and licences first, then each file, resumed and verified."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from keepsight.errors import KeepsightError
from studies.eye.registries.packages import Package

PYPI, NPM = "https://pypi.org/simple", "https://registry.npmjs.org"
_CHUNK = 1 << 20


class FetchError(KeepsightError):
    """A package could not be brought, or is not the file that was pinned."""


class _Links(HTMLParser):
    """The links of a page of a simple index (PEP 503)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def told(packages: Sequence[Package], folder: Path) -> list[str]:
    """One line a package: what is to be brought, how large it is, its licence; and the sum."""
    lines = [
        f"{package.name} {package.version}: {package.size / 1e6:.1f} MB, {package.licence}, {package.use}"
        + (", here already" if _is_here(package, folder) else "")
        for package in packages
    ]
    missing = sum(package.size for package in packages if not _is_here(package, folder))
    return [*lines, f"{missing / 1e6:.1f} MB to fetch into {folder}"]


def fetch(
    packages: Sequence[Package],
    folder: Path,
    pypi: str = PYPI,
    npm: str = NPM,
    on_progress: Callable[[Package, int], Any] = lambda package, done: None,
) -> None:
    """Bring every package's file into `folder`; what is there and whole is left.

    A file on its way ends in `.part`; the next call asks for the rest of it.

    Args:
        packages: what to bring.
        folder: where to.
        pypi: address of a simple index (PEP 503).
        npm: address of an npm registry.
        on_progress: called with the package and how many of its bytes are here.

    Raises:
        FetchError: a registry does not answer, does not have the file, or has another one than was pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not _is_here(package, folder):
            address = _on_pypi(package, pypi) if package.registry == "pypi" else _on_npm(package, npm)
            _bring(package, address, folder, on_progress)


def checked(package: Package, folder: Path) -> Path:
    """The fetched file, whose size is right.

    Raises:
        FetchError: it is missing.
    """
    if not _is_here(package, folder):
        raise FetchError(f"{package.file} is not in {folder}. Get it first: python -m studies eye fetch")
    return folder / package.file


def _is_here(package: Package, folder: Path) -> bool:
    """A file gets its name only after its sha256 was right, so size is enough afterwards."""
    place = folder / package.file
    return place.is_file() and place.stat().st_size == package.size


def _open(address: str, headers: dict[str, str] | None = None) -> Any:
    try:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers or {}), timeout=60)
    except urllib.error.HTTPError as error:
        raise FetchError(f"{address} answers {error.code} ({error.reason}). Is it the right registry?") from error
    except OSError as error:
        raise FetchError(
            f"{address} cannot be reached ({error}). Name a registry that can be: --pypi (a simple index), --npm."
        ) from error


def _on_pypi(package: Package, index: str) -> str:
    page = f"{index.rstrip('/')}/{package.name}/"
    with _open(page, {"Accept": "text/html"}) as answer:
        page = answer.geturl()
        links = _Links()
        links.feed(answer.read().decode("utf-8", "replace"))
    for link in links.found:
        address = urllib.parse.urldefrag(urllib.parse.urljoin(page, link)).url
        if urllib.parse.unquote(address.rpartition("/")[2]) == package.file:
            return address
    raise FetchError(f"{page} has no {package.file}. It may be a mirror that lacks it; name another one: --pypi.")


def _on_npm(package: Package, registry: str) -> str:
    about = f"{registry.rstrip('/')}/{urllib.parse.quote(package.name, safe='@')}/{package.version}"
    with _open(about) as answer:
        try:
            return str(json.load(answer)["dist"]["tarball"])
        except (ValueError, KeyError, TypeError) as error:
            raise FetchError(f"{about} is no answer of an npm registry. Name one: --npm.") from error


def _bring(package: Package, address: str, folder: Path, on_progress: Callable[[Package, int], Any]) -> None:
    part = folder / f"{package.file}.part"
    done = part.stat().st_size if part.is_file() else 0
    if done >= package.size:
        part.unlink()
        done = 0
    with _open(address, {"Range": f"bytes={done}-"} if done else None) as answer:
        if done and answer.status != 206:  # a registry without ranges sends the whole
            done = 0
        with part.open("ab" if done else "wb") as file:
            while chunk := answer.read(min(_CHUNK, package.size - done + 1)):
                file.write(chunk)
                done += len(chunk)
                on_progress(package, done)
    if done < package.size:
        raise FetchError(f"{package.file}: the connection ended after {done} of {package.size} bytes. Call again.")
    with part.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if done > package.size or digest.hexdigest() != package.sha256:
        part.unlink()
        raise FetchError(
            f"{package.file} from {address} is another file: sha256 {digest.hexdigest()} of {done} bytes, and "
            f"{package.sha256} of {package.size} was pinned. It was thrown away."
        )
    part.rename(folder / package.file)
