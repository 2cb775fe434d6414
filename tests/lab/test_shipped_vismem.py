"""The memories that ship: whole, trained, and of use far from the image."""

import pytest
import torch

import keepsight
from keepsight.checkpoints.adapters import find_adapter, inspect_adapter
from keepsight.lab.evaluation import answers, question_batches, score
from keepsight.shipped import PVM_NAME, REFERENCE_NAME, VISMEM_NAME
from keepsight.vismem import VisMemBranch
from studies.vismem.reading import Reading, decision_column


@pytest.mark.parametrize(("name", "method"), [(PVM_NAME, "PVM"), (VISMEM_NAME, "VISMEM")])
def test_it_is_found_by_name_and_belongs_to_the_shipped_base(name, method):
    info = inspect_adapter(find_adapter(name))
    assert info.method == method
    assert info.base == REFERENCE_NAME
    assert sum(file.stat().st_size for file in info.path.iterdir()) < 400_000


@torch.no_grad()
def test_the_pvm_reads_far_from_the_image():
    model, processor = keepsight.load(PVM_NAME)
    batches = question_batches(processor, 2048, 12, seed=1)
    on = score([answers(model, batch) for batch in batches], batches).accuracy
    with model.disable_adapter():
        off = score([answers(model, batch) for batch in batches], batches).accuracy
    assert on > 0.9
    assert off < 0.6


@torch.no_grad()
def test_its_memories_carry_the_image():
    model, processor = keepsight.load(VISMEM_NAME)
    memory = VisMemBranch.of(model).active
    assert not memory.short_bank.is_untrained
    assert not memory.long_bank.is_untrained
    assert not memory.rows.is_untrained
    [batch] = question_batches(processor, 1024, 12, seed=1)
    reading = Reading(model, batch, decision_column(batch))
    mark, found = reading.mark(), {}
    for name, roll in (("none", None), ("own", 0), ("other", 1)):
        reading.rewind(mark)
        if roll is not None:
            reading.invoke("long")
            reading.splice("long", reading.form("long").roll(roll, 0))
        found[name] = [reading.predict(batch.answers[-6:]).argmax(-1)]
    assert score(found["own"], [batch]).accuracy > score(found["none"], [batch]).accuracy + 0.15
    assert score(found["other"], [batch], roll=1).accuracy > 0.35  # chance: 0.1
