"""A forward with labels, a compiled one, a trainer's: the base's own loss over all tokens, or refused by name."""

import warnings

import pytest
import torch
from families import Row, make_inputs
from helpers import with_continuation
from peft import LoraConfig, get_peft_model
from vismem_helpers import BY_NAME, attach, built, forced, generate

import keepsight
from keepsight.vismem import VisMemBranch, VisMemConfig, splice

LORA = {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "init_lora_weights": False}


def test_the_loss_is_the_bases_own(any_name):
    """Every argument of the base's loss counts as it does in the base; labels may hold the new tokens."""
    model, inputs = built(any_name, [Row((2, 2), 4, seed=1)])
    ids = inputs["input_ids"]
    shifted = torch.full_like(ids, 7)
    variants = [{}, {"shift_labels": shifted}, {"num_items_in_batch": 3}, {"return_dict": False}]
    if any_name.endswith("moe"):
        variants.append({"output_router_logits": True})
    branch, function = VisMemBranch.of(model), torch.nn.functional.cross_entropy
    with torch.no_grad():
        for more in variants:
            out = model(**inputs, labels=ids, **more)
            loss, logits = (out[0], out[1]) if more == {"return_dict": False} else (out.loss, out.logits)
            with model.disable_adapter():
                base = model(**inputs, labels=ids, **more)
            base_loss, base_logits = (base[0], base[1]) if more == {"return_dict": False} else (base.loss, base.logits)
            targets = shifted if "shift_labels" in more else torch.cat([ids[:, 1:], ids[:, :1] * 0 - 100], 1)
            change = function(logits.flatten(0, 1), targets.flatten()) - function(
                base_logits.flatten(0, 1), targets.flatten()
            )
            if "num_items_in_batch" in more:
                change = change * (targets != -100).sum() / 3
            assert logits.shape[-1] == base_logits.shape[-1] + 4
            torch.testing.assert_close(loss - base_loss, change, rtol=0, atol=2e-5)
            assert change.abs() > 1e-4
    labels = torch.where(torch.arange(ids.shape[1]) == 2, branch.tokens.invoke["long"], ids)
    model(**inputs, labels=labels).loss.backward()
    assert branch.active.rows.invoke_bias.grad.abs().max() > 0
    plain = model.get_base_model().loss_function
    assert plain.__self__ is branch
    model.unload()
    assert model.get_base_model().loss_function == branch.base_loss


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl_qwen3", "llava_onevision"])
@pytest.mark.parametrize("is_on", [False, True])
def test_a_compiled_forward_equals_the_eager_one(family, is_on):
    model, inputs = built(family, [Row(6, seed=1)])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if is_on:
        text["input_ids"][0, 3] = VisMemBranch.of(model).tokens.invoke["long"]
    torch._dynamo.reset()
    with torch.no_grad():
        if is_on:
            compiled, eager = torch.compile(model, fullgraph=True, backend="eager")(**text), model(**text)
        else:
            with model.disable_adapter():
                compiled, eager = torch.compile(model, fullgraph=True, backend="eager")(**text), model(**text)
    torch.testing.assert_close(compiled.logits, eager.logits, rtol=0, atol=1e-5)
    assert eager.logits.shape[-1] == 128 + 4 * is_on


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl_qwen3"])
def test_a_compiled_model_that_reads_images_equals_the_eager_one(family):
    """Images break the graph in two; what a hook noted in one part is there in the next."""
    model, inputs = built(family, [Row(3, (2, 2), 4, seed=1)])
    base, plan = model.get_base_model(), forced([{1: "short", 3: "long"}])
    branch, eager = VisMemBranch.of(model), {}
    forward = base.forward
    torch._dynamo.reset()
    for kind in ("eager", "compiled"):
        base.forward = forward if kind == "eager" else torch.compile(forward, backend="eager")
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        out = generate(model, inputs, n=20, memory=plan)
        found = {"loss": loss.detach(), "bias": branch.active.rows.invoke_bias.grad.clone(), "ids": out.sequences}
        found |= {f"memory {n}": i.latents for n, i in enumerate(out.invocations[0])}
        assert len(found) == 5
        eager = eager or found
    for name, value in found.items():
        torch.testing.assert_close(value, eager[name], rtol=0, atol=1e-5)


def test_merging_beside_a_memory_is_refused_before_anything_is_merged():
    family = BY_NAME["qwen2_5_vl"]
    base = family.build()
    inputs = make_inputs(family, base, [Row(3, (2, 2), 4, seed=1)])
    lora = get_peft_model(base, LoraConfig(**LORA))
    model = attach(base, adapter_name="memory")
    before = generate(model, inputs, memory=forced([{2: "long"}]))
    layers = [m for m in base.modules() if hasattr(m, "lora_A")]
    for merge in (lora.merge_adapter, lora.merge_and_unload):
        with pytest.raises(keepsight.MergeError, match="beside a latent memory"):
            merge()
        assert not any(layer.merged for layer in layers)
    lora.unmerge_adapter()
    after = generate(model, inputs, memory=forced([{2: "long"}]))
    assert torch.equal(torch.stack(after.logits), torch.stack(before.logits))
    # Without the LoRA the memory goes on; without the memory the LoRA merges; merged first, the memory says so.
    assert lora.unload() is base
    assert not any(hasattr(m, "lora_A") for m in base.modules())
    assert generate(model, inputs, memory=forced([{2: "long"}])).invocations[0]
    model.unload()
    assert [name for name, _ in base.named_children()] == [name for name, _ in family.build().named_children()]
    lora = get_peft_model(base, LoraConfig(**LORA))
    lora.merge_adapter()
    model = attach(base, adapter_name="memory")
    with pytest.raises(keepsight.KeepsightError, match="unmerge_adapter"):
        generate(model, inputs, memory=forced([{2: "long"}]))
    lora.unmerge_adapter()
    assert generate(model, inputs, memory=forced([{2: "long"}])).invocations[0]


def test_no_lora_ever_leaks_into_a_formation():
    """Each new one is kept out, also where its modules lie where earlier ones lay in memory."""
    model, inputs = built("qwen2_5_vl", [Row(3, (2, 2), 4, seed=1)])
    base, branch = model.get_base_model(), VisMemBranch.of(model)
    formation = generate(model, inputs, memory=forced([{2: "long"}])).invocations[0][0].formation
    with torch.no_grad():
        plain = branch.formers().form("long", [formation])
        for index in range(10):
            lora = get_peft_model(base, LoraConfig(r=4, **LORA), adapter_name=f"lora{index}")
            torch.testing.assert_close(branch.formers().form("long", [formation]), plain, rtol=0, atol=1e-6)
            lora.unload()
            del lora


def test_stock_trainers_are_refused_by_name(tmp_path):
    """TRL's trainers take their loss past the head; the refusal names the command that trains a memory."""
    from datasets import Dataset
    from tiny_training import draw_digit
    from transformers import AutoProcessor
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from keepsight.lab.reference import build_model, save_reference

    save_reference(build_model(), tmp_path / "vlm")
    prompt = [[{"role": "user", "content": "read"}]] * 4
    images = {"prompt": prompt, "images": [[draw_digit(3)]] * 4}
    answers = {"completion": [[{"role": "assistant", "content": "a1 3 ."}]] * 4}
    config = VisMemConfig(num_queries=3, num_short=2, num_long=2, query_width=16, query_heads=2)
    common = {"output_dir": str(tmp_path), "max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
    processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    more = {"peft_config": config, "processing_class": processor}
    grpo = GRPOConfig(
        **common, num_generations=2, per_device_train_batch_size=2, max_completion_length=4, remove_unused_columns=False
    )
    trainers = [
        SFTTrainer(
            str(tmp_path / "vlm"),
            SFTConfig(**common, max_length=None),
            train_dataset=Dataset.from_dict(images | answers),
            **more,
        ),
        GRPOTrainer(
            str(tmp_path / "vlm"),
            args=grpo,
            reward_funcs=lambda completions, **_: [0.0, 1.0],
            train_dataset=Dataset.from_dict(images),
            **more,
        ),
    ]
    for trainer in trainers:
        with pytest.raises(keepsight.KeepsightError, match="keepsight train vismem-formation"):
            trainer.train()


def test_a_trainer_that_forms_no_memory_is_told_so(tmp_path):
    """transformers' own Trainer goes through the head, and teaches the special tokens' rows alone."""
    from transformers import Trainer, TrainingArguments

    model, inputs = built("qwen3_vl", [Row((2, 2), 4, seed=1)])
    options = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    batch = inputs | {"labels": inputs["input_ids"]}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = Trainer(model, TrainingArguments(**options), train_dataset=[0], data_collator=lambda rows: batch)
    with pytest.warns(keepsight.KeepsightWarning, match="keepsight train vismem-formation"):
        trainer.train()
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert changed
    assert all(".rows." in name for name in changed)
    # Nothing is said where nothing is trained, where latents are given, or where only something else learns.
    with warnings.catch_warnings():
        warnings.simplefilter("error", keepsight.KeepsightWarning)
        with torch.no_grad():
            model(**inputs)
        out = generate(model, inputs, memory=forced([{1: "long"}]))
        longer = with_continuation(inputs, out.sequences[:, inputs["input_ids"].shape[1] :])
        with splice(model, out.sequences, out.invocations):
            model(**longer, labels=out.sequences).loss.backward()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".rows." in name)
        model(**inputs)
