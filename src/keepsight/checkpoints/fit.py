"""Whether an adapter is for a base, told in full before any weight is read: PEFT's own loading, on the meta device.

Both are built without memory, the adapter's tensors go through the code that will load them, and every name that is
missing, left over or of another shape is an error here, where PEFT warns or says nothing.
"""

from __future__ import annotations

import warnings
from typing import Any

from keepsight.checkpoints.adapters import CONFIG, MEMORIES, WEIGHTS, AdapterInfo
from keepsight.checkpoints.bases import meta_model
from keepsight.errors import AdapterMismatchError, BrokenAdapterError, KeepsightError
from keepsight.loading import RESIZED_REMEDY, most_alike
from keepsight.peft_method import config_from_adapter

_NAME = "default"


def check_fit(info: AdapterInfo, base: str, config: Any) -> None:
    """Refuse an adapter that does not fit a base, whatever its method.

    Args:
        info: the adapter.
        base: name of the base, for errors.
        config: the base's configuration.

    Raises:
        AdapterMismatchError: if it was made for another base.
        BrokenAdapterError: if its tensors are not those that its configuration describes.
    """
    if info.method in MEMORIES:
        config_from_adapter(MEMORIES[info.method], info.config).check_base(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong becomes an error below
        try:
            left = _load_on_meta(info, config)
        except BrokenAdapterError as error:
            name = f"The file of the adapter {_NAME!r}"
            raise BrokenAdapterError(str(error).replace(name, str(info.path / WEIGHTS), 1)) from error
        except KeepsightError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:  # sizes; modules that are not there
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise AdapterMismatchError(_other_base(info, base, lines[-1].strip())) from error
    if left is not None:
        raise AdapterMismatchError(_other_base(info, base, left))


def _other_base(info: AdapterInfo, base: str, why: str) -> str:
    recorded = info.base or "no name"
    return (
        f"{info.path} was made for another base model (recorded: {recorded}) than {base}, or its file was changed: "
        f"{why} Load it on the base it was trained on, as save_pretrained wrote it."
    )


def _load_on_meta(info: AdapterInfo, config: Any) -> str | None:
    """What PEFT would leave out when it loads the adapter; None for nothing."""
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import PeftType
    from peft.utils.save_and_load import set_peft_model_state_dict

    peft_config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[info.method]].from_pretrained(str(info.path))
    if peft_config.is_prompt_learning:
        raise BrokenAdapterError(
            f"{CONFIG} describes {info.method}, which puts virtual tokens before the prompt; a VLM places its images "
            "by position. Use an adapter of weights, such as LoRA."
        )
    peft_config.inference_mode = True
    base, rows = meta_model(config), info.embedding_rows
    if rows is not None and rows != base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel(base, peft_config, _NAME, low_cpu_mem_usage=True)
    result: Any = set_peft_model_state_dict(model, info.tensors, _NAME, low_cpu_mem_usage=True)
    mark = PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]
    own = sorted(name for name in model.state_dict() if mark in name and f".{_NAME}" in name)
    missing = [name for name in own if name in set(result.missing_keys)]
    extra = sorted(result.unexpected_keys)
    expected = (missing or own or ["nothing"])[0].replace(f".{_NAME}", "")
    stored = most_alike(expected, extra or info.tensors or ["nothing"])
    if extra or missing:
        return (
            f"{len(extra)} of its tensors have no place there, and {len(missing)} are missing. Stored is, for "
            f"example, {stored}; expected is {expected}."
        )
    return None


def check_words(info: AdapterInfo, base: str, config: Any) -> None:
    """Refuse an adapter whose tokenizer knows tokens that the base has no embedding for.

    Raises:
        AdapterMismatchError: naming such a token, and what to save beside the adapter.
    """
    file = info.path / "tokenizer.json"
    rows = info.embedding_rows or getattr(config.get_text_config(), "vocab_size", None)
    if rows is None or not file.is_file():
        return
    from tokenizers import Tokenizer

    own = set(info.config.get("token_ids") or ()) if info.method == "VISMEM" else set()
    words = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    beyond = sorted((index, word) for word, index in words.items() if index >= rows and index not in own)
    if beyond:
        index, word = beyond[0]
        raise AdapterMismatchError(
            f"The tokenizer in {info.path} knows {len(words)} tokens, {base} has embeddings for {rows}: {word!r} would "
            f"be number {index}. Tokens were added, and the embedding was resized but not saved. {RESIZED_REMEDY}"
        )
