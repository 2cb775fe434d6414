"""What lies beside a saved memory for people and the hub: a model card of ours, and files that everybody may read.

PEFT leaves a template to fill in, with the base's folder on this machine as its name.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from keepsight.errors import KeepsightWarning
from keepsight.modes import readable
from keepsight.shipped import REFERENCE_NAME, SHIPPED_NAMES, portable_name

CARD = "README.md"
_TEMPLATES = "# Model Card for Model ID"  # stands in PEFT's
_OURS = "<!-- written by keepsight -->"
_LOCAL = """
Its base was read from a folder, whose place on the machine that wrote this stands in adapter_config.json. To publish
it, name the base there by its id on the hub; `model.push_to_hub` leaves the place out by itself, `hf upload` does not.
"""
_METHODS = {"PVM": "Persistent visual memory (PVM)", "VISMEM": "Latent vision memory (VisMem)"}
_publishing: ContextVar[bool] = ContextVar("keepsight_publishing", default=False)


def publishing(push: Callable[..., Any]) -> Callable[..., Any]:
    """A `push_to_hub` in whose calls `to_be_written` knows that what is saved will be sent."""

    @functools.wraps(push)
    def push_to_hub(*args: Any, **kwargs: Any) -> Any:
        token = _publishing.set(True)
        try:
            return push(*args, **kwargs)
        finally:
            _publishing.reset(token)

    return push_to_hub


def hub_name(base: str | None) -> str | None:
    """A base's id on the hub, for a card's metadata; None for a folder of this machine and for what is shipped."""
    is_id = base is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) is not None
    return base if is_id and base not in SHIPPED_NAMES and not Path(str(base)).exists() else None


def names_base(base: str | None) -> str:
    """The line of a card's metadata that names its base, or nothing."""
    named = hub_name(base)
    return f"base_model: {named}\n" if named else ""


def to_be_written(config: Any) -> Any:
    """A memory's config as `save_pretrained` is to write it: where that is done to publish it (`push_to_hub`), without
    the name of a folder of this machine, which helps nobody elsewhere and is nobody's business.

    Args:
        config: the memory's; is left as it is.
    """
    base = portable_name(config.base_model_name_or_path)
    if not base or base in SHIPPED_NAMES or hub_name(base) or not _publishing.get():
        return config
    warnings.warn(
        f"What is published does not name its base: {base} is a folder of this machine. Name it by its id on the hub "
        "before: model.peft_config[NAME].base_model_name_or_path = 'owner/name'. Without, it is loaded with "
        "keepsight.load(..., base=...).",
        KeepsightWarning,
        stacklevel=6,
    )
    config = copy.copy(config)
    config.base_model_name_or_path = None
    return config


def finish(folder: Path, config: Any) -> None:
    """Put our card into a folder that PEFT has just written, unless it holds one that was written by hand.

    Args:
        folder: with adapter_config.json, and the weights beside it.
        config: the memory's.
    """
    readable(folder.glob("adapter_model*.safetensors"))
    above = folder.parent / CARD
    if not (folder.parent / "adapter_config.json").is_file() and above.is_file() and _TEMPLATES in above.read_text():
        above.unlink()  # an adapter with a name of its own lies in a folder of its own; PEFT's template does not
    file = folder / CARD
    if not file.is_file() or any(mark in file.read_text() for mark in (_TEMPLATES, _OURS)):
        file.write_text(_card(config), encoding="utf-8")
        return
    card = ModelCard.load(file, ignore_metadata_errors=True)
    card.data.base_model = hub_name(config.base_model_name_or_path)
    card.data.tags = [tag for tag in card.data.tags or [] if not str(tag).startswith("base_model:")] or None
    card.save(file)


def _card(config: Any) -> str:
    recorded = portable_name(config.base_model_name_or_path)
    base = hub_name(recorded)
    named = base or f"a model of type {config.base_model_type}"
    if recorded == REFERENCE_NAME:
        named = f"{REFERENCE_NAME}, which comes with keepsight"
    is_local = base is None and recorded != REFERENCE_NAME
    more = ", base=FOLDER" if is_local else ""
    publishing = _LOCAL if is_local and recorded else ""
    known = {
        "base": named,
        "decoder of the base": f"{config.base_num_layers} layers of width {config.base_hidden_size}",
        "layers": getattr(config, "layers", None),
        "latent width": getattr(config, "width", None),
        "rule": ("causal" if config.causal else "published (non-causal)") if hasattr(config, "causal") else None,
        "latents": f"{config.num_short} short, {config.num_long} long" if hasattr(config, "num_short") else None,
        "invoked": getattr(config, "policy", None),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in known.items() if value is not None)
    metadata = names_base(base) + ("base_model_relation: adapter\n" if base else "")
    tag = config.peft_type.value.lower()
    return f"""---
{metadata}library_name: peft
tags: [keepsight, {tag}, vision-language]
---
{_OURS}

# {_METHODS[config.peft_type.value]} for {named}

A memory for what a vision-language model sees, to be put on its base by [PEFT](https://huggingface.co/docs/peft) with
`keepsight`.

```python
import keepsight

model, processor = keepsight.load("this folder or its hub id"{more})
```
{publishing}
| | |
|---|---|
{table}
"""
