"""Rows that join and leave a running batch get exactly the answers that they would get alone."""

import pytest
import torch
from families import BY_NAME, FAMILIES, MORE, Row
from helpers import OnlyWords, attach
from serve_helpers import Numbers, alone, finish, make_job, report, values

from keepsight.backbone import Backbone
from keepsight.serve.hf.batch import Batch
from keepsight.serve.hf.cache import can_share

ROWS = [Row(3, (1, 2), 2, (2, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2), Row(7, seed=3), Row(9, (2, 1), 3, seed=4)]
LENGTHS = [14, 5, 9, 3]
SPARSE = ("mistral_large4",)  # their cache holds the keys of an indexer too
CLOSE = {"rtol": 0.0, "atol": 5e-5}


def jobs(family, model, **more):
    return [make_job(family, model, row, max_tokens=n, **more) for row, n in zip(ROWS, LENGTHS, strict=True)]


def staggered(model, jobs, memory=True):
    """One request joins before every second step; rows leave whenever they are done."""
    batch = Batch(model, Numbers(), memory)
    waiting = list(jobs)
    longest = 0
    while waiting or batch.rows:
        if waiting:
            batch.join(Batch(model, Numbers(), memory).read(waiting.pop(0)))
        for _ in range(2):
            longest = max(longest, len(batch.rows))
            if batch.rows:
                report(batch.step())
    assert longest > 2  # they did run together
    return [job.send for job in jobs]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.mark.parametrize("family", [*FAMILIES, *MORE], ids=lambda family: family.name)
def test_joining_and_leaving_changes_no_answer(family):
    model = attach(family.build())
    if Backbone.of(model).has_sliding_windows or family.name in SPARSE:  # the engine runs their requests one by one
        assert not can_share(Batch(model, Numbers(), True).read(jobs(family, model)[0]).cache)
        return
    expected = [alone(model, job) for job in jobs(family, model)]
    found = staggered(model, jobs(family, model))
    for job, one, other in zip(jobs(family, model), expected, found, strict=True):
        assert other.ids() == one.ids()
        torch.testing.assert_close(values(other), values(one), **CLOSE)
        assert other.done[0].reason == "length"
        assert other.done[0].tokens == job.sampling.max_tokens
    assert len({tuple(values(one).flatten().tolist()) for one in expected}) == 4  # the images and texts matter


def test_alone_is_generate(family):
    model = attach(family.build())
    for job in jobs(family, model):
        plain = model.generate(
            **job.inputs, do_sample=False, max_new_tokens=job.sampling.max_tokens, logits_processor=[OnlyWords()]
        )
        assert alone(model, job).ids() == plain[0, job.prompt_tokens :].tolist()


def test_memory_off_is_the_base_beside_rows_with_memory():
    family = BY_NAME["qwen3_vl"]
    model, base = attach(family.build()), family.build()
    expected_on = [alone(model, job) for job in jobs(family, model)]
    expected_off = [alone(base, job) for job in jobs(family, base)]
    on, off = Batch(model, Numbers(), True), Batch(model, Numbers(), False)
    jobs_on, jobs_off = jobs(family, model), jobs(family, model, memory=False)
    for batch, requests in ((on, jobs_on), (off, jobs_off)):
        for job in requests:
            batch.join(batch.read(job))
    while on.rows or off.rows:  # step by step in turn, as the engine does
        for batch in (on, off):
            if batch.rows:
                report(batch.step())
    assert [job.send.ids() for job in jobs_on] == [one.ids() for one in expected_on]
    assert [job.send.ids() for job in jobs_off] == [one.ids() for one in expected_off]
    assert [one.ids() for one in expected_on] != [one.ids() for one in expected_off]


def test_memory_off_is_the_base_bit_for_bit(family):
    model, base = attach(family.build()), family.build()
    for off, plain in zip(jobs(family, model, memory=False, logprobs=5), jobs(family, base, logprobs=5), strict=True):
        assert alone(model, off).logprobs == alone(base, plain).logprobs


def test_a_row_that_fails_in_the_forward_fails_alone():
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())
    expected = [alone(model, job) for job in jobs(family, model)]
    batch = Batch(model, Numbers(), True)
    requests = jobs(family, model)
    for job in requests:
        batch.join(batch.read(job))
    report(batch.step())
    victim = len(batch.rows[1].ids)
    layer = batch.base.model.language_model.layers[2]  # half-way: some layers have cached the step, others not

    def fail(module, args, kwargs):
        mine = [row for row in seen[-1].rows if len(row.ids) == victim and row.job is requests[1]]
        if mine:
            raise RuntimeError("something that quotes a secret")

    seen = []
    forward = Batch._forward
    try:
        Batch._forward = lambda self, *args: (seen.append(self), forward(self, *args))[1]
        handle = layer.register_forward_pre_hook(fail, with_kwargs=True)
        finish(batch)
    finally:
        Batch._forward = forward
        handle.remove()
    assert requests[1].send.failed.error.status == 500
    assert "secret" not in requests[1].send.failed.error.message
    for i in (0, 2, 3):
        assert requests[i].send.ids() == expected[i].ids()


def test_several_answers_are_repeatable_and_independent_of_company():
    family = BY_NAME["qwen2_5_vl"]
    model = attach(family.build())
    drawn = {"temperature": 1.5, "seed": 7, "choices": 3}
    one = alone(model, make_job(family, model, ROWS[1], **drawn))
    batch = Batch(model, Numbers(), True)
    job = make_job(family, model, ROWS[1], **drawn)
    for request in (*jobs(family, model, temperature=1.0), job):
        batch.join(batch.read(request))
    finish(batch)
    assert [job.send.ids(i) for i in range(3)] == [one.ids(i) for i in range(3)]
    assert len({tuple(one.ids(i)) for i in range(3)}) == 3
    other = alone(model, make_job(family, model, ROWS[1], **(drawn | {"seed": 8})))
    assert other.ids() != one.ids()


def test_a_cancelled_row_frees_its_cache():
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())
    batch = Batch(model, Numbers(), True)
    requests = jobs(family, model)
    for job in requests:
        batch.join(batch.read(job))
    batch.step()
    requests[0].is_cancelled = True  # the longest, and the only one with two images
    batch.step()
    longest = max(len(row.ids) for row in batch.rows)
    shapes = {tuple(layer.keys.shape[::2]) for layer in batch.cache.layers if layer.keys is not None}
    assert shapes == {(len(batch.rows), longest)}
    from keepsight.pvm.cache import VisualCache

    assert VisualCache.of(batch.cache).valid.shape == (len(batch.rows), 4)
    for job in requests:
        job.is_cancelled = True
    batch.step()
    assert batch.cache is None
    assert batch.logits is None
