"""The folder that vLLM loads for a VisMem: the base, linked, and the rows of the four special tokens.

`vllm serve` of it would write invocation tokens and form no memories, so it is made for `engine.py` alone, in a
temporary place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from keepsight.checkpoints.adapters import WEIGHTS, AdapterInfo
from keepsight.checkpoints.shards import read_header, read_json, weight_files
from keepsight.errors import KeepsightError
from keepsight.serve.vllm.export import base_folder, refuse_embedding, write_folder
from keepsight.serve.vllm.names import ROWS_FILE, ROWS_KEY, ROWS_MODULE, SERVED


def write_model(base: str, vismem: AdapterInfo, target: Path) -> int:
    """Write the folder that vLLM loads: the base, linked, and the special tokens' rows.

    Args:
        base: name of the base model.
        vismem: the adapter, checked.
        target: the folder.

    Returns:
        V, rows of the base's embedding; the four tokens are V .. V + 3 in vLLM.

    Raises:
        KeepsightError: if the family is not served.
    """
    served = SERVED.get(str(vismem.config.get("base_model_type")))
    if served is None:
        known = ", ".join(served.name for served in SERVED.values())
        raise KeepsightError(
            f"{vismem.path} belongs to a base of model_type {vismem.config.get('base_model_type')!r}, which the vLLM "
            f"plugin does not serve. Served: {known}. Without --engine vllm, keepsight serve takes every family."
        )
    refuse_embedding(vismem)
    source = base_folder(base)
    rows = [
        replace(tensor, name=f"{ROWS_MODULE}.{tensor.name.rpartition('.rows.')[2]}")
        for tensor in read_header(vismem.path / WEIGHTS)
        if ".rows." in tensor.name
    ]
    tables = [t for file in weight_files(source) for t in read_header(file) if t.name.endswith("embed_tokens.weight")]
    vocabulary = tables[0].shape[0]
    tied = not any(tensor.name.endswith("invoke_head") for tensor in rows)
    config = read_json(source / "config.json", "a checkpoint folder has a config.json beside its weights")
    config |= {"architectures": [served.latent_architecture], ROWS_KEY: {"vocabulary": vocabulary, "tied": tied}}
    config.pop("auto_map", None)
    text: dict[str, Any] | None = config.get("text_config")
    for part in (text, config):
        if part is not None and ("vocab_size" in part or part is text):
            part["vocab_size"] = vocabulary + 4
    write_folder(target, source, vismem.path, config, rows, ROWS_FILE)
    return vocabulary
