"""Tasks: every answer follows from the images or the text so far, and nothing gives it away."""

import itertools

import numpy as np
import pytest
import torch

from keepsight.lab.digits import CELLS
from keepsight.lab.narration import FILLER, IMAGE_PAD, STOP
from keepsight.lab.reference import build_processor
from studies.tasks.pretraining import short_facts
from studies.tasks.tasks import COLOURS, NAMES, PAPERS, ROWS, TASKS, WORDS, draw_scene, facts_for_length, make_batch

COLOUR_NAMES = list(COLOURS)
ASKED = [name for name in TASKS if name != "note"]


@pytest.fixture(scope="module")
def processor():
    return build_processor(WORDS)


def facts_of(batch, row):
    """The facts of one row as lists of words, filler taken out."""
    words = [WORDS[i] for i in batch.input_ids[row, batch.start :].tolist()]
    facts, fact = [], []
    for word in words[:-1]:
        if word == STOP:
            facts.append(fact)
            fact = []
        elif word not in FILLER:
            fact.append(word)
    assert not fact
    return facts


def solve(fact, digits, colours, papers, told):
    """The right answers of a fact, worked out from what the images show and what the text has told."""
    kind, *rest = fact
    grid, ink = digits[0], [COLOUR_NAMES[c] for c in colours[0]]
    if kind == "digit":
        return [str(grid[CELLS.index(rest[0])])]
    if kind == "colour":
        return [ink[CELLS.index(rest[0])]]
    if kind == "where":
        fits = [cell for cell, d, c in zip(CELLS, grid, ink, strict=True) if (c, str(d)) == (rest[0], rest[1])]
        assert len(fits) == 1, "the pair must be unique"
        return fits
    if kind == "count":
        return [str(min(9, ink.count(rest[0])))]
    if kind == "path":
        steps = [CELLS.index(cell) for cell in rest[::2]]
        for a, b in itertools.pairwise(steps):
            assert abs(a // 4 - b // 4) + abs(a % 4 - b % 4) == 1, "a path goes to neighbours"
        return [str(total % 10) for total in np.cumsum([grid[step] for step in steps])]
    if kind == "rows":
        first, second = (ROWS.index(name) for name in rest[:2])
        sums = np.asarray(grid).reshape(4, 4).sum(1)
        return [ROWS[first if sums[first] >= sums[second] else second]]
    if kind in PAPERS:
        which = list(papers).index(PAPERS.index(kind))
        return [str(digits[which][CELLS.index(rest[0])])]
    if kind in NAMES:  # the time of a frame
        return [str(digits[NAMES.index(kind)][CELLS.index(rest[0])])]
    if kind == "recall":
        return [told[rest[0]]]
    raise AssertionError(kind)


@pytest.mark.parametrize("task", ASKED)
def test_every_answer_follows_from_images_or_text_and_no_question_comes_twice(processor, task):
    rng = np.random.default_rng(3)
    facts = [(0, "note")] * 8 * (task == "recall") + [(2, task)] * min(TASKS[task].most, 4)
    batch = make_batch(processor, facts, 24, "test", rng)
    assert set(batch.tasks) == {task}
    for row in range(24):
        told, questions, answers = {}, set(), []
        for fact in facts_of(batch, row):
            if fact[0] == "note":
                told[fact[1]] = fact[2]
                continue
            scene = batch.scene
            found = solve(fact, scene.digits[row], scene.colours[row], scene.papers[row], told)
            given = fact[2::2] if fact[0] == "path" else fact[-1:]
            assert given == found, fact
            question = tuple(fact[1:2] if fact[0] == "path" else fact[:-1])
            assert question not in questions
            questions.add(question)
            answers += found
        assert answers == [WORDS[i] for i in batch.truth()[row].tolist()]


def test_note_says_what_no_pixel_holds_and_two_images_hold_more_cells_than_slots(processor):
    notes = [(0, "note")] * 8 + [(0, "recall")] * 8
    batch = make_batch(processor, notes, 32, "test", np.random.default_rng(0))
    counts = torch.bincount(batch.truth().flatten(), minlength=len(WORDS))
    assert (counts > 0).sum() == 10  # all digits, whatever the image shows
    scene = draw_scene(8, "test", np.random.default_rng(0), images=2)
    assert scene.digits.shape == (8, 2, 16)
    assert (scene.papers.sum(1) == 1).all()


@pytest.mark.parametrize("images", [1, 2])
def test_the_prompt_is_what_the_processor_makes_of_a_chat(processor, images):
    task = "pair" if images == 2 else "read"
    batch = make_batch(processor, [(1, task)], 2, "test", np.random.default_rng(0))
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": "describe"}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], images=batch.scene.images[1], return_tensors="pt")
    assert expected["input_ids"][0].tolist() == batch.input_ids[1, : batch.start].tolist()
    patches = 64 * images
    assert torch.equal(expected["pixel_values"], batch.inputs["pixel_values"][patches : 2 * patches])
    assert (batch.input_ids[1] == WORDS.index(IMAGE_PAD)).sum() == 16 * images


@pytest.mark.parametrize("task", ASKED)
def test_narrations_are_as_long_as_asked(processor, task):
    for length in (48, 300):
        batch = make_batch(processor, facts_for_length(task, length), 2, "test", np.random.default_rng(1))
        assert abs(int(batch.lengths[-1]) - length) <= 16
        assert batch.tasks[-1] == task


def test_training_narrations_stay_short_and_hold_every_task():
    rng = np.random.default_rng(0)
    drawn = [short_facts(rng, ASKED) for _ in range(200)]
    assert {name for facts in drawn for _, name in facts} == set(TASKS)
    assert max(sum(gap + 4 for gap, _ in facts) for facts in drawn) < 80


def test_tasks_that_do_not_fit_together_are_refused(processor):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="narrations apart"):
        make_batch(processor, [(0, "read"), (0, "pair")], 2, "test", rng)
    with pytest.raises(ValueError, match="notes before"):
        make_batch(processor, [(0, "recall")], 2, "test", rng)
    with pytest.raises(ValueError, match="at most 4 facts"):
        make_batch(processor, [(0, "count")] * 5, 2, "test", rng)


def test_no_glyph_of_the_test_split_is_seen_in_training():
    scenes = {split: draw_scene(300, split, np.random.default_rng(0)) for split in ("validation", "test")}
    ink = {}
    for split, scene in scenes.items():
        found = set()
        for row in range(300):
            pixels = np.asarray(scene.images[row][0], np.int64)
            paper = 0 if scene.papers[row, 0] == 0 else 255
            marked = (np.abs(pixels - paper).max(-1) > 40).reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(16, 64)
            found |= {cell.tobytes() for cell in marked}
        ink[split] = found
    assert len(ink["test"] & ink["validation"]) < 0.02 * len(ink["test"])
