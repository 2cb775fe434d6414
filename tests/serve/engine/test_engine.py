"""The engine by itself: who runs beside whom, in which order, and what is left behind."""

import dataclasses
import gc
import weakref

import pytest
import torch
from families import BY_NAME, Row
from families.first import internvl
from families.parts import decoder
from helpers import OnlyWords, attach
from live import wait_for
from serve_helpers import Numbers, alone, make_job

from keepsight.serve.errors import ApiError
from keepsight.serve.hf.engine import BatchEngine

ROWS = [Row(3, (1, 2), 2, (2, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2), Row(7, seed=3), Row(30, seed=4)]


@pytest.fixture
def run():
    """Starts an engine and stops it in good order."""
    engines = []

    def start(model, **more):
        engines.append(BatchEngine(model, Numbers(), **({"max_batch": 3} | more)))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        assert engine.close(20)


def together(engine, jobs):
    for job in jobs:
        engine.submit(job)
    wait_for(lambda: all(len(job.send.done) == job.choices or job.send.failed for job in jobs))
    return [job.send for job in jobs]


def test_more_requests_than_places_with_and_without_memory(run):
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())

    def jobs():
        return [make_job(family, model, row, memory=memory) for row in ROWS for memory in (True, False)]

    expected = [alone(model, job).ids() for job in jobs()]
    found = together(run(model), jobs())
    assert [one.ids() for one in found] == expected


def test_sliding_windows_are_served_unbatched(run):
    text = decoder(model_type="qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2)
    family = dataclasses.replace(BY_NAME["internvl_qwen2"], config=lambda: internvl(text))
    model = attach(family.build())
    assert "sliding_attention" in model.config.text_config.layer_types
    jobs = [make_job(family, model, row) for row in ROWS]
    expected = [alone(model, make_job(family, model, row)).ids() for row in ROWS]
    assert [one.ids() for one in together(run(model), jobs)] == expected
    inputs = make_job(family, model, ROWS[3]).inputs
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=12, logits_processor=[OnlyWords()])
    assert expected[3] == plain[0, -12:].tolist()


def test_nothing_of_a_request_is_kept(run):
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())
    engine = run(model)
    pixels, caches = [], []

    def serve(row):
        job = make_job(family, model, row)
        pixels.append(weakref.ref(job.inputs["pixel_values"]))
        engine.submit(job)
        wait_for(lambda: engine._batches or job.send.done)
        caches.extend(weakref.ref(batch.cache) for batch in engine._batches if batch.cache is not None)
        wait_for(lambda: job.send.done)
        assert job.inputs == {}

    for row in ROWS[:2]:
        serve(row)
    wait_for(lambda: not engine._batches)
    gc.collect()
    assert caches
    assert not [ref for ref in (*pixels, *caches) if ref() is not None]


def test_a_prompt_that_cannot_be_read_fails_alone(run):
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())
    good = [make_job(family, model, row) for row in ROWS[:2]]
    broken = make_job(family, model, ROWS[0])
    broken.inputs["pixel_values"] = broken.inputs["pixel_values"][:-4]
    expected = [alone(model, make_job(family, model, row)).ids() for row in ROWS[:2]]
    found = together(run(model), [good[0], broken, good[1]])
    assert [found[0].ids(), found[2].ids()] == expected
    assert found[1].failed.error.status == 500


def test_numbers_that_are_none_are_told(run):
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    (found,) = together(run(model), [make_job(family, model, ROWS[2])])
    assert found.failed.error.code == "not_a_number"


def test_a_closed_engine_takes_nothing(run):
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())
    engine = run(model)
    job = make_job(family, model, ROWS[2])
    engine.submit(job)
    assert engine.close(20)
    assert len(job.send.ids()) == 12  # what was there was finished
    with pytest.raises(ApiError) as error:
        engine.submit(make_job(family, model, ROWS[2]))
    assert error.value.status == 503
    assert engine.silence() is None
