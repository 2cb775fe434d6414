"""A base model by name: is it there, whole, of a family we know, and are its tensors those of its model, in full?

transformers fills what a checkpoint lacks with random numbers and goes on; here that is an error, before the weights
are read where the folder is at hand, and after in any case.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import str_to_torch_dtype

from keepsight.backbone import family_of
from keepsight.checkpoints.shards import read_header, weight_files
from keepsight.errors import KeepsightError
from keepsight.loading import most_alike
from keepsight.shipped import resolve_base

_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]+:/|[\w.-]{2,}:\d+(/|$)")  # "C:/models" is a folder


def refuse_address(source: str | Path) -> None:
    """Refuse a web address where a folder or a hub id is expected.

    Raises:
        KeepsightError: saying what to write instead.
    """
    found = _ADDRESS.match(str(source))
    if found is None or Path(source).exists():
        return
    page = re.match(r"https?:/+(www\.)?(huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)", str(source))
    if page is not None:
        raise KeepsightError(f"{source} is the address of a page; a model on the hub is named by its id: {page['id']}")
    raise KeepsightError(
        f"{source} is a web address, where a folder or a hub id (owner/name) is expected. A server that runs keeps "
        "its model to itself: talk to it by the OpenAI API, or on a page: keepsight chat ADDRESS."
    )


def base_config(source: str | Path, revision: str | None = None, local: bool = False) -> Any:
    """The configuration of a VLM, from a folder or the hub.

    Args:
        source: a folder, a hub id, or the name of what is shipped.
        revision: on the hub.
        local: look into the hub's cache only.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing of that name can be reached on the hub.
        UnsupportedModelError: if it is not a vision-language model that keepsight knows.
    """
    refuse_address(source)
    path = resolve_base(source)
    folder = Path(path).expanduser()
    if folder.is_file():
        raise KeepsightError(f"{source} is a file; a model is a folder (with config.json) or a hub id.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = ""
        if any(folder.glob("checkpoint-*/adapter_config.json")):
            hint = " It holds checkpoints of an unfinished training run; name one of them, or finish it with --resume."
        raise FileNotFoundError(
            f"{source} holds neither a model (config.json) nor an adapter (adapter_config.json).{hint}"
        )
    if not folder.exists() and (str(source).startswith((".", "/", "~")) or str(source).count("/") > 1):
        raise FileNotFoundError(f"{source}: no such folder.")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, local_files_only=local, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"{source}: no such folder here, and no model of that name can be reached on the Hugging Face hub. "
            "Check the name, your connection, and whether the model needs a login (hf auth login)."
        ) from error
    except (ValueError, KeyError) as error:
        stored, _ = PreTrainedConfig.get_config_dict(path, revision=revision, local_files_only=local)
        if stored.get("model_type") not in CONFIG_MAPPING:  # not transformers' own: the family's error says more
            family_of(SimpleNamespace(**stored), str(source))
        raise KeepsightError(
            f"{source}: its config.json cannot be used ({' '.join(str(error).split())[:300]})"
        ) from error
    family_of(config, str(source))
    if hasattr(config, "keepsight_pvm"):
        raise KeepsightError(
            f"{source} is an export for vLLM, whose memory only vLLM would find. Serve it (vllm serve {source}), or "
            "load the adapter that it was made from."
        )
    return config


def meta_model(config: Any, **kwargs: Any) -> Any:
    """A VLM without weights, on the meta device.

    Args:
        config: its configuration.
        kwargs: of `AutoModelForImageTextToText.from_config`.
    """
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, **kwargs)


def check_weights(source: str | Path, throughout: bool = False) -> None:
    """Find missing, truncated and wrongly named weights of a local model by the files' headers, in milliseconds; and
    such as are NaN or infinite, by the first values of each.

    Args:
        source: a folder, or the name of what is shipped.
        throughout: look at all values, where nobody will after this.

    Raises:
        KeepsightError: naming the file, or the tensor, or one stored and one expected tensor. A hub id is left
            to the hub's own checks, and to `read_base`.
    """
    folder = Path(resolve_base(source)).expanduser()
    if not folder.is_dir():
        return
    for tensor in (tensor for file in weight_files(folder) for tensor in read_header(file)):
        if not tensor.begins_finite() or (throughout and tensor.count_not_finite()):
            raise _not_finite(str(source), tensor.name)
    if (folder / "config.json").is_file():
        _check_names(folder, str(source))


def _not_finite(source: str, name: str) -> KeepsightError:
    return KeepsightError(
        f"{source}: {name} holds values that are NaN or infinite, so every answer would be. The run that wrote it "
        "diverged, or its numbers did not fit into 16 bits (float16 ends at 65504: write bfloat16), or the file is "
        "damaged: copy it again, or use an earlier checkpoint."
    )


def _check_names(folder: Path, source: str) -> None:
    """transformers' own loading, with all its renaming and ignoring, on the meta device."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None or is_deepspeed_zero3_enabled():
        return  # packed or shared-out tensors, which only their libraries can tell of; `read_base` asks them
    stored = {  # a dtype that torch has not is a byte here, which no weight is
        tensor.name: torch.empty(tensor.shape, dtype=str_to_torch_dtype.get(tensor.dtype, torch.uint8), device="meta")
        for file in weight_files(folder)
        for tensor in read_header(file)
    }
    with _no_progress_bar():
        model, found = type(meta_model(config)).from_pretrained(
            None,
            config=config,
            state_dict=stored,
            device_map={"": "meta"},
            dtype=config.dtype or torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_loaded(found, source, stored)
    for name, parameter in model.named_parameters():
        kind = stored[name].dtype if name in stored else parameter.dtype
        if not kind.is_floating_point:
            raise KeepsightError(
                f"{source}: {name} is stored as {str(kind).removeprefix('torch.')}, and its config.json tells of no "
                "quantization: expected are numbers of 16 or 32 bits. Save the model again with save_pretrained."
            )


def read_base(source: str | Path, **kwargs: Any) -> Any:
    """A base model with its weights, all of them, from safetensors: a pickle would run code.

    Args:
        source: a folder, or a hub id.
        kwargs: of `AutoModelForImageTextToText.from_pretrained`.

    Raises:
        KeepsightError: if tensors are missing, left over or of another shape, naming one stored and one expected; if
            one is not finite, naming it.
    """
    model, found = AutoModelForImageTextToText.from_pretrained(
        source,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        trust_remote_code=False,
        **kwargs,
    )
    check_loaded(found, str(source))
    check_finite(model, str(source))
    return model


@torch.no_grad()
def check_finite(model: torch.nn.Module, source: str) -> None:
    """Refuse a model with a parameter that is not finite throughout, in one pass over its memory (13 GB/s on a core).

    Raises:
        KeepsightError: naming the parameter.
    """
    for name, parameter in model.named_parameters():
        # Packed numbers, and floats of 8 bits, are not looked at; nor what is not here (offloaded, or shared out).
        is_here = parameter.device.type != "meta" and parameter.numel() > 0
        if is_here and parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            low, high = torch.aminmax(parameter)  # of which one is NaN or infinite if any value is
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise _not_finite(source, name)


def check_loaded(found: Mapping[str, Any], source: str, stored: Mapping[str, Any] | None = None) -> None:
    """Refuse a model of which transformers could not load everything, or whose checkpoint it could not use up.

    Args:
        found: what `from_pretrained(..., output_loading_info=True)` returned; tied tensors, renamed ones and those
            that the family ignores by design are not in it.
        source: name of the model, for the error.
        stored: the checkpoint's own names, for the error.

    Raises:
        KeepsightError: naming one stored and one expected tensor.
    """
    missing, extra = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing or extra:
        names = extra or sorted(stored or ())
        expected = missing[0] if missing else "nothing more"
        example = most_alike(expected, names) if names else "nothing of that name"
        raise KeepsightError(
            f"{source} does not hold the weights of its model: {len(missing)} tensors are missing, which would be "
            f"random, and {len(extra)} have no place in it. Stored is, for example, {example}; expected is {expected}. "
            "Names change when a checkpoint is written from a wrapped model (module.), a part of the model, or for "
            "another layout; a tensor is lost when a shard was written badly. Copy the model again, or write it with "
            "save_pretrained of the whole model."
        )
    if found["mismatched_keys"]:
        name, have, want = sorted(found["mismatched_keys"])[0]
        raise KeepsightError(
            f"{source} does not hold the weights of its model: {name} is stored with shape {tuple(have)}; expected by "
            f"its config.json is {tuple(want)}. The two belong to different models, or a size was changed in one of "
            "them: copy both again, or write them with save_pretrained."
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Nothing is loaded that would take time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
