"""All studies by name. To add some, write a module with a tuple `STUDIES` (see `keepsight.lab.study.study`) and name it
in `MODULES`."""

from __future__ import annotations

import importlib
from functools import lru_cache

from keepsight.lab.study.study import Study, StudyError

MODULES = (
    "studies.pvm.studies",
    "studies.pvm.ablations",
    "studies.vismem.studies",
    "studies.vismem.ablations",
    "studies.vismem.scratch",
    "studies.tasks.memory",
    "studies.tasks.transfer",
    "studies.tasks.overwriting",
    "studies.tasks.video",
    "studies.tasks.hallucination",
    "studies.tasks.forgetting",
    "studies.price",
)
"""Modules with a tuple `STUDIES`, in the order of the report."""


@lru_cache(maxsize=1)
def all_studies() -> dict[str, Study]:
    """Every study by name, in the order of the report."""
    found: dict[str, Study] = {}
    for module in MODULES:
        for study in importlib.import_module(module).STUDIES:
            assert study.name not in found, study.name
            found[study.name] = study
    return found


def choose(names: list[str] | None = None) -> list[Study]:
    """Studies by name or by the beginning of names ("pvm" for all of PVM's); all without names.

    Raises:
        StudyError: a name that fits none.
    """
    known = all_studies()
    if not names:
        return list(known.values())
    chosen: dict[str, Study] = {}
    for name in names:
        fits = [name] if name in known else [other for other in known if other.startswith(name)]
        if not fits:
            raise StudyError(f"No study is called {name!r}. There are: {', '.join(known)}.")
        chosen |= {fit: known[fit] for fit in fits}
    return [study for name, study in known.items() if name in chosen]
