"""VisMem in the lab: readings are what the model itself computes, and each stage changes only its own tensors."""

import dataclasses

import numpy as np
import pytest
import torch

from keepsight.lab.digits import CELLS
from keepsight.lab.narration import TOKEN, make_narrations
from keepsight.lab.reference import load_reference
from keepsight.vismem import MemoryPolicy, Replay, RolloutOptions, VisMemBranch, splice
from studies.vismem.reading import Reading, answers_with_plan, attach_vismem, decision_column, lab_config, noise_like
from studies.vismem.rebuilding import Rebuilder
from studies.vismem.training import TrainingPlan, stage_one, start_at_the_cells, warm_start

TINY = TrainingPlan(warm_steps=3, warm_batch=2, steps=2, batch=2, group=4, shortest=30, longest=60)


def built(seed=0, **config):
    """(model with a strong random memory, processor)."""
    model, processor = load_reference()
    model = attach_vismem(model, processor, seed, lab_config(**config))
    with torch.no_grad():
        for name, parameter in VisMemBranch.of(model).active.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model, processor


def narrations(processor, rows=2, gaps=(3, 0, 5, 2, 1, 0, 2, 1), seed=0):
    return make_narrations(processor, list(gaps), rows, "test", np.random.default_rng(seed))


@torch.no_grad()
def test_a_reading_is_one_forward_of_the_whole():
    model, processor = built()
    batch = narrations(processor)
    reading = Reading(model, batch, decision_column(batch, scored=5))
    reading.invoke("long")
    formed = reading.form("long")
    reading.splice("long", formed)
    logits = reading.predict(batch.answers[-5:])

    tokens, at = reading.tokens, decision_column(batch, scored=5)
    memory = torch.tensor([[tokens.invoke["long"], *[tokens.end["long"]] * 17]] * 2)
    ids = torch.cat([batch.input_ids[:, :at], memory, batch.input_ids[:, at:]], 1)
    inputs = batch.model_inputs() | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 18))
    with splice(model, ids, formed.flatten(0, 1)):
        whole = model(**inputs, use_cache=False).logits[..., : logits.shape[-1]]
    torch.testing.assert_close(logits, whole[:, batch.answers[-5:] - 1 + 18], rtol=0, atol=2e-4)
    without = model(**batch.model_inputs(), use_cache=False).logits[..., : logits.shape[-1]]
    assert (logits - without[:, batch.answers[-5:] - 1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("kind", "long_input"), [("short", "states"), ("long", "states"), ("long", "tokens")])
def test_memories_are_the_ones_that_generate_forms(kind, long_input):
    model, processor = built(long_input=long_input)
    batch = narrations(processor, rows=1)
    reading = Reading(model, batch, decision_column(batch))
    at = reading.column
    reading.invoke(kind)
    latents = reading.form(kind)[0]
    written = torch.cat([batch.input_ids[0, batch.start : at], torch.tensor([reading.tokens.invoke[kind]])])
    inputs = {k: v for k, v in batch.model_inputs().items() if k != "attention_mask"}
    inputs |= {k: v[:, : batch.start] for k, v in inputs.items() if v.shape == batch.input_ids.shape}
    with pytest.warns(UserWarning, match="never trained"):
        out = model.generate(
            **inputs,
            memory=MemoryPolicy("only_long"),
            rollout=RolloutOptions([Replay(written)]),
            max_new_tokens=len(written) + 20,
            return_dict_in_generate=True,
        )
    torch.testing.assert_close(out.invocations[0][0].latents, latents, rtol=0, atol=1e-4)


@torch.no_grad()
def test_alternatives_leave_no_trace():
    model, processor = built()
    batch = narrations(processor)
    reading = Reading(model, batch, decision_column(batch))
    mark, answers = reading.mark(), batch.answers[-6:]
    plain = reading.predict(answers)
    reading.rewind(mark)
    reading.remember("short")
    with_memory = reading.predict(answers)
    reading.rewind(mark)
    assert torch.equal(reading.predict(answers), plain)
    assert not torch.allclose(plain, with_memory)


@torch.no_grad()
def test_plans_invoke_where_they_say():
    model, processor = built()
    batch = narrations(processor)
    reading = Reading(model, batch, decision_column(batch, scored=4))
    reading.remember("long")
    expected = reading.predict(batch.answers[-4:]).argmax(-1)
    assert torch.equal(answers_with_plan(Reading(model, batch), {4: "long"}, scored=4), expected)
    everywhere = Reading(model, batch)
    answers_with_plan(everywhere, dict.fromkeys(range(1, 8), "short"), scored=4)
    assert everywhere.mark().length == int(batch.answers[-1]) + 7 * 18


def test_stages_change_memory_tensors_only():
    model, processor = load_reference()
    model = attach_vismem(model, processor, 0, lab_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = warm_start(model, processor, TINY, 0)
    between = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    second = stage_one(model, processor, TINY, 0)
    assert set(first["warm_last"]) == set(second["stage_one_last"]) == {"short", "long"}
    for old, new in ((before, between), (between, model.state_dict())):
        changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
        assert changed
        assert all("vismem_memory" in name and ".rows." not in name for name in changed)


@pytest.mark.parametrize(
    "change",
    [{"credit": "fact"}, {"taught": True}, {"rebuild": True, "kinds": ("long",), "taught": True}, {"start": "cells"}],
    ids=str,
)
def test_other_objectives_change_memory_tensors_only_too(change):
    model, processor = load_reference()
    model = attach_vismem(model, processor, 0, lab_config())
    plan = dataclasses.replace(TINY, **change)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    facts = warm_start(model, processor, plan, 0)
    between = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stage_one(model, processor, plan, 0)
    assert ("rebuilt_last" in facts) == ("rebuild" in change)
    for old, new in ((before, between), (between, model.state_dict())):
        changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
        assert changed
        assert all("vismem_memory" in name and ".rows." not in name for name in changed)


def test_a_former_that_starts_at_the_cells_forms_what_the_base_reads():
    """Which takes slots that are the names, as the base would read them."""
    model, processor = load_reference()
    model = attach_vismem(model, processor, 0, lab_config(long_input="tokens"))
    start_at_the_cells(model)
    slots = VisMemBranch.of(model).active.long_slots
    words = model.get_input_embeddings()(torch.tensor([TOKEN[cell] for cell in CELLS]))
    assert torch.equal(slots, words)


def test_a_rebuilder_can_tell_more_embeddings_than_there_are_latents():
    torch.manual_seed(0)
    latents = torch.randn(64, 2, 8)
    wanted = torch.cat([latents, latents.flip(1)[:, :1] - latents[:, :1]], 1)  # three from two
    decoder = Rebuilder(3, 8, heads=2)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (decoder(latents) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_noise_has_the_norms_of_what_it_stands_for():
    latents = torch.randn(2, 3, 8) * torch.tensor([1.0, 5.0, 0.1])[:, None]
    noise = noise_like(latents, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.norm(dim=-1), latents.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(noise, latents, dim=-1).abs().max() < 0.99
