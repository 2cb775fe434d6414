"""`keepsight convert`: the authors' layout in, base and adapter out, and the same logits as the paper's equations.

The equations stand in this file a second time, in plain torch, written from the paper and not from keepsight.
"""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from authors_layout import (
    EPS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    PREFIX,
    TINY,
    WIDTH,
    Converted,
    change_json,
    change_tensors,
    stored_tensors,
    write_checkpoint,
)
from families import Row, make_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import keepsight
from keepsight.checkpoints.convert import convert

# --- a checkpoint in the authors' layout -----------------------------------------------------------------------------


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
