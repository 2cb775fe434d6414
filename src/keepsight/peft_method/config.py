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
from keepsight.shipped import portable_name


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


class MemoryConfig(PeftConfig):
    """PEFT's config, as all memories need it: resolved for one base, and saved with a model card of ours."""

    def check_base(self, model_config: Any) -> dict[str, Any]:
        """Compare the base this config was resolved for, if it was, with a model's configuration.

        Returns:
            The `base_*` settings as they would be for that model.

        Raises:
            AdapterMismatchError: if they differ.
        """
        found = self._base_settings(model_config)
        recorded = {name: getattr(self, name) for name in found}
        wrong = [name for name, value in recorded.items() if value is not None and value != found[name]]
        if wrong:
            raise AdapterMismatchError(
                "This memory was made for another base model: "
                + ", ".join(f"{name.removeprefix('base_')} {recorded[name]}, here {found[name]}" for name in wrong)
                + f". Load it on {self.base_model_name_or_path or 'the model it was trained with'}, "
                f"or train a new one with a fresh {type(self).__name__}()."
            )
        return found

    def _base_settings(self, model_config: Any) -> dict[str, Any]:
        """Those fields of the config that say which base it is for, as they are for this model."""
        text = model_config.get_text_config()
        return {
            "base_model_type": model_config.model_type,
            "base_num_layers": text.num_hidden_layers,
            "base_hidden_size": text.hidden_size,
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields, as saved in `adapter_config.json`."""
        return dataclasses.asdict(self) | {"base_model_name_or_path": portable_name(self.base_model_name_or_path)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's own; then the card, and weights that may be read as the umask says."""
        config = card.to_be_written(self)
        super(MemoryConfig, config).save_pretrained(save_directory, **kwargs)
        card.finish(Path(save_directory), config)
