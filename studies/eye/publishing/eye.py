"""The eye as one file: what was learnt, in bfloat16, and what it was made with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from keepsight.errors import KeepsightError
from keepsight.modes import readable
from studies.eye.language import with_eye
from studies.eye.making.align import with_lora
from studies.eye.registries.packages import LANGUAGE_MODEL, PICTURES
from studies.eye.sizes import PUBLISHED, SIZES, Size

EYE = "eye.safetensors"
"""The trained parts: tower, projector, LoRA."""


def write(model: Any, size: Size, concepts: list[str], cpu_seconds: dict[str, float], done: bool, folder: Path) -> None:
    """Write the trained parts of `model` into `folder`; the same parts give the same file.

    They are rounded to bfloat16 here, so that whatever is measured is measured on what can be published.

    Args:
        model: a Qwen2.5-VL with an eye and, where `size` has one, a LoRA that is not merged.
        size: of the eye.
        concepts: the words that it learnt to name.
        cpu_seconds: of each stage so far.
        done: nothing is left to learn.
        folder: of the file `EYE`.
    """
    about = {
        "size": next((name for name, one in SIZES.items() if one == size), "other"),
        "settings": size.settings(),
        "concepts": concepts,
        "packages": [vars(package) for package in (LANGUAGE_MODEL, *PICTURES)],
        "cpu_seconds": cpu_seconds,
        "done": done,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    learnt = {
        name.replace(".base_layer", ""): value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.named_parameters()
        if _learnt(name)
    }
    # one entry: several would stand in any order, and the file's sha256 is what an eye is known by
    save_file(learnt, folder / EYE, {"about": json.dumps(about)})
    readable([folder / EYE])


def about_eye(folder: Path) -> dict[str, Any]:
    """What an eye was made with, and its file's `sha256`.

    Raises:
        KeepsightError: there is no eye in `folder`, or one that `write` has not written.
    """
    file = folder / EYE
    if not file.is_file():
        raise KeepsightError(
            f"{file} is not there, so there is no eye yet. Take one that somebody published, as a clone of keepsight "
            f"has one (--eye {PUBLISHED}), or make one: python -m studies eye make"
        )
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["about"])
    except (SafetensorError, KeyError) as error:
        raise KeepsightError(
            f"{file} does not say what it was made with ({error!r}): it is damaged, or older than this. If it was made "
            "here, `python -m studies eye make` writes it again."
        ) from error
    return {**about, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def made_model(
    language: Any, tokenizer: Any, folder: Path, size: Size | None = None
) -> tuple[Any, Size, dict[str, Any]]:
    """The language model with the eye in `folder`, LoRA merged, in float32; its size, and what is known of it.

    Args:
        language, tokenizer: the language model.
        folder: where `make` left the eye, or of a published one.
        size: what the eye must have been made with; None takes what it says of itself.

    Raises:
        KeepsightError: there is no eye yet, it is of another size, or no whole one.
    """
    about = about_eye(folder)
    try:
        own = Size(**{**about["settings"], "sides": tuple(about["settings"]["sides"])})
    except TypeError as error:
        raise KeepsightError(f"{folder / EYE} was made with settings that are unknown here: {error}.") from error
    if size not in (None, own):
        raise KeepsightError(f"{folder / EYE} was made with other settings than this size has now.")
    model = with_eye(language, tokenizer, own)
    with safe_open(folder / EYE, "pt") as opened:
        learnt = {key: opened.get_tensor(key).float() for key in list(opened.keys())}
    wrapped = with_lora(model, own) if own.lora else None
    expected = {name.replace(".base_layer", ""): value.shape for name, value in model.named_parameters()}
    wanted = {name: shape for name, shape in expected.items() if _learnt(name)}
    other = sorted(wanted.items() ^ {name: value.shape for name, value in learnt.items()}.items())
    if other:
        raise KeepsightError(
            f"{folder / EYE} is no eye for this language model: {other[0][0]}, {list(other[0][1])}, stands on one side."
        )
    model.load_state_dict(learnt, strict=False)
    if wrapped is not None:
        model = wrapped.merge_and_unload()
    return model, own, about


def _learnt(name: str) -> bool:
    return ".visual." in name or "lora_" in name
