"""Nothing that is loaded is partly random: every name of a base and of every adapter is compared, in every family."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damage import ADAPTER, BASE, spoil, with_one_nan
from families import BY_NAME, FAMILIES, make_inputs
from helpers import MIXED_ROWS, attach, logits
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

import keepsight
from keepsight.checkpoints.adapters import inspect_adapter
from keepsight.checkpoints.bases import check_weights, read_base
from keepsight.checkpoints.fit import check_words
from keepsight.checkpoints.load import attach as put_on
from keepsight.checkpoints.sources import check_recorded, check_sources

NAMES = ["qwen3_vl", "qwen3_5_moe", "internvl_qwen3", "llava_onevision"]
LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.(o_proj|out_proj|up_proj)", init_lora_weights=False)
METHODS: dict[str, Any] = {
    "pvm": lambda model: attach(model, init_gate=0.5),
    "vismem": lambda model: get_peft_model(
        model, keepsight.VisMemConfig(num_queries=2, num_short=2, num_long=2, query_width=16, query_heads=2)
    ),
    "lora": lambda model: get_peft_model(model, LORA),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of every family in shards of bfloat16, tied where it can be."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        model = family.build(tie_word_embeddings=True).to(torch.bfloat16)
        model.save_pretrained(root / family.name, max_shard_size="60KB")
        assert len(list((root / family.name).glob("*.safetensors"))) > 2
    return {family.name: root / family.name for family in FAMILIES}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """An adapter of every method on every family."""
    root = tmp_path_factory.mktemp("adapters")
    for name, base in bases.items():
        for method, put in METHODS.items():
            model = put(read_base(base, dtype=torch.float32))
            model.save_pretrained(root / name / method)
    return {(name, method): root / name / method for name in bases for method in METHODS}


def test_what_was_saved_is_loaded(family: Any, bases: dict[str, Path], adapters: dict[tuple[str, str], Path]) -> None:
    """Shards, tied heads, bfloat16, each method alone and all on one model."""
    folders = [adapters[family.name, method] for method in METHODS]
    for folder in folders:
        base, infos = check_sources(folder)
        assert base == str(bases[family.name])
        assert check_recorded(infos[0])
    _, infos = check_sources(folders[2], folders[:2])
    model = put_on(read_base(bases[family.name], dtype=torch.float32), infos).eval()
    inputs = make_inputs(family, model, MIXED_ROWS[:1])
    twice = put_on(read_base(bases[family.name], dtype=torch.float32), infos).eval()
    assert torch.equal(logits(model, inputs), logits(twice, inputs))
    for info in infos:
        stored = load_file(info.path / "adapter_model.safetensors")
        present = {value.sum().item() for value in model.state_dict().values() if value.is_floating_point()}
        assert all(tensor.sum().item() in present for tensor in stored.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ADAPTER)
def test_an_adapter_whose_tensors_do_not_fit(
    damage: str, name: str, adapters: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    for method in METHODS:
        folder = spoil(adapters[name, method], tmp_path / method, ADAPTER[damage])
        if (method, damage) == ("lora", "without PEFT's prefix"):
            continue  # PEFT reads it rightly in some families
        with pytest.raises(keepsight.KeepsightError, match=r"base_model\.model\.|Copy|shape") as error:
            check_sources(folder)
        assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ADAPTER)
def test_peft_does_not_leave_a_memory_random(
    damage: str, name: str, bases: dict[str, Path], adapters: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    family = BY_NAME[name]
    base = read_base(bases[name], dtype=torch.float32).eval()
    inputs = make_inputs(family, base, MIXED_ROWS[:1])
    before = logits(base, inputs)
    for method in ("pvm", "vismem"):
        folder = spoil(adapters[name, method], tmp_path / method, ADAPTER[damage])
        for sparing in (False, True):
            with pytest.raises(keepsight.BrokenAdapterError):
                PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=sparing)
            assert torch.equal(logits(base, inputs), before)
    good = PeftModel.from_pretrained(base, adapters[name, "pvm"])
    with_memory = logits(good, inputs)
    assert not torch.equal(with_memory, before)
    with pytest.raises(keepsight.BrokenAdapterError):
        good.load_adapter(tmp_path / "pvm", "default")
    assert torch.equal(logits(good, inputs), with_memory)  # one that was loaded stays


@pytest.mark.parametrize("method", ["pvm", "vismem"])
def test_peft_loads_no_memory_that_is_not_finite(
    method: str, bases: dict[str, Path], adapters: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    base = read_base(bases["qwen3_vl"], dtype=torch.float32).eval()
    inputs = make_inputs(BY_NAME["qwen3_vl"], base, MIXED_ROWS[:1])
    before = logits(base, inputs)
    folder = spoil(adapters["qwen3_vl", method], tmp_path / method, with_one_nan)
    with pytest.raises(keepsight.BrokenAdapterError, match=r"1 of .* values of .* are NaN"):
        PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(base, inputs), before)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("damage", ["", "another layout", "one missing", "one too many", "fewer layers", "one NaN"])
def test_transformers_does_not_leave_a_memory_random(
    damage: str,
    name: str,
    trainable: bool,
    bases: dict[str, Path],
    adapters: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    """Its own `load_adapter` draws the line where PEFT's and `keepsight.load` draw it."""
    model = read_base(bases[name], dtype=torch.float32).eval()
    inputs = make_inputs(BY_NAME[name], model, MIXED_ROWS[:1])
    before = logits(model, inputs)
    changes = ADAPTER | {"one NaN": with_one_nan}
    folder = spoil(adapters[name, "pvm"], tmp_path / "pvm", changes.get(damage, lambda tensors: tensors))
    if damage == "fewer layers":
        file = folder / "adapter_config.json"
        saved = json.loads(file.read_text())
        file.write_text(json.dumps(saved | {"layers": saved["layers"][:1]}))
    if damage:
        lesson = r"stored is.*expected is|expected is.*stored is|Stored|1 of .* values of .* are NaN"
        with pytest.raises(keepsight.BrokenAdapterError, match=lesson):
            model.load_adapter(str(folder), is_trainable=trainable)
        assert torch.equal(logits(model, inputs), before)
        return
    model.load_adapter(str(folder), is_trainable=trainable)
    whole = PeftModel.from_pretrained(read_base(bases[name], dtype=torch.float32), folder).eval()
    assert torch.equal(logits(model.eval(), inputs), logits(whole, inputs))
    assert not torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("method", ["pvm", "vismem"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_memory_is_injected_from_all_of_its_state_dict(
    prefix: str, method: str, bases: dict[str, Path], adapters: dict[tuple[str, str], Path]
) -> None:
    stored = load_file(adapters["qwen3_vl", method] / "adapter_model.safetensors")
    stored = {prefix + name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
    whole = inject_adapter_in_model(METHODS[method](read_base(bases["qwen3_vl"])).peft_config["default"], _base(bases))
    config = whole.peft_config["default"]
    assert inject_adapter_in_model(config, _base(bases), state_dict=stored).peft_config
    half = dict(list(stored.items())[: len(stored) // 2])
    for given in (half, stored | {"one.more": torch.ones(2)}):
        model = _base(bases)
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(keepsight.BrokenAdapterError, match=r"expected is|holds 1 tensors"):
            inject_adapter_in_model(config, model, state_dict=given)
        assert [name for name, _ in model.named_parameters()] == names


def _base(bases: dict[str, Path]) -> Any:
    return read_base(bases["qwen3_vl"], dtype=torch.float32)


@pytest.mark.parametrize("said", METHODS)
@pytest.mark.parametrize("held", METHODS)
def test_tensors_of_another_method_than_the_config_names(
    said: str, held: str, adapters: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["qwen3_vl", held], folder)
    shutil.copy(adapters["qwen3_vl", said] / "adapter_config.json", folder)
    if said == held:
        inspect_adapter(folder)
        return
    with pytest.raises(keepsight.BrokenAdapterError, match=r"belong to different adapters|memory's"):
        inspect_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["all", "one tensor", "one value"])
def test_a_base_that_is_not_finite(where: str, value: float, bases: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = max(tensors, key=lambda n: tensors[n].numel())
        spoilt = tensors if where == "all" else {name: tensors[name]}
        found = {n: torch.full_like(t, value) for n, t in spoilt.items()}
        if where == "one value":
            found[name] = tensors[name].clone()
            found[name].view(-1)[-1] = value
        return tensors | found

    folder = spoil(bases["qwen3_vl"], tmp_path / "base", change)
    with pytest.raises(keepsight.KeepsightError, match=r"weight holds values that are NaN or infinite|NaN or infinite"):
        read_base(folder)
    if where != "one value":  # which only the weights themselves can tell
        with pytest.raises(keepsight.KeepsightError, match="NaN or infinite"):
            check_weights(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", BASE)
def test_a_base_whose_tensors_do_not_fit(
    damage: str, name: str, bases: dict[str, Path], adapters: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = spoil(bases[name], tmp_path / "base", BASE[damage])
    for check in (
        lambda: check_weights(folder),
        lambda: check_sources(folder),
        lambda: check_sources(adapters[name, "pvm"], base=folder),
        lambda: read_base(folder),
    ):
        with pytest.raises(keepsight.KeepsightError, match=r"Stored is|is stored with shape"):
            check()


def test_whole_numbers_in_a_base_are_no_weights(bases: dict[str, Path], tmp_path: Path) -> None:
    whole = spoil(bases["qwen3_vl"], tmp_path / "base", ADAPTER["whole numbers"])
    with pytest.raises(keepsight.KeepsightError, match=r"stored as int32, and its config\.json tells of no"):
        check_weights(whole)


def test_what_a_family_ignores_by_design_is_no_damage(bases: dict[str, Path], tmp_path: Path) -> None:
    """Multi-token prediction heads of Qwen3.5, and rotary tables of old checkpoints."""
    more = {"mtp.fc.weight": torch.ones(2, 2), "model.language_model.layers.0.rotary_emb.inv_freq": torch.ones(2)}
    folder = spoil(bases["qwen3_5"], tmp_path / "base", lambda tensors: tensors | more)
    check_weights(folder)
    read_base(folder)


@pytest.mark.parametrize("method", ["NO_SUCH_METHOD", 7, None, ["PVM"]])
def test_an_unknown_method_is_named(method: Any, adapters: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    shutil.copytree(adapters["qwen3_vl", "pvm"], tmp_path / "memory")
    file = tmp_path / "memory" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": method}))
    with pytest.raises(keepsight.BrokenAdapterError, match=re.escape(f"peft_type {method!r}")):
        inspect_adapter(tmp_path / "memory")


def test_an_unknown_setting_is_named_with_its_file(adapters: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    for method in ("pvm", "vismem"):
        shutil.copytree(adapters["qwen3_vl", method], tmp_path / method)
        file = tmp_path / method / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"gates": 1}))
        with pytest.raises(keepsight.BrokenAdapterError, match=r"adapter_config\.json: .*no setting 'gates'"):
            inspect_adapter(tmp_path / method)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_a_memory_in_any_dtype_fits_a_base_in_any(
    kind: torch.dtype, adapters: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    for method in METHODS:
        folder = spoil(
            adapters["qwen3_vl", method], tmp_path / method, lambda tensors: {n: t.to(kind) for n, t in tensors.items()}
        )
        _, infos = check_sources(folder)
        assert infos[0].dtypes == (str(kind).removeprefix("torch."),)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["pvm", "vismem"])
def test_a_resized_embedding(method: str, tied: bool, tmp_path: Path) -> None:
    """Warned of when saved, refused when loaded; both ways out that the messages name lead out."""
    from keepsight.lab.reference import build_model, build_processor

    plain = build_model(seed=1)
    plain.config.tie_word_embeddings = plain.config.text_config.tie_word_embeddings = tied
    plain = type(plain)(plain.config)
    plain.save_pretrained(tmp_path / "base")
    build_processor().save_pretrained(tmp_path / "base")
    model, processor = keepsight.load(tmp_path / "base")
    rows = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["<a>", "<b>"])
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    model = METHODS[method](model)
    if method == "vismem":
        keepsight.add_memory_tokens(processor, model)
    for name, more in (("memory", {}), ("whole", {"save_embedding_layers": True})):
        with pytest.warns(keepsight.KeepsightWarning, match=f"{rows + 2} rows, that of .* has {rows}"):
            model.save_pretrained(tmp_path / name, **more)
        processor.save_pretrained(tmp_path / name)
    ids = processor.tokenizer("<a> <b>", return_tensors="pt")["input_ids"]
    before = logits(model.eval(), {"input_ids": ids})

    with pytest.raises(keepsight.AdapterMismatchError, match=r"'<a>' would be .*save_embedding_layers=True"):
        keepsight.load(tmp_path / "memory")
    again, known = keepsight.load(tmp_path / "whole")
    assert torch.equal(known.tokenizer("<a> <b>", return_tensors="pt")["input_ids"], ids)
    assert torch.equal(logits(again, {"input_ids": ids}), before)
    with pytest.raises(keepsight.AdapterMismatchError, match=rf"resize_token_embeddings\({rows + 2}\)"):
        PeftModel.from_pretrained(read_base(tmp_path / "base"), tmp_path / "whole")

    model.unload().save_pretrained(tmp_path / "resized")
    processor.save_pretrained(tmp_path / "resized")
    with pytest.warns(keepsight.KeepsightWarning, match="was trained on"):
        again, _ = keepsight.load(tmp_path / "memory", base=tmp_path / "resized")
    assert torch.equal(logits(again, {"input_ids": ids}), before)


def test_a_base_whose_tokenizer_knows_more_words(tmp_path: Path) -> None:
    model, processor = keepsight.load("keepsight/reference")
    processor.tokenizer.add_tokens(["<a>", "<b>"])
    for target in (model, processor):
        target.save_pretrained(tmp_path)
    with pytest.warns(keepsight.KeepsightWarning, match=r"has embeddings for 78: .*'<a>' \(number 78\).*resize"):
        keepsight.load(tmp_path)
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", keepsight.KeepsightWarning)
        keepsight.load(tmp_path)


def test_tokens_of_a_vismem_are_its_own(tmp_path: Path) -> None:
    from keepsight.lab.reference import build_model, save_reference

    save_reference(build_model(seed=1), tmp_path / "base")
    model, processor = keepsight.load(tmp_path / "base")
    model = METHODS["vismem"](model)
    keepsight.add_memory_tokens(processor, model)
    model.save_pretrained(tmp_path / "memory")
    processor.save_pretrained(tmp_path / "memory")
    keepsight.load(tmp_path / "memory")
    info = inspect_adapter(tmp_path / "memory")
    info.config["token_ids"] = None
    with pytest.raises(keepsight.AdapterMismatchError, match="knows"):
        check_words(info, "the base", model.config)


@pytest.mark.parametrize("method", ["pvm", "vismem"])
def test_the_card_beside_a_memory(method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Ours, without a path of this machine, rewritten when saved again; one that was written by hand stays."""
    model = METHODS[method](read_base(bases["qwen3_vl"]))
    folder = tmp_path / "memory"
    for _ in range(2):
        model.save_pretrained(folder)
        text = (folder / "README.md").read_text()
        assert str(bases["qwen3_vl"]) not in text
        assert "keepsight.load(" in text
        assert "`hf upload` does not" in text  # the folder's config names the base's place, by which it is loaded
        assert "[More Information Needed]" not in text
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    model.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert "Mine." in text
    assert "license: mit" in text
    assert str(bases["qwen3_vl"]) not in text
    model.peft_config["default"].base_model_name_or_path = "owner/name"
    model.save_pretrained(tmp_path / "other")
    text = (tmp_path / "other" / "README.md").read_text()
    assert "base_model: owner/name\n" in text
    assert "hf upload" not in text


def test_the_card_names_the_base_that_the_adapter_records(tmp_path: Path) -> None:
    """The built-in base by its name, when first saved as when saved again: a folder of this machine nowhere."""
    first = attach(keepsight.load("keepsight/reference")[0])
    first.save_pretrained(tmp_path / "first")
    keepsight.load(tmp_path / "first")[0].save_pretrained(tmp_path / "again")
    cards = [(tmp_path / name / "README.md").read_text() for name in ("first", "again")]
    assert cards[0] == cards[1]
    assert "| base | keepsight/reference, which comes with keepsight |" in cards[0]
    assert "base=FOLDER" not in cards[0]


def test_the_card_of_an_adapter_with_a_name(bases: dict[str, Path], tmp_path: Path) -> None:
    model = attach(read_base(bases["qwen3_vl"], dtype=torch.float32), adapter_name="memory")
    model.save_pretrained(tmp_path)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("README.md")] == [Path("memory/README.md")]


@pytest.mark.parametrize("method", ["pvm", "vismem"])
@pytest.mark.parametrize("named", [None, "owner/name"])
def test_what_is_published_names_no_folder_of_this_machine(
    method: str, named: str | None, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`push_to_hub` saves to a folder of its own and sends that; what is sent is looked at in place of the sending."""
    from transformers.utils import hub

    model, sent = METHODS[method](read_base(bases["qwen3_vl"])), []
    config = model.peft_config["default"]
    config.base_model_name_or_path = named or str(bases["qwen3_vl"])

    def send(self: Any, folder: str, *_: Any, **__: Any) -> None:
        assert str(bases["qwen3_vl"]) not in "".join(p.read_text() for p in Path(folder).glob("*.json"))
        sent.append(json.loads((Path(folder) / "adapter_config.json").read_text()))
        told = (Path(folder) / "README.md").read_text()
        assert "keepsight.load(" in told
        assert "hf upload" not in told
        assert "More Information Needed" not in told
        assert str(bases["qwen3_vl"]) not in told

    monkeypatch.setattr(
        hub, "hf_api", lambda: SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    )
    card = hub.ModelCard.from_template(hub.ModelCardData(library_name="transformers"))  # what it puts over ours
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", send)
    for one in (model, config):
        said = nullcontext() if named else pytest.warns(keepsight.KeepsightWarning, match="a folder of this machine")
        with said:
            one.push_to_hub("me/memory")
    assert [one["base_model_name_or_path"] for one in sent] == [named, named]
    assert config.base_model_name_or_path == (named or str(bases["qwen3_vl"]))


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_what_is_saved_can_be_read_by_whom_the_umask_lets_read(umask: int, tmp_path: Path) -> None:
    """safetensors writes for the owner alone; a memory that is copied or served by another user could not be read."""
    from keepsight.lab.reference import build_model, save_reference

    before = os.umask(umask)
    try:
        save_reference(build_model(seed=1), tmp_path / "base")
        model, processor = keepsight.load(tmp_path / "base")
        model = attach(model)
        model.save_pretrained(tmp_path / "memory")
        processor.save_pretrained(tmp_path / "memory")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("http://127.0.0.1:8000", "keepsight chat ADDRESS"),
        ("localhost:8000/v1", "keepsight chat ADDRESS"),
        ("https://huggingface.co/owner/name", "by its id: owner/name"),
    ],
)
def test_a_web_address_is_no_model(address: str, remedy: str) -> None:
    with pytest.raises(keepsight.KeepsightError, match="address") as found:
        keepsight.load(address)
    assert remedy in str(found.value)
