"""What every memory needs to become a method of PEFT, and to refuse settings that it does not know."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any

from peft.utils import PeftType


def add_peft_type(name: str) -> None:
    """Add a member to PEFT's closed list of methods; the rest is PEFT's own `register_peft_method`."""
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(PeftType)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


def refuse_unknown_keys(cls: type) -> type:
    """Class decorator: make `cls(**kwargs)` raise ValueError for unknown names.

    A dataclass raises TypeError, which PEFT takes as "a newer config" when it reads one from disk: it drops the key
    with a warning, and the user's setting silently has no effect.
    """
    init = vars(cls)["__init__"]
    names = [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{cls.__name__} has no setting {name!r}.{hint} Known: {', '.join(sorted(names))}.")
        init(self, *args, **kwargs)

    setattr(cls, "__init__", checked)  # noqa: B010 - mypy refuses the plain assignment
    return cls
