"""What `keepsight.compat` says of the installed transformers and PEFT, on every release alike."""

import contextlib
import inspect
import re
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import BY_NAME, Row, make_inputs
from helpers import attach, logits
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

import keepsight
from keepsight import compat
from keepsight.backbone import Backbone
from keepsight.vismem import VisMemOutput

ROOT = Path(__file__).parents[2]
ROWS = [Row(2, (2, 2), 4, seed=1)]


def test_a_cache_is_found_by_what_it_is_whatever_its_name_and_place():
    cache = DynamicCache()
    ids = torch.zeros(1, 2)
    for args, kwargs in [
        ((ids, cache), {}),
        ((), {"cache": cache}),
        ((), {"memory_of_keys": cache, "use_cache": True}),
    ]:
        assert compat.find_cache(args, kwargs) is cache
    assert compat.find_cache((cache,), {"cache": cache}) is cache  # one cache under two names
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert compat.find_cache((), {"cache": both}) is both


def test_a_call_that_says_cache_and_carries_none_has_none():
    nothing = [(), (torch.zeros(1),)]
    assert all(compat.find_cache(args, {"use_cache": True, "cache": None, "position": 3}) is None for args in nothing)
    assert compat.find_cache() is None


def test_two_caches_in_one_call_are_refused():
    with pytest.raises(keepsight.KeepsightError, match="two KV caches in one call"):
        compat.find_cache((DynamicCache(),), {"cache": DynamicCache()})


def test_the_cache_of_an_output_is_found_in_every_kind_of_output(family):
    model = family.build()
    inputs = make_inputs(family, model, ROWS)
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with torch.no_grad():
        outputs = [model(**inputs, use_cache=True, return_dict=wanted) for wanted in (True, False)]
        assert compat.find_output_cache(model(**inputs, use_cache=False)) is None
    assert all(compat.find_output_cache(output).get_seq_length() for output in (generated, *outputs))
    assert compat.find_output_cache(torch.zeros(1)) is None


def test_a_cache_is_taken_under_the_name_that_is_passed(family):
    """The model, its decoder, and a PEFT model around it fill the very cache that they are given."""
    model = family.build()
    inputs = make_inputs(family, model, ROWS)
    ids = inputs["input_ids"]
    decoder = Backbone.of(model).decoder
    wrapped = attach(family.build())
    embeds = model.get_input_embeddings()(ids)
    for callee, given in [(model, inputs), (wrapped, inputs), (decoder, {"inputs_embeds": embeds})]:
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            output = callee(**given, use_cache=True, **compat.cache_argument(callee, cache))
        assert cache.get_seq_length() == ids.shape[1]
        assert compat.find_output_cache(output) is cache
    assert compat.cache_argument(model, None) == {}


def test_generate_takes_a_cache_under_the_name_that_is_passed():
    family = BY_NAME["internvl_qwen2"]
    model = family.build()
    inputs = make_inputs(family, model, ROWS)
    cache = DynamicCache(config=model.config.get_text_config())
    model.generate(**inputs, max_new_tokens=2, do_sample=False, **compat.cache_argument(model, cache))
    assert cache.get_seq_length()


def test_a_parameter_is_found_by_its_type_where_a_model_names_it_otherwise():
    class Renamed(torch.nn.Module):
        def forward(self, x: torch.Tensor, kept_states: "DynamicCache | None" = None, keys: "Cache | None" = None):  # noqa: F821
            return keys

    cache = DynamicCache()
    model = Renamed()
    assert model(torch.zeros(1), **compat.cache_argument(model, cache)) is cache


def test_the_vismem_output_names_its_cache_as_generate_does():
    cache = DynamicCache()
    ids = torch.zeros(1, 3, dtype=torch.long)
    output = VisMemOutput(sequences=ids, sampled=ids.bool(), **compat.cache_argument(VisMemOutput, cache))
    assert isinstance(output, GenerateDecoderOnlyOutput)
    theirs = GenerateDecoderOnlyOutput(sequences=ids, **compat.cache_argument(GenerateDecoderOnlyOutput, cache))
    assert set(theirs) < set(output)
    (name,) = set(theirs) - {"sequences"}
    assert output[name] is getattr(output, name) is compat.find_output_cache(output) is cache
    assert output.to_tuple()[0] is ids
    # The old name is an alias where transformers keeps one, and the name itself on older releases.
    assert output["past_key_values"] is output.past_key_values is cache


def test_training_arguments_switch_checkpointing_under_this_release_s_name(tmp_path):
    for enabled in (False, True):
        arguments = TrainingArguments(str(tmp_path), **compat.checkpointing_arguments(TrainingArguments, enabled))
        trainer = Trainer(model=BY_NAME["qwen3_vl"].build(), args=arguments)
        assert not compat.checkpoints_reentrantly(trainer.args)
        values = [v for k, v in vars(arguments).items() if re.fullmatch("(gradient|activation)_checkpointing", k)]
        assert any(values) == enabled


@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_reentrant_checkpointing_is_seen_under_either_name(name):
    for options, expected in [(None, False), ({"use_reentrant": False}, False), ({"use_reentrant": True}, True)]:
        assert compat.checkpoints_reentrantly(SimpleNamespace(**{name: options})) == expected
    assert not compat.checkpoints_reentrantly(SimpleNamespace())


def test_checkpointing_is_switched_without_a_deprecated_name():
    for model in (BY_NAME["qwen3_vl"].build(), attach(BY_NAME["qwen3_vl"].build())):
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            compat.enable_checkpointing(model)
        assert all(layer.gradient_checkpointing for layer in layers)
        compat.disable_checkpointing(model)
        assert not any(layer.gradient_checkpointing for layer in layers)


def test_what_docs_say_of_transformers_own_adapter_methods_is_what_they_do(tmp_path):
    """docs/pvm.md: they work, or refuse together, for want of a newer PEFT; loading, and PEFT's own, work anyway."""
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())
    inputs = make_inputs(family, model, ROWS)
    model.save_pretrained(tmp_path)
    before = logits(model, inputs)
    plain = family.build()
    works = Version(metadata.version("peft")) >= Version(MIN_PEFT_VERSION)
    told = pytest.warns(
        keepsight.KeepsightWarning, match=f"wants PEFT >= {MIN_PEFT_VERSION} .*set_adapter.*will refuse"
    )
    with contextlib.nullcontext() if works else told:
        plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain, inputs), before)
    methods = {
        "set_adapter": ("default",),
        "disable_adapters": (),
        "enable_adapters": (),
        "add_adapter": (keepsight.PvmConfig(layers=[1], width=16), "second"),
        "save_pretrained": (tmp_path / "again",),
        "delete_adapter": ("default",),
    }
    for name, arguments in methods.items():
        with contextlib.nullcontext() if works else pytest.raises(ValueError, match="version of PEFT"):
            getattr(plain, name)(*arguments)
    # PEFT's own way needs no newer PEFT on any release (`keepsight.load`: tests/checkpoints).
    with warnings.catch_warnings():
        warnings.simplefilter("error", keepsight.KeepsightWarning)
        again = PeftModel.from_pretrained(family.build(), tmp_path)
    assert torch.equal(logits(again, inputs), before)
    with again.disable_adapter():
        assert torch.equal(logits(again, inputs), logits(family.build(), inputs))


def test_names_without_a_place_are_shown_once_and_only_where_they_are_asked_for(tmp_path):
    """On an adapter of PEFT's own, with one tensor too many, which transformers passes over."""
    family = BY_NAME["internvl_qwen2"]
    get_peft_model(family.build(), LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.nowhere.lora_A.weight": torch.zeros(2, 2)}, file)
    seen: list[list[str]] = []
    model = family.build()
    compat.when_loaded(model, seen.append)
    for name in ("first", "second"):
        model.load_adapter(str(tmp_path), name)
    assert len(seen) == 1
    assert [name for name in seen[0] if "nowhere" in name]
    model = family.build()
    compat.when_loaded(model, seen.append)
    compat.not_loaded(model)
    model.load_adapter(str(tmp_path))
    assert len(seen) == 1
    other = torch.nn.Linear(1, 1)
    before = dict(vars(other))
    compat.when_loaded(other, seen.append)
    compat.not_loaded(other)
    assert vars(other) == before


def test_a_step_of_continuous_batching_is_known_by_its_cache():
    paged = object.__new__(PagedAttentionCache)
    assert compat.has_paged_cache({"input_ids": torch.zeros(1), "kept": paged})
    assert not compat.has_paged_cache({"cache": DynamicCache(), "use_cache": True})


def test_a_release_that_declares_no_cache_is_named(monkeypatch):
    monkeypatch.setattr(compat, "GenerationOutput", ModelOutput)
    with pytest.raises(keepsight.KeepsightError, match=r"declares no KV cache .*tested with"):
        compat.cache_argument(torch.nn.Linear(1, 1), DynamicCache())


def test_a_processor_takes_what_its_call_reads():
    """By what PaliGemma's processor does with a `suffix`, wherever a release writes it down."""
    processors = [transformers.PaliGemmaProcessor, transformers.LlavaProcessor]
    takes = [compat.processor_takes(processor.__new__(processor), "suffix") for processor in processors]
    assert takes == ["suffix" in inspect.getsource(processor.__call__) for processor in processors] == [True, False]


def test_nothing_else_names_a_cache_argument():
    """No file of code, no notebook, and no block of code in a page."""
    called = r"""(model|vlm|decoder|generate|forward|prefill)\([^()]*\bcache ?="""
    named = re.compile(rf"""\bpast_key_values\b|cache_params|kwargs(\.get\(|\.pop\(|\[)["']cache["']|{called}""")
    assert named.search("model(**inputs, use_cache=True, cache=kept)")
    assert not named.search("model(**inputs, use_cache=True)")
    folders = [
        *("src", "studies", "benchmarks", "examples", "recipes", "tools", "notebooks", "docs"),
        *ROOT.glob("tests*"),
    ]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in _CODE]
    files = [file for file in files if ".sources" not in file.parts]  # what `make test-peers` downloads
    files += ROOT.glob("*.md")
    assert {file.suffix for file in files} == _CODE
    found = {file.name for file in files if named.search(_code(file))}
    assert found == {"compat.py", "test_compat.py"}


_CODE = {".py", ".ipynb", ".md", ".sh"}


def _code(file):
    text = file.read_text()
    return "\n".join(re.findall(r"^```.*?^```", text, re.M | re.S)) if file.suffix == ".md" else text
