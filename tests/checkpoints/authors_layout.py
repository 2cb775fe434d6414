"""A tiny checkpoint in the layout of PVM's authors, as `keepsight convert` takes it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
import transformers
from families import BY_NAME
from safetensors.torch import load_file, save_file

LAYERS, WIDTH, HEAD_DIM, EPS = [1, 3], 32, 16, 1e-2  # an eps that shows if it is not the config's
HEADS, KV_HEADS, FFN = 2, 1, 48  # 32 / 16; 2 // (4 / 2); 32 * 96 / 64
TINY = BY_NAME["qwen3_vl"]
PREFIX = "model.language_model.layers."


def block_tensors(seed: int = 0, dtype: torch.dtype = torch.float32, scalar_gate: bool = False) -> dict[str, Any]:
    """Random tensors of the authors' names and shapes, none of them at a value that could hide a mistake."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g) * 0.3

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.5 * torch.randn(size, generator=g)

    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(LAYERS):
        kv = KV_HEADS * HEAD_DIM
        parts = {
            "text_reducer": matrix(WIDTH, 64),
            "vision_reducer": matrix(WIDTH, 64),
            "output_expander": matrix(64, WIDTH),
            "input_norm": norm(WIDTH),
            "post_attn_norm": norm(WIDTH),
            "cross_attn.q_proj": matrix(WIDTH, WIDTH),
            "cross_attn.k_proj": matrix(kv, WIDTH),
            "cross_attn.v_proj": matrix(kv, WIDTH),
            "cross_attn.o_proj": matrix(WIDTH, WIDTH),
            "cross_attn.q_norm": norm(HEAD_DIM),
            "cross_attn.k_norm": norm(HEAD_DIM),
            "mlp.gate_proj": matrix(FFN, WIDTH),
            "mlp.up_proj": matrix(FFN, WIDTH),
            "mlp.down_proj": matrix(WIDTH, FFN),
        }
        tensors |= {f"{PREFIX}{layer}.pvm_block.{name}.weight": t.to(dtype) for name, t in parts.items()}
        gate = torch.tensor(0.5 - number)
        tensors[f"{PREFIX}{layer}.pvm_block.gate_alpha"] = (gate if scalar_gate else gate.reshape(1)).to(dtype)
    return tensors


def processor() -> Any:
    words = {f"w{i}": i for i in range(families.VOCAB)}
    special = {"<|image_pad|>": families.IMAGE, "<|video_pad|>": families.VIDEO}
    special |= {"<|vision_start|>": families.START, "<|vision_end|>": families.END}
    for name, index in special.items():
        del words[f"w{index}"]
        words[name] = index
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    backend = Tokenizer(WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", additional_special_tokens=list(special)
    )
    geometry: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    geometry |= {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**geometry),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**geometry),
        chat_template="{{ messages[0]['content'] }}",
    )


def write_checkpoint(folder: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1, **blocks: Any) -> Path:
    """A tiny checkpoint as the authors' fork saves it: custom class names, auto_map, code, tensors among the base's."""
    config = TINY.config()
    config.text_config.rms_norm_eps = EPS
    torch.manual_seed(1)
    model = transformers.Qwen3VLForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | block_tensors(dtype=dtype, **blocks)
    names = sorted(tensors)
    if shards > 1:
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def fork(settings: dict[str, Any]) -> None:
        settings["architectures"] = ["PVMQwen3VLForConditionalGeneration"]
        settings["auto_map"] = {"AutoConfig": "configuration_qwen3_vl.PVMQwen3VLConfig"}
        settings["text_config"] |= {"pvm_layers": LAYERS[::-1], "pvm_hidden_size": WIDTH}

    change_json(folder / "config.json", fork)
    change_json(folder / "processor_config.json", lambda s: s.update(auto_map={"AutoProcessor": "p.PVMProcessor"}))
    (folder / "modeling_qwen3_vl.py").write_text("raise SystemExit('custom code was run')\n")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "LICENSE").write_text("terms")
    return folder


def change_json(file: Path, change: Any) -> None:
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@dataclass
class Converted:
    source: Path
    folder: Path


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors
