"""What every memory shares as a method of PEFT: its name in the list, and a config that knows its settings and base."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any

from peft.utils import PeftType

from keepsight.errors import AdapterMismatchError


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


def config_from_adapter(cls: type, saved: dict[str, Any]) -> Any:
    """The config of class `cls` that an `adapter_config.json` holds, as a dictionary."""
    return cls(**{name: value for name, value in saved.items() if name not in ("peft_type", "auto_mapping")})


def check_base(config: Any, found: dict[str, Any]) -> None:
    """Compare the base that a config was resolved for, if it was, with the one it is put on.

    Args:
        config: the memory's config, with fields of these names.
        found: base_model_type, base_num_layers and so on, of the model at hand.

    Raises:
        AdapterMismatchError: if they differ.
    """
    recorded = {name: getattr(config, name) for name in found}
    wrong = [name for name, value in recorded.items() if value is not None and value != found[name]]
    if wrong:
        raise AdapterMismatchError(
            "This memory was made for another base model: "
            + ", ".join(f"{name.removeprefix('base_')} {recorded[name]}, here {found[name]}" for name in wrong)
            + f". Load it on {config.base_model_name_or_path or 'the model it was trained with'}, "
            f"or train a new one with a fresh {type(config).__name__}()."
        )
