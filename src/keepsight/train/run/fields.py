"""Fields of settings dataclasses: default, help and option names of a setting, in one place.

The command line makes its options of them, and they document the dataclass. Nothing here is slow to import.
"""

from __future__ import annotations

import inspect
from dataclasses import Field, dataclass, field, fields
from typing import TypeVar

T = TypeVar("T")

DATA, MEMORY, REWARD, STEPS, RUN = "Data", "The memory", "Rollouts and rewards", "Optimisation", "The run"
#: The panels of a command's help, in their order.
PANELS = (DATA, MEMORY, REWARD, STEPS, RUN)
_KEY = "keepsight"


@dataclass(frozen=True)
class Setting:
    """What the command line knows of a field.

    Attributes:
        help: what it means, in a line or two.
        panel: one of `PANELS`.
        names: of the option, where it is not the field's with dashes.
        zero_is_none: the command line writes 0 for None.
    """

    help: str
    panel: str
    names: tuple[str, ...] = ()
    zero_is_none: bool = False


def setting(default: T, help: str, panel: str, *names: str, zero_is_none: bool = False) -> T:
    """A field with this default, which is an option of the command line; see `Setting`."""
    found = Setting(help, panel, names, zero_is_none)
    return field(default=default, metadata={_KEY: found})


def setting_of(item: Field) -> Setting | None:
    """What the command line knows of a field; None for one that is no option."""
    return item.metadata.get(_KEY)


def documented(cls: type[T]) -> type[T]:
    """Class decorator: add the settings' meanings to the docstring of a dataclass."""
    lines = [f"    {item.name}: {found.help}" for item in fields(cls) if (found := setting_of(item))]  # type: ignore[arg-type]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines, ""])
    return cls
