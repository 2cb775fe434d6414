"""Whether the libraries at hand are among the releases that keepsight was tested with; if not, that is said once.

The ranges are those of pyproject.toml, as they stand in the installed package's metadata: their upper bounds are the
minors right above the newest that were tested (tests/project/test_locks.py). pip keeps to them; whoever goes beyond
them by hand shall know.
"""

from __future__ import annotations

import functools
import warnings
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from keepsight.errors import KeepsightWarning

LIBRARIES = ("torch", "transformers", "peft")  # those whose minors have changed what a memory hangs on


def warn_of_untested(*names: str) -> None:
    """Warn of each library, once in a process, that is newer or older than what was tested; default: `LIBRARIES`."""
    for name in names or LIBRARIES:
        _warn_of(name)


@functools.cache
def _warn_of(name: str) -> None:
    try:
        requirements = map(Requirement, metadata.requires("keepsight") or ())
        version = metadata.version(name)
    except metadata.PackageNotFoundError:  # keepsight on the path alone, which knows no ranges; or no such library
        return
    tested = next((requirement.specifier for requirement in requirements if requirement.name == name), SpecifierSet())
    found = why_untested(name, version, tested)
    if found:
        warnings.warn(found, KeepsightWarning, stacklevel=4)


def why_untested(name: str, version: str, tested: SpecifierSet) -> str | None:
    """One sentence if a version lies outside the tested range, which is like ">=5.17,<5.25"; None if within."""
    if tested.contains(version, prereleases=True):
        return None
    bounds = {clause.operator: Version(clause.version) for clause in tested}
    if ">=" in bounds and Version(version) < bounds[">="]:
        return f"{name} {version} is older than what was tested ({bounds['>=']}). Install {name}{tested}."
    end = bounds.get("<")
    newest = f"{end.major}.{end.minor - 1}" if end and end.minor else f"{tested}"
    return (
        f"{name} {version} is newer than what was tested ({newest}). A memory that finds something changed refuses by "
        f'name; if anything looks wrong, install "{name}{tested}".'
    )
