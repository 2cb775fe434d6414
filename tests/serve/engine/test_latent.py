"""VisMem in a running batch: rows invoke memories at different steps, and every answer is that of `generate`."""

import sys
from pathlib import Path

import pytest
import torch
from families import BY_NAME, Row
from serve_helpers import Numbers, alone, finish, make_job, report

from keepsight.serve.hf.batch import Batch
from keepsight.vismem import VisMemBranch
from keepsight.vismem.tokens import MemoryTokens

sys.path.insert(0, str(Path(__file__).parents[2] / "vismem"))
from vismem_helpers import WordsAndMemory, attach

ROWS = [Row(3, (1, 2), 2, (2, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2), Row(7, seed=3), Row(9, (2, 1), 3, seed=4)]
LENGTHS = [40, 25, 33, 28]


@pytest.fixture(params=[("qwen3_vl", "states"), ("qwen3_vl", "tokens"), ("llava_onevision", "states")], ids="-".join)
def latent(request):
    """A model whose random invocation rows fire now and then, and its family."""
    family, long_input = BY_NAME[request.param[0]], request.param[1]
    model = attach(family.build(), max_invocations=3, max_text_states=4, long_input=long_input)
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(0.6)
    return family, model


def jobs(family, model, **more):
    return [make_job(family, model, row, max_tokens=n, **more) for row, n in zip(ROWS, LENGTHS, strict=True)]


def test_alone_is_generate_and_company_changes_nothing(latent):
    family, model = latent
    tokens = MemoryTokens(VisMemBranch.of(model).config.token_ids)
    expected = []
    for job in jobs(family, model):
        out = model.generate(
            **job.inputs,
            do_sample=False,
            max_new_tokens=job.sampling.max_tokens,
            logits_processor=[WordsAndMemory()],
            return_dict_in_generate=True,
        )
        new = out.sequences[0, job.prompt_tokens :]
        words = new[~tokens.memory_mask(new)].tolist()
        offsets = []
        for found in out.invocations[0]:
            before = new[: found.position - job.prompt_tokens]
            offsets.append((found.kind, len(Numbers().decode(before[~tokens.memory_mask(before)].tolist()))))
        expected.append((words, offsets, len(new), len(new) - len(words)))
    assert sum(len(e[1]) for e in expected) > 3
    assert len({kind for e in expected for kind, _ in e[1]}) == 2  # both types

    def as_tuple(send):
        done = send.done[0]
        offsets = [(i.kind, i.text_offset) for i in done.invocations]
        return send.ids(), offsets, done.tokens, done.memory_tokens

    assert [as_tuple(alone(model, job)) for job in jobs(family, model)] == expected
    batch, together = Batch(model, Numbers(), True), jobs(family, model)
    for job in together:
        batch.join(batch.read(job))
        report(batch.step())
    finish(batch)
    assert [as_tuple(job.send) for job in together] == expected


def test_off_is_the_base(latent):
    family, model = latent
    base = family.build()
    batch, off = Batch(model, Numbers(), False), jobs(family, model, memory=False)
    for job in off:
        batch.join(batch.read(job))
    finish(batch)
    assert [job.send.ids() for job in off] == [alone(base, job).ids() for job in jobs(family, base)]
    assert not any(job.send.done[0].invocations for job in off)


def test_a_memory_that_cannot_be_formed_is_one_requests_error(latent, monkeypatch):
    family, model = latent
    from keepsight.vismem.formers import Formers

    expected = [alone(model, job).ids() for job in jobs(family, model)]
    form, doomed = Formers.form, jobs(family, model)
    batch = Batch(model, Numbers(), True)
    for job in doomed:
        batch.join(batch.read(job))
    victim = next(row for row in batch.rows if row.job is doomed[1])

    def fails(self, kind, formations):
        if any(f.sight is victim.latent.sight for f in formations):
            raise RuntimeError("broken")
        return form(self, kind, formations)

    monkeypatch.setattr(Formers, "form", fails)
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(0.6)
    finish(batch)
    assert doomed[1].send.failed is not None
    assert [doomed[i].send.ids() for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("policy", ["free", "random"])
def test_a_seed_gives_the_same_answer_in_any_company(policy):
    """A memory goes in by one step alone, and by many beside rows that write: that must not cost draws."""
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build(), max_invocations=3, max_text_states=4, policy=policy, random_probability=0.7)
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(0.6)
    VisMemBranch.of(model).config.delimiter_ids = list(range(20, 40))
    options = {"temperature": 1.2, "seed": 5}
    expected = [alone(model, job) for job in jobs(family, model, **options)]
    assert sum(len(one.done[0].invocations) for one in expected) > 3
    batch, together = Batch(model, Numbers(), True), jobs(family, model, **options)
    for job in together:
        batch.join(batch.read(job))
        report(batch.step())
    finish(batch)
    assert [job.send.ids() for job in together] == [one.ids() for one in expected]
    assert [job.send.done[0].invocations for job in together] == [one.done[0].invocations for one in expected]
