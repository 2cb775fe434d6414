"""`keepsight info`: what is in an adapter, or what memory a model would get."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepsight.cli.common.console import facts_table, out, quiet, with_examples

if TYPE_CHECKING:
    from keepsight.checkpoints.adapters import AdapterInfo


@with_examples(
    ("an adapter: method, base, layers, gates, parameters", "keepsight info my-memory"),
    ("a plain model: the memory that PvmConfig() would put on it", "keepsight info Qwen/Qwen3-VL-8B-Instruct"),
    ("for programs", "keepsight info my-memory --json | jq .gates"),
)
def info(
    source: Annotated[
        str, typer.Argument(help="An adapter or a plain VLM: a folder, a hub id, or keepsight/reference.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What is in an adapter, or what memory a model would get. Reads no base weights."""
    from keepsight.checkpoints.bases import base_config, check_weights
    from keepsight.checkpoints.sources import as_adapter, check_recorded

    quiet()
    adapter = as_adapter(source)
    if adapter is not None:
        facts = adapter_facts(adapter) | {"fits_base": check_recorded(adapter) or None}
    else:
        base_config(source)  # first of all, that it is a VLM
        if any(Path(source).expanduser().glob("*.safetensors*")):  # a configuration by itself is enough
            check_weights(source)
        facts = model_facts(source)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _show(source, facts)


def adapter_facts(adapter: AdapterInfo) -> dict[str, Any]:
    """What an adapter folder holds, for `--json`."""
    from keepsight.checkpoints.adapters import WEIGHTS

    config = adapter.config
    facts: dict[str, Any] = {
        "kind": "adapter",
        "path": str(adapter.path),
        "method": adapter.method,
        "base": adapter.base,
        "parameters": adapter.num_parameters,
        "tensors": len(adapter.tensors),
        "dtype": ", ".join(adapter.dtypes),
        "file_bytes": (adapter.path / WEIGHTS).stat().st_size,
    }
    if adapter.method == "PVM":
        names = ("branch", "layers", "width", "ffn_width", "head_dim", "num_kv_heads", "causal", "base_model_type")
        facts |= {name: config.get(name) for name in names}
        facts["gates"] = {str(layer): value for layer, value in adapter.gates.items()}
    elif adapter.method == "VISMEM":
        fields: tuple[str, ...] = (
            "num_queries",
            "num_short",
            "num_long",
            "query_width",
            "query_layers",
            "query_heads",
            "form",
        )
        fields += ("slot_layout", "max_text_states", "policy", "max_invocations", "token_names", "token_ids")
        fields += ("short_rank", "short_targets", "long_rank", "long_targets", "base_model_type")
        facts |= {name: config.get(name) for name in fields}
        facts["trained"] = _trained_parts(adapter)
    else:
        facts |= {name: config[name] for name in ("r", "lora_alpha", "target_modules") if name in config}
    return facts


def _trained_parts(adapter: AdapterInfo) -> dict[str, bool]:
    """Which parts of a VisMem adapter have left their start: updates that are not zero, rows that moved."""
    from safetensors import safe_open

    from keepsight.checkpoints.adapters import WEIGHTS

    trained = {"short": False, "long": False, "invocation": False}
    with safe_open(adapter.path / WEIGHTS, "pt") as tensors:
        rows = {}
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            for kind in ("short", "long"):
                if f".{kind}_bank." in name and name.endswith(".up") and tensors.get_tensor(name).any():
                    trained[kind] = True
            if ".rows." in name:
                rows[name.rpartition(".")[2]] = tensors.get_tensor(name)
    if {"start", "invoke_embedding", "invoke_bias"} <= rows.keys():
        moved = (rows["start"] != rows["invoke_embedding"]).any() or rows["invoke_bias"].any()
        trained["invocation"] = bool(moved)
    return trained


def model_facts(source: str) -> dict[str, Any]:
    """What a plain VLM is, and the memory that `PvmConfig()` would put on it, for `--json`."""
    from keepsight.serve.vllm.names import SERVED
    from keepsight.train.run.plan import plan_memory

    plan = plan_memory(source)
    backbone, pvm = plan.backbone, plan.pvm
    text = backbone.text_config
    model_type = backbone.model.config.model_type
    return {
        "kind": "model",
        "source": source,
        "family": backbone.family.name,
        "model_type": model_type,
        "sees": list(backbone.family.modalities),
        "no_vismem": backbone.family.why_no_vismem(backbone.model.config),
        "vllm": model_type in SERVED,
        "layers": len(backbone.layers),
        "hidden_size": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "linear_attention_layers": sum(not backbone.has_softmax_attention(layer) for layer in backbone.layers),
        "parameters": plan.base_parameters,
        "memory": {
            "layers": pvm.layers,
            "width": pvm.width,
            "ffn_width": pvm.ffn_width,
            "head_dim": pvm.head_dim,
            "num_kv_heads": pvm.num_kv_heads,
            "causal": pvm.causal,
            "parameters": plan.memory_parameters,
        },
    }


def _show(source: str, facts: dict[str, Any]) -> None:
    rows = _adapter_rows(facts) if facts["kind"] == "adapter" else _model_rows(facts)
    out.print(facts_table(source, rows), markup=False)


def _adapter_rows(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    is_memory = facts["method"] == "PVM"
    methods = {"memory": "PVM, persistent visual memory", "mlp": "parallel MLP (PVM's control; looks at no image)"}
    names = {"VISMEM": "VisMem, latent vision memory"}
    yield "method", methods[facts["branch"]] if is_memory else names.get(facts["method"], facts["method"])
    yield "base", str(facts["base"])
    if is_memory:
        yield "layers", ", ".join(map(str, facts["layers"]))
        yield "latent width", f"{facts['width']} (SwiGLU {facts['ffn_width']}, head {facts['head_dim']})"
        if facts["branch"] == "memory":
            yield (
                "rule",
                "causal: text reads the images before it"
                if facts["causal"]
                else "published: all text reads all images",
            )
        for layer, gate in facts["gates"].items():
            yield f"gate of layer {layer}", f"{gate:+.5f}" + ("  (never trained)" if gate == 0 else "")
    elif facts["method"] == "VISMEM":
        yield from _latent_rows(facts)
    else:
        if "r" in facts:
            yield "rank", f"{facts['r']} (alpha {facts.get('lora_alpha')})"
        if facts.get("target_modules"):
            targets = facts["target_modules"]
            yield "on", targets if isinstance(targets, str) else ", ".join(sorted(targets))
    yield "parameters", f"{facts['parameters']:,} in {facts['tensors']} tensors ({facts['dtype']})"
    compared = "and it fits the base" if facts["fits_base"] else "not compared with the base, which is not here"
    yield "file", f"{facts['file_bytes'] / 1e6:.2f} MB, whole and finite, {compared}"
    path = Path(facts["path"])
    processor = any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    yield "processor", "beside the adapter" if processor else "the base's"
    yield "use it", f"keepsight generate {path} --image FILE --prompt TEXT"


def _latent_rows(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for kind, where in (("short", "vision encoder"), ("long", "language model")):
        rank, targets = facts[f"{kind}_rank"], ", ".join(facts[f"{kind}_targets"])
        note = "" if facts["trained"][kind] else "  (never trained: noise)"
        yield f"{kind}-term", f"{facts[f'num_{kind}']} latents; rank {rank} on {targets} of the {where}{note}"
    builder = f"{facts['num_queries']} queries; width {facts['query_width']}, {facts['query_layers']} layers"
    yield "query builder", builder
    limit = facts["max_text_states"]
    yield "formed from", f"visual states, and {'all' if limit is None else f'the latest {limit}'} text states"
    yield "form", f"{facts['form']}, slots in a {facts['slot_layout']}"
    note = "" if facts["trained"]["invocation"] else "  (invocation tokens never trained)"
    yield "invoked", f"{facts['policy']}, at most {facts['max_invocations']} times{note}"
    ids = facts["token_ids"] or ["?"] * 4
    yield "tokens", ", ".join(f"{name} {index}" for name, index in zip(facts["token_names"], ids, strict=True))


def _model_rows(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    memory = facts["memory"]
    yield "family", f"{facts['family']} ({facts['model_type']})"
    linear = facts["linear_attention_layers"]
    note = f", {linear} of them with linear attention, which cannot look back" if linear else ""
    yield "decoder", f"{facts['layers']} layers of width {facts['hidden_size']}{note}"
    yield "heads", f"{facts['heads']}, {facts['kv_heads']} for keys and values"
    yield "parameters", f"{facts['parameters']:,}"
    yield "PvmConfig() gives", f"layers {', '.join(map(str, memory['layers']))}, latent width {memory['width']}, causal"
    share = 100 * memory["parameters"] / facts["parameters"]
    yield "its parameters", f"{memory['parameters']:,} ({share:.2f} % of the base)"
    lack = facts["no_vismem"]
    yield "VisMem", "can have one too" if lack is None else f"none: {lack}"
    yield "videos", "yes" if "video" in facts["sees"] else "no, images alone"
    yield "vLLM", "keepsight export vllm" if facts["vllm"] else "no plugin for this family: keepsight serve"
    yield "train it", f"keepsight train pvm {facts['source']} --data FILE --output-dir DIR"
