"""`keepsight convert`: the authors' layout in, base and adapter out, and the same logits as the paper's equations.

The equations stand in this file a second time, in plain torch, written from the paper and not from keepsight.
"""

import json
import math
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from families import BY_NAME, Row, make_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import keepsight
from keepsight.checkpoints.convert import ConversionError, convert
from keepsight.checkpoints.shards import CheckpointError

LAYERS, WIDTH, HEAD_DIM, EPS = [1, 3], 32, 16, 1e-2  # an eps that shows if it is not the config's
HEADS, KV_HEADS, FFN = 2, 1, 48  # 32 / 16; 2 // (4 / 2); 32 * 96 / 64
TINY = BY_NAME["qwen3_vl"]
PREFIX = "model.language_model.layers."


# --- a checkpoint in the authors' layout -----------------------------------------------------------------------------


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


# --- the equations ---------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x if weight is None else x * weight


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def retrieve(w: dict[str, torch.Tensor], x: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """lambda * out for one row: x [T, D], visual [M, D]. `w` holds one block's tensors under the authors' names."""
    x_lat, v_lat = x @ w["text_reducer.weight"].T, visual @ w["vision_reducer.weight"].T
    q = rms_norm(x_lat, w["input_norm.weight"]) @ w["cross_attn.q_proj.weight"].T
    k, v = v_lat @ w["cross_attn.k_proj.weight"].T, v_lat @ w["cross_attn.v_proj.weight"].T
    heads = []
    for head in range(HEADS):
        mine = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        shared = head * KV_HEADS // HEADS
        theirs = slice(shared * HEAD_DIM, (shared + 1) * HEAD_DIM)
        query = rms_norm(q[:, mine], w["cross_attn.q_norm.weight"])
        key = rms_norm(k[:, theirs], w["cross_attn.k_norm.weight"])
        scores = query @ key.T / math.sqrt(HEAD_DIM)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[:, theirs])
    a = torch.cat(heads, -1) @ w["cross_attn.o_proj.weight"].T
    n = rms_norm(a, w["post_attn_norm.weight"])
    h = a + (silu(n @ w["mlp.gate_proj.weight"].T) * (n @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return w["gate_alpha"] * rms_norm(h @ w["output_expander.weight"].T)


class Equations:
    """A plain transformers model with the equations added by hooks, recomputed from scratch at every call."""

    def __init__(self, base: Path, blocks: dict[str, torch.Tensor], rule: str = "published"):
        self.model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
        self.rule = rule
        decoder = self.model.model.language_model
        decoder.register_forward_pre_hook(self._enter, with_kwargs=True)
        for index in LAYERS:
            prefix = f"{PREFIX}{index}.pvm_block."
            w = {name.removeprefix(prefix): t.float() for name, t in blocks.items() if name.startswith(prefix)}
            layer = decoder.layers[index]
            layer.post_attention_layernorm.register_forward_pre_hook(self._keep_x)
            layer.mlp.register_forward_hook(lambda module, args, output, w=w: output + self._update(w))

    def _enter(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.embeds = kwargs["inputs_embeds"]

    def _keep_x(self, module: Any, args: tuple) -> None:
        self.x = args[0]

    def _update(self, w: dict[str, torch.Tensor]) -> torch.Tensor:
        update = torch.zeros_like(self.x)
        for row, seen in enumerate(self.visual):
            for t in torch.nonzero(~seen)[:, 0].tolist() if seen.any() else ():  # visual positions stay silent
                remembered = seen.clone()
                if self.rule == "causal":
                    remembered[t:] = False
                if remembered.any():
                    update[row, t] = retrieve(w, self.x[row, t : t + 1], self.embeds[row, remembered])[0]
        return update

    @torch.no_grad()
    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        self.visual = inputs["input_ids"] == families.IMAGE
        return self.model(**inputs, use_cache=False).logits

    def generate(self, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
        inputs, start = dict(inputs), inputs["input_ids"].shape[1]
        for _ in range(steps):
            token = self.logits(inputs)[:, -1].argmax(-1, keepdim=True)
            for name, new in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
                grown = torch.as_tensor(new).expand(len(token), 1).to(inputs[name].dtype)
                inputs[name] = torch.cat([inputs[name], grown], 1)
        return inputs["input_ids"][:, start:]


ROWS = [Row(2, (1, 2), 3, (2, 2), 4), Row(3, (2, 1), 2, seed=1), Row(6, seed=2)]  # 2, 1 and 0 images


@dataclass
class Converted:
    source: Path
    folder: Path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    place = tmp_path_factory.mktemp("single")
    source = write_checkpoint(place / "authors")
    convert(source, place / "out")
    return Converted(source, place / "out")


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16, "scalar_gate": True},
    "sharded": {"shards": 3},
}


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request: Any, tmp_path_factory: pytest.TempPathFactory, single: Converted) -> Converted:
    if request.param == "float32":
        return single
    place = tmp_path_factory.mktemp(request.param)
    source = write_checkpoint(place / "authors", **VARIANTS[request.param])
    convert(source, place / "out")
    return Converted(source, place / "out")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors


# --- what comes out --------------------------------------------------------------------------------------------------


def test_logits_follow_the_published_equations(converted: Converted) -> None:
    blocks = {n: t for n, t in stored_tensors(converted.source).items() if ".pvm_block." in n}
    model, _ = keepsight.load(converted.folder / "adapter", dtype=torch.float32, device="cpu")
    inputs = make_inputs(TINY, model, ROWS)
    plain = Equations(converted.folder / "base", {n: t * ("gate_alpha" not in n) for n, t in blocks.items()})
    expected = Equations(converted.folder / "base", blocks).logits(inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=2e-5, rtol=1e-4)

    without = plain.logits(inputs)
    changed = (expected - without).abs().amax(-1)
    assert (changed[0] > 1e-2).all()  # text before the first image sees the images too
    assert changed[1][real[1]].min() > 1e-2
    assert (changed[2] == 0).all()  # a row without images
    causal = Equations(converted.folder / "base", blocks, rule="causal").logits(inputs)
    assert (causal - expected)[0].abs().max() > 1e-2  # the two rules can be told apart here


def test_generation_follows_the_published_equations(single: Converted) -> None:
    blocks = {n: t for n, t in stored_tensors(single.source).items() if ".pvm_block." in n}
    model, _ = keepsight.load(single.folder / "adapter", device="cpu")
    equations = Equations(single.folder / "base", blocks)
    for rows in (ROWS, ROWS[2:]):
        inputs = make_inputs(TINY, model, rows)
        expected = equations.generate(inputs, 8)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, families.PAD
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert tokens[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_base_is_plain_and_byte_identical(converted: Converted) -> None:
    base = converted.folder / "base"
    before, after = stored_tensors(converted.source), stored_tensors(base)
    assert after.keys() == {name for name in before if ".pvm_block." not in name}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(base, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is transformers.Qwen3VLForConditionalGeneration
    assert "pvm" not in (base / "config.json").read_text().lower()
    assert not [p for p in base.iterdir() if p.suffix in (".py", ".bin")]
    for file in base.glob("*.json"):
        assert "auto_map" not in file.read_text(), file.name
    assert (base / "LICENSE").is_file()
    assert (base / "tokenizer.json").read_bytes() == (converted.source / "tokenizer.json").read_bytes()
    assert {p.name for p in converted.folder.iterdir()} == {"base", "adapter"}


def test_adapter_holds_the_tensors_unchanged(converted: Converted) -> None:
    adapter = load_file(converted.folder / "adapter" / "adapter_model.safetensors")
    blocks = {n: t for n, t in stored_tensors(converted.source).items() if ".pvm_block." in n}
    assert len(adapter) == len(blocks) == 15 * len(LAYERS)
    for name, tensor in blocks.items():
        layer, _, rest = name.removeprefix(PREFIX).partition(".pvm_block.")
        rest = "gate" if rest == "gate_alpha" else rest
        key = next(k for k in adapter if f".layers.{layer}." in k and k.endswith(f".pvm_blocks.{rest}"))
        assert adapter[key].dtype == tensor.dtype
        assert torch.equal(adapter[key].flatten(), tensor.flatten()), name
    config = json.loads((converted.folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    assert (config["causal"], config["layers"], config["width"], config["eps"]) == (False, LAYERS, WIDTH, EPS)


def test_shards_are_indexed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "authors", shards=2)
    blocks = {n: t for n, t in stored_tensors(source).items() if ".pvm_block." in n}
    base = {n: t for n, t in stored_tensors(source).items() if n not in blocks}
    # One shard of the base, and one of nothing but the memory: the base has a single file then.
    names = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    for name, part in zip(names, (base, blocks), strict=True):
        save_file(part, source / name, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(base, names[0]) | dict.fromkeys(blocks, names[1])}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "out")
    weights = sorted(p.name for p in (tmp_path / "out" / "base").glob("model*"))
    assert weights == ["model.safetensors"]


def test_index_of_a_sharded_base_is_right(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "authors", shards=3)
    made = convert(source, tmp_path / "out")
    index = json.loads((made.base / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(made.base / file, "pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118 - not a dict
    assert index["metadata"]["total_size"] == made.base_bytes
    assert len(index["weight_map"]) == made.base_tensors


def test_result_can_be_moved_and_reads_images(single: Converted, tmp_path: Path) -> None:
    from PIL import Image

    shutil.copytree(single.folder, tmp_path / "elsewhere")
    model, processor = keepsight.load(tmp_path / "elsewhere" / "adapter", device="cpu")
    inputs = processor(
        text=["w5 <|vision_start|><|image_pad|><|vision_end|> w6 w7"],
        images=[Image.new("RGB", (16, 16), (255, 0, 0))],
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == families.IMAGE).sum() == 4
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_tied_embeddings(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "authors")
    change_json(source / "config.json", lambda c: c.update(tie_word_embeddings=True))
    change_tensors(source, lambda tensors: tensors.pop("lm_head.weight"))
    made = convert(source, tmp_path / "out")
    model, _ = keepsight.load(made.adapter, device="cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- what is refused, before anything is written ---------------------------------------------------------------------


def _set(*path: str, to: Any) -> Any:
    def change(folder: Path) -> None:
        def at(config: dict[str, Any]) -> None:
            for key in path[:-1]:
                config = config[key]
            config[path[-1]] = to

        change_json(folder / "config.json", at)

    return change


def _tensors(change: Any) -> Any:
    return lambda folder: change_tensors(folder, change)


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _spoil(name: str, value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return _tensors(change)


BLOCK = f"{PREFIX}3.pvm_block."
GATE_PROJ = BLOCK + "mlp.gate_proj.weight"
BASE_WEIGHT = f"{PREFIX}2.mlp.up_proj.weight"
REFUSED: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "other family": (
        lambda f: change_json(f / "config.json", lambda c: c.update(model_type="llava", architectures=["Llava"])),
        "not a dense Qwen3-VL",
    ),
    "experts": (_set("model_type", to="qwen3_vl_moe"), "not a dense Qwen3-VL"),
    "no text config": (_set("text_config", to=None), "no text_config"),
    "nonsense config": (_set("text_config", "hidden_size", to="wide"), "cannot build a Qwen3-VL"),
    "other sizes": (_set("text_config", "intermediate_size", to=104), r"has shape .* config.json asks for"),
    "quantised": (_set("quantization_config", to={"bits": 4}), "quantised"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "pickle": (_only_pickle, "never reads it"),
    "truncated": (_truncate, "not a whole safetensors file"),
    "no memory": (
        _tensors(lambda t: [t.pop(n) for n in list(t) if ".pvm_block." in n]),
        "has no visual memory",
    ),
    "no pvm_layers": (_set("text_config", "pvm_layers", to=None), "pvm_layers is None"),
    "no width": (_set("text_config", "pvm_hidden_size", to=None), "pvm_hidden_size is None"),
    "wrong width": (_set("text_config", "pvm_hidden_size", to=48), "has shape"),
    "width of no heads": (_set("text_config", "pvm_hidden_size", to=40), "not a multiple of head_dim"),
    "other layers": (_set("text_config", "pvm_layers", to=[1, 2]), r"says pvm_layers \[1, 2\].*layers \[1, 3\]"),
    "a layer too many": (_set("text_config", "pvm_layers", to=[1, 2, 3]), r"says pvm_layers \[1, 2, 3\]"),
    "layer out of range": (
        lambda f: (
            change_tensors(
                f, lambda t: t.update({n.replace("s.3.p", "s.7.p"): t.pop(n) for n in list(t) if BLOCK in n})
            ),
            _set("text_config", "pvm_layers", to=[1, 7])(f),
        ),
        "out of range",
    ),
    "missing": (_tensors(lambda t: t.pop(GATE_PROJ)), f"lacks 1 of the 30 tensors of the memory.*{GATE_PROJ}"),
    "extra": (_tensors(lambda t: t.update({BLOCK + "new.weight": torch.ones(2)})), "no part of the memory.*new.weight"),
    "misshaped": (_tensors(lambda t: t.update({GATE_PROJ: torch.ones(FFN + 1, WIDTH)})), "gate_proj.weight has shape"),
    "base missing": (_tensors(lambda t: t.pop(BASE_WEIGHT)), f"tensors of the base model, the first: {BASE_WEIGHT}"),
    "base extra": (_tensors(lambda t: t.update({"model.other": torch.ones(2)})), "no part of the base model.*other"),
    "nan": (_spoil(GATE_PROJ, float("nan")), "1 of 1536 values.*gate_proj.weight are NaN"),
    "infinite base": (_spoil(BASE_WEIGHT, float("inf")), "up_proj.weight are NaN or infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_writing(case: str, single: Converted, tmp_path: Path) -> None:
    spoil, lesson = REFUSED[case]
    source = tmp_path / "in" / "authors"
    shutil.copytree(single.source, source)
    spoil(source)
    out = tmp_path / "place"
    out.mkdir()
    with pytest.raises(CheckpointError, match="(?s)" + lesson):
        convert(source, out / "new" / "out")
    assert list(out.iterdir()) == []


INDEX_CASES = {
    "shard missing": ({"a": "gone.safetensors"}, "not there"),
    "outside": ({"a": "../authors2/model.safetensors"}, "no safetensors file of this folder"),
    "pickled shard": ({"a": "pytorch_model.bin"}, "no safetensors file of this folder"),
    "empty": ({}, "no weight_map"),
}


@pytest.mark.parametrize("case", INDEX_CASES)
def test_broken_index(case: str, single: Converted, tmp_path: Path) -> None:
    weight_map, lesson = INDEX_CASES[case]
    shutil.copytree(single.source, tmp_path / "authors")
    (tmp_path / "authors" / "model.safetensors").unlink()
    (tmp_path / "authors" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=lesson):
        convert(tmp_path / "authors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_out(single: Converted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"exists.*--overwrite"):
        convert(single.source, out)
    with pytest.raises(ConversionError, match="not the result of an earlier conversion"):
        convert(single.source, out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"

    (out / "thesis.txt").unlink()
    (out / "base").mkdir()
    (out / "base" / "old.txt").write_text("old")
    convert(single.source, out, overwrite=True)
    assert not (out / "base" / "old.txt").exists()
    assert keepsight.load(out / "adapter", device="cpu")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}

    for target in (single.source, single.source.parent):
        with pytest.raises(ConversionError, match=r"is SRC .* or holds it"):
            convert(single.source, target, overwrite=True)


def test_disk_too_small(single: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match="GB free"):
        convert(single.source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [False, True])
def test_failure_while_writing_leaves_nothing(before: bool, single: Converted, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    if before:
        shutil.copytree(single.folder, out)
    kept = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    def fail(task: str, done: int, total: int) -> None:
        if task == "Writing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(single.source, out, overwrite=before, progress=fail)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == kept


def test_progress_counts_every_byte(single: Converted, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    made = convert(single.source, tmp_path / "out", progress=lambda t, d, n: seen.setdefault(t, []).append((d, n)))
    assert list(seen) == ["Checking", "Writing"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]
    assert seen["Writing"][-1][1] == made.base_bytes


def test_unknown_memory_settings_are_named(single: Converted, tmp_path: Path) -> None:
    shutil.copytree(single.source, tmp_path / "authors")
    _set("text_config", "pvm_temperature", to=2.0)(tmp_path / "authors")
    with pytest.warns(keepsight.errors.KeepsightWarning, match="pvm_temperature"):
        convert(tmp_path / "authors", tmp_path / "out")


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    from keepsight.cli import app

    return CliRunner().invoke(app, ["convert", *arguments])


def test_command(single: Converted, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        result = command(str(single.source), str(tmp_path / "out"))
        assert result.exit_code == 0, result.output
        assert "keepsight.load" in result.output
        again = command(str(single.source), str(tmp_path / "out"))
        assert again.exit_code == 1
        assert "--overwrite" in again.stderr
        assert command(str(single.source), str(tmp_path / "out"), "--overwrite").exit_code == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert keepsight.load(tmp_path / "out" / "adapter", device="cpu")
