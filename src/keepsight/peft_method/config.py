"""A memory's config: refuses unknown keys and another base, and is saved with a model card."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from pathlib import Path
from typing import Any

from peft import PeftConfig

from keepsight import card
from keepsight.errors import AdapterMismatchError
from keepsight.settings import check_kinds


def refuse_unknown_keys(cls: type) -> type:
    """Class decorator: make `cls(**kwargs)` raise ValueError for unknown names, and for values of another kind.

    What `cls.retired` names, setting -> (value, lesson), may be given with that value only, and is dropped.

    A dataclass raises TypeError, which PEFT takes as "a newer config" when it reads one from disk: it drops the key
    with a warning, and the user's setting silently has no effect.
    """
    init = vars(cls)["__init__"]
    names = [f.name for f in dataclasses.fields(cls)]
    retired: dict[str, tuple[Any, str]] = getattr(cls, "retired", {})

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in retired.keys() & kwargs.keys():
            found, (only, lesson) = kwargs.pop(name), retired[name]
            if found != only:
                raise ValueError(f"{name}={found!r}: {lesson}")
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{cls.__name__} has no setting {name!r}.{hint} Known: {', '.join(sorted(names))}.")
        check_kinds(cls, kwargs)
        init(self, *args, **kwargs)

    setattr(cls, "__init__", checked)  # noqa: B010 - mypy refuses the plain assignment
    return cls


def config_from_adapter(cls: type, saved: dict[str, Any]) -> Any:
    """The config of class `cls` that an `adapter_config.json` holds, as a dictionary."""
    return cls(**{name: value for name, value in saved.items() if name not in ("peft_type", "auto_mapping")})


def check_base(config: Any, model_config: Any, **more: Any) -> dict[str, Any]:
    """Compare the base that a memory's config was resolved for, if it was, with a model's configuration.

    Args:
        config: the memory's config, with fields of these names.
        model_config: the configuration of the model at hand.
        more: further `base_*` settings of the method, as they are for that model.

    Returns:
        The `base_*` settings as they would be for that model.

    Raises:
        AdapterMismatchError: if they differ.
    """
    text = model_config.get_text_config()
    found = {
        "base_model_type": model_config.model_type,
        "base_num_layers": text.num_hidden_layers,
        "base_hidden_size": text.hidden_size,
        **more,
    }
    recorded = {name: getattr(config, name) for name in found}
    wrong = [name for name, value in recorded.items() if value is not None and value != found[name]]
    if wrong:
        raise AdapterMismatchError(
            "This memory was made for another base model: "
            + ", ".join(f"{name.removeprefix('base_')} {recorded[name]}, here {found[name]}" for name in wrong)
            + f". Load it on {config.base_model_name_or_path or 'the model it was trained with'}, "
            f"or train a new one with a fresh {type(config).__name__}()."
        )
    return found


class MemoryConfig(PeftConfig):
    """PEFT's config, as all memories need it: saved with a model card of ours."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's own; then the card, and weights that may be read as the umask says."""
        config = card.to_be_written(self)
        super(MemoryConfig, config).save_pretrained(save_directory, **kwargs)
        card.finish(Path(save_directory), config)
