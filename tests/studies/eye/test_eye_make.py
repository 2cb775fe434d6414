"""The eye: a language model that stays itself, distance as positions, stages that go on, and a gate that can say no."""

import dataclasses

import pytest
import torch

from keepsight.errors import KeepsightError
from studies.eye import gate, lengths, sequences, shares
from studies.eye.drawings import brush, choose
from studies.eye.drawings.pictures import SIDE, Pictures
from studies.eye.drawings.scenes import Scenes
from studies.eye.language import text_difference, with_eye
from studies.eye.making import recall, windows
from studies.eye.making.align import Alignment, answers
from studies.eye.making.make import make
from studies.eye.making.muon import Muon
from studies.eye.making.pretrain import Pretraining
from studies.eye.making.stages import generator
from studies.eye.publishing.eye import made_model
from studies.eye.questions import TASKS, Question, ask, tasks_of
from tests.studies.eye.tiny_eye import CONCEPTS, SIZE, drawings, language, texts, tokenizer

EXACT = dataclasses.replace(SIZE, dtype="float32")
QUESTIONS = [
    Question("name", "What is here?", "A cat."),
    Question("colour", "Which colour is the paper?", "It is red."),
    Question("read", "What is written?", "It says 47."),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return with_eye(language(), tokenizer(), EXACT)


def image(side=1):
    return Scenes(drawings(), ["round"]).image(side, SIZE.cell, 0.0, generator(5))[0]


@torch.no_grad()
def logits_of(model, parts, side=1):
    """Logits of the answers of one sequence."""
    return answers(model, tokenizer(), image(side), [parts], side, EXACT)[1]


def test_on_text_the_language_model_is_the_original(model):
    assert text_difference(model, language(), tokenizer()) == 0.0


def test_another_language_model_is_noticed(model):
    other = language()
    other.model.layers[1].mlp.up_proj.weight.data[0] += 0.1
    assert text_difference(model, other, tokenizer()) > 0


@pytest.mark.parametrize("side", [1, 2])
def test_the_layout_is_the_models_own(model, side):
    """One question that follows at once: transformers' positions, mask and placing of the image give the same."""
    part = sequences.part(QUESTIONS[0], tokenizer())
    batch = sequences.lay_out([[part]], side * SIZE.tokens, model, tokenizer())
    pixels, grids = brush.patches(image(side), SIZE.patch, SIZE.merge)
    with torch.no_grad():
        whole = model(
            input_ids=batch.ids, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=batch.image.int()
        ).logits
    found = logits_of(model, [part], side)
    torch.testing.assert_close(found, whole[batch.labels >= 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", [1, 40])
def test_a_hidden_narration_leaves_its_length_and_nothing_else(model, words):
    told = sequences.narration("Once upon a time. " * words, tokenizer())
    far = sequences.part(QUESTIONS[0], tokenizer(), gap=len(told.ids))
    hidden = logits_of(model, [told, far])
    torch.testing.assert_close(hidden, logits_of(model, [far]), atol=1e-5, rtol=1e-5)
    near = logits_of(model, [sequences.part(QUESTIONS[0], tokenizer())])
    assert (hidden - near).abs().max() > 1e-4  # the distance itself is felt


@pytest.mark.parametrize("condition", lengths.CONDITIONS)
@pytest.mark.parametrize("side", [1, 2])
def test_a_question_behind_a_part_of_a_narration_is_answered_as_it_is_alone(model, condition, side):
    """Beginnings of one narration share its sequence; transformers' own call, without our mask, gives the same."""
    told = sequences.narration("Once upon a time, long ago. " * 4, tokenizer()).ids
    along, config = side * SIZE.tokens, model.config
    parts = [
        lengths.asked(QUESTIONS[1], one, told[:length], along, tokenizer(), config)
        for one, length in (("base", 5), (condition, 40), ("reinserted", len(told)))
    ]
    found = logits_of(model, [sequences.Part(told, len(told)), *parts], side)
    mine = slice(len(parts[0].ids) - parts[0].answer, None)
    found = found[mine][: len(parts[1].ids) - parts[1].answer]
    torch.testing.assert_close(
        found, logits_of(model, [sequences.Part(told[:40], 40), parts[1]], side), atol=1e-5, rtol=1e-5
    )
    if condition == "hidden":
        torch.testing.assert_close(found, logits_of(model, [parts[1]], side), atol=1e-5, rtol=1e-5)
        return
    alone = sequences.Part([*told[:40], *parts[1].ids], 40 + parts[1].answer)
    batch = sequences.lay_out([[alone]], along, model, tokenizer())
    pixels, grids = brush.patches(image(side), SIZE.patch, SIZE.merge)
    again = 1 + (condition in ("repeated", "reinserted"))
    if condition == "reinserted":  # bare tokens have no grid of their own in transformers' call
        found_alone = logits_of(model, [alone], side)
    else:
        with torch.no_grad():
            whole = model(
                input_ids=batch.ids,
                pixel_values=torch.cat([pixels] * again),
                image_grid_thw=torch.cat([grids] * again),
                mm_token_type_ids=batch.image.int(),
            ).logits
        found_alone = whole[batch.labels >= 0]
    torch.testing.assert_close(found, found_alone, atol=1e-5, rtol=1e-5)


def test_questions_do_not_see_each_other(model):
    parts = [sequences.part(one, tokenizer(), gap) for one, gap in zip(QUESTIONS, (0, 100, 2048), strict=True)]
    together = logits_of(model, parts)
    alone = torch.cat([logits_of(model, [part]) for part in parts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_exact_is_what_greedy_decoding_writes(model):
    batch = sequences.lay_out([[sequences.part(one, tokenizer()) for one in QUESTIONS]], 3, model, tokenizer())
    targets = batch.labels[batch.labels >= 0]
    logits = torch.nn.functional.one_hot(targets, len(tokenizer())).float()
    assert sequences.exact(batch, logits) == [[True, True, True]]
    logits[-1] = logits[-1].roll(1)
    assert sequences.exact(batch, logits) == [[True, True, False]]


@pytest.mark.parametrize("side", [1, 2, 3])
def test_answers_follow_from_the_cells(side):
    scenes = Scenes(drawings(), ["round", "flat"])
    asked = set()
    for number in range(40):
        draws = generator(number)
        _, cells = scenes.image(side, 24, 1.0, draws)
        shown = {cell.name for cell in cells if not cell.text}
        for task in tasks_of(cells, side):
            question = ask(task, cells, side, draws)
            asked.add(task)
            said = question.answer.rstrip(".").split()[-1]
            if task == "name":
                assert said in shown
            if task == "read":
                assert said in {cell.text for cell in cells}
            if task == "colour":
                assert said in {list(brush.COLOURS)[cell.colour] for cell in cells}
            if task == "compare" and said == "Yes":
                assert len(shown) < sum(not cell.text for cell in cells)
    assert asked == (set(TASKS) if side > 1 else {"name", "colour", "style", "read"})


def test_held_out_styles_are_drawn_only_when_asked_for():
    assert set(drawings().styles) > set(drawings().held_out)
    scenes = Scenes(drawings(), ["round", "flat"])
    seen = {cell.style for number in range(30) for cell in scenes.image(2, 24, 1.0, generator(number))[1]}
    assert seen == {"round", "flat", ""}


def test_a_bolder_image_shows_the_same_otherwise():
    scenes = Scenes(drawings(), ["round", "flat"])
    plain, cells = scenes.image(2, 24, 0.0, generator(3))
    bold, again = scenes.image(2, 24, 0.0, generator(3), bold=True)
    assert cells == again
    assert not torch.equal(plain, bold)


def test_icons_are_for_the_tower_alone(model):
    """They are drawn in stage (a), in a colour that their paper has not, and nothing is asked about them."""
    icons = dataclasses.replace(drawings(), pixels=drawings().pixels.clone(), shapes=["flat"])
    icons.pixels[torch.tensor([style == "flat" for style in icons.styles]), ..., :3] = 0
    assert icons.seen == ["round"]
    names = [*CONCEPTS, "other-thing"]
    phrases = lambda said: torch.randn(len(said), 64)  # noqa: E731
    learner = Pretraining(model.model.visual, icons, torch.randn(7, 64), names, EXACT, phrases)
    drawn, targets = learner.sample(200, generator(0))
    icon = (targets["name"] >= 0) & (targets["style"] < 0)
    assert 0 < icon.sum() < (targets["name"] >= 0).sum()
    papers = torch.tensor(list(brush.COLOURS.values()))[targets["colour"]]
    contrast = (drawn[icon][..., :3].float() / 255 - papers[icon][:, None, None]).abs().amax(-1)
    assert contrast.min() > 0.39


def test_words_are_kept_whose_drawings_are_alike():
    """Three words drawn alike in every style, three drawn at random: the first are chosen."""
    draws = torch.Generator().manual_seed(0)
    styles, alike, random = ["a", "b", "c", "d"], ["bell", "cat", "dog"], ["ant", "bee", "cow"]
    of = [(name, style) for name in [*alike, *random] for style in styles]
    pixels = torch.full((len(of), SIDE, SIDE, 4), 255, dtype=torch.uint8)
    for number, (name, _) in enumerate(of):
        if name in alike:
            begin = 8 + 16 * alike.index(name)
            pixels[number, begin : begin + 12, 10:50, :3] = 0
        else:
            pixels[number, ..., :3] = torch.randint(256, (SIDE, SIDE, 3), generator=draws, dtype=torch.uint8)
    names, styles = [name for name, _ in of], [style for _, style in of]
    pictures = Pictures(pixels, names, styles, [True] * len(of), [*alike, *random], [])
    assert choose.choose(pictures, [*alike, *random], kept=3) == (alike, 1.0)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_muon_steps_as_torchs_does(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    steppers = Muon([ours], lr=0.01, weight_decay=0.03), torch.optim.Muon([theirs], lr=0.01, weight_decay=0.03)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for stepper in steppers:
            stepper.step()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # torch's iterates in bfloat16
    assert (ours - 1).abs().max() > 1e-2


def test_the_tower_begins_with_the_names_alone(model):
    """Other things and icons come in with the variation, up to their shares."""
    icons = dataclasses.replace(drawings(), shapes=["flat"])
    names = [*CONCEPTS, "other-thing"]
    phrases = lambda said: torch.randn(len(said), 64)  # noqa: E731
    learner = Pretraining(model.model.visual, icons, torch.randn(7, 64), names, EXACT, phrases)

    def strange(vary):
        _, targets = learner.sample(200, generator(0), vary)
        return int((((targets["style"] < 0) | (targets["name"] == 6)) & ~targets["ink"]).sum())

    assert strange(0.0) == 0 < strange(0.4) < strange(1.0)


def test_drawings_survive_their_file(tmp_path):
    drawings().save(tmp_path / "pictures.safetensors")
    again = Pictures.load(tmp_path / "pictures.safetensors")
    assert torch.equal(again.pixels, drawings().pixels)
    assert again.names == drawings().names
    assert again.of("round").keys() == set(CONCEPTS)


def going_on(folder, steps, size=SIZE):
    """Calls of `make` of so many steps each, until it is done."""
    for _ in range(20):
        left = iter([False] * steps)
        made = make(language(), tokenizer(), drawings(), texts(), size, folder, lambda left=left: next(left, True))
        if made.done:
            return made
    raise AssertionError("never done")


def test_a_making_that_was_stopped_comes_to_the_same_eye(tmp_path):
    going_on(tmp_path / "once", 100)
    going_on(tmp_path / "often", 2)
    once, _, about = made_model(language(), tokenizer(), tmp_path / "once", SIZE)
    often, *_ = made_model(language(), tokenizer(), tmp_path / "often", SIZE)
    assert about["done"] is True
    assert all(torch.equal(one, other) for one, other in zip(once.parameters(), often.parameters(), strict=True))
    fresh = with_eye(language(), tokenizer(), SIZE)
    moved = {name for name, value in once.named_parameters() if not torch.equal(value, fresh.get_parameter(name))}
    assert any(".visual." in name for name in moved)
    assert any("language_model" in name for name in moved)  # the LoRA


def test_without_a_lora_the_language_model_stays_as_it_was(tmp_path):
    frozen = dataclasses.replace(SIZE, lora=0)
    going_on(tmp_path, 100, frozen)
    model, *_ = made_model(language(), tokenizer(), tmp_path, frozen)
    assert text_difference(model, language(), tokenizer()) == 0.0
    with pytest.raises(KeepsightError, match="other settings"):
        going_on(tmp_path, 1, dataclasses.replace(frozen, align_lr=1.0))
    with pytest.raises(KeepsightError, match="other settings"):
        made_model(language(), tokenizer(), tmp_path, SIZE)


def test_recall_asks_for_the_languages_own_expectations():
    """A LoRA that does nothing costs nothing; one that does is drawn back to what the language model expected."""
    torch.manual_seed(2)
    model = with_eye(language(), tokenizer(), EXACT)
    recalled = recall.Recall(Alignment(model, tokenizer(), drawings(), EXACT), texts())
    batches, without = ([recalled.batch(step) for step in range(first, 24, 2)] for first in (0, 1))
    assert {behind for *_, behind in batches} == {False, True}
    assert all(text for _, text, _ in batches)
    assert not any(text or behind for _, text, behind in without)
    assert [text for _, text, _ in batches] == [recalled.batch(step)[1] for step in range(0, 24, 2)]
    alone = next(batch for batch in batches if not batch[2])

    def apart(batch):
        return recalled.loss(batch) - recalled.alignment.loss(batch[0])

    assert apart(without[0]).item() == 0.0
    assert apart(alone).item() == pytest.approx(0.0, abs=1e-5)
    learnt = [value for name, (value, _) in recalled.alignment.parameters().items() if "lora_B" in name]
    with torch.no_grad():
        for value in learnt:
            value.normal_()
    far = apart(alone).item()
    optimizer = torch.optim.Adam(learnt, lr=0.03)
    for step in range(24):
        optimizer.zero_grad()
        apart(batches[step % 12]).backward()
        optimizer.step()
    assert apart(alone).item() < far / 2
    assert text_difference(model, language(), tokenizer()) > 0  # what was expected is the original's, not its own


def test_no_text_of_a_test_is_learnt_from():
    told = [[number] * 4 for number in range(6)]
    found = recall.texts(told, 3, tokenizer())
    assert found[:3] == told[:3]
    assert len({tuple(one) for one in found[3:]}) == 1 < len(found[3])


def test_no_eye_yet_says_what_to_do(tmp_path):
    with pytest.raises(KeepsightError, match=r"--eye studies/eye/published/cpu.*studies eye make"):
        made_model(language(), tokenizer(), tmp_path, SIZE)


def test_a_random_eye_does_not_pass(model):
    found = gate.measure(model, tokenizer(), drawings(), EXACT, grids=4)
    assert not found["gate"]["holds"]
    told = gate.lines(found)
    assert told[-1].startswith("The gate does not hold")
    assert any("the encoder alone, emojione-v1 (n = 6)" in line for line in told)
    assert {row["task"] for row in found["rows"]} <= set(TASKS)


@pytest.mark.parametrize(
    ("style", "grids", "holds"),
    [
        ([81, 80, 79], [90, 88, 85], True),
        ([79, 79, 79], [90, 88, 85], False),
        ([81, 80, 79], [90, 88, 84], False),
        ([81, 70, 81], [90, 90, 90], False),
    ],
)
def test_the_verdict_follows_from_the_rows(style, grids, holds):
    rows = [
        {"style": gate.STYLE, "image": "single pictures", "task": "name", "n": 100, "right": style},
        {"style": "seen styles", "image": "grids 2 x 2", "task": "name", "n": 100, "right": grids},
    ]
    assert gate.verdict(rows)["holds"] is holds


def test_intervals_hold_their_share_and_stay_within_bounds():
    for right in range(0, 41):
        low, high = shares.interval(right, 40)
        assert -1e-9 <= low <= 100 * right / 40 + 1e-9
        assert 100 * right / 40 - 1e-9 <= high <= 100 + 1e-9


def test_batches_are_the_same_from_workers(tmp_path):
    for folder, workers in (("here", 0), ("ahead", 2)):
        make(language(), tokenizer(), drawings(), texts(), SIZE, tmp_path / folder, lambda: False, workers=workers)
    here, ahead = (made_model(language(), tokenizer(), tmp_path / one, SIZE)[0] for one in ("here", "ahead"))
    assert all(torch.equal(one, other) for one, other in zip(here.parameters(), ahead.parameters(), strict=True))


@pytest.mark.parametrize("side", [1, 2])
def test_windows_at_once_are_windows_one_by_one(side):
    tower = with_eye(language(), tokenizer(), SIZE).model.visual
    pixels, grids = brush.patches(torch.cat([image(side), image(side).flip(-1)]), SIZE.patch, SIZE.merge)
    with torch.no_grad():
        one_by_one = tower(pixels, grid_thw=grids).pooler_output
        windows.use(tower)
        at_once = tower(pixels, grid_thw=grids).pooler_output
    torch.testing.assert_close(at_once, one_by_one, atol=1e-6, rtol=1e-5)
