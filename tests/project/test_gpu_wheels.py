"""`make gpu-wheels` brings along all that a machine with torch and transformers, and without a network, lacks."""

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from install import pinned

#: What the GPU suite and the benchmarks run on, beside keepsight's own requirements.
RUNS_ON = ("keepsight[train]", "pytest", "psutil", "bitsandbytes")
#: What such a machine has, each built for its CUDA.
HAS = ("torch", "torchvision", "transformers")
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.0"}  # the oldest that the list is for
ROOT = Path(__file__).parents[2]


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of everything that is installed for these requirements, on this machine."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in found:
                continue
            found.add((name, extra))
            for needed in map(Requirement, metadata.requires(name) or ()):
                if needed.marker is None or needed.marker.evaluate(PYTHON | {"extra": extra}):
                    waiting.append(needed)
    return {name for name, _ in found}


def test_the_wheels_are_what_a_bare_machine_lacks() -> None:
    brought = re.search(r"^GPU_WHEELS = (.*?[^\\])$", (ROOT / "Makefile").read_text(), re.DOTALL | re.MULTILINE)
    assert brought
    names = brought[1].replace("\\", " ").split()
    locked = pinned(ROOT / "locks" / "dev.txt")
    assert not set(names) - locked.keys()
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    other = [name for name in names if installed.get(name) != locked[name]]
    if other:
        pytest.skip(f"what they need is another matter in other versions than the lock's: {', '.join(other)}")
    assert sorted(names) == sorted(closure(RUNS_ON) - closure(HAS) - {"keepsight"})
