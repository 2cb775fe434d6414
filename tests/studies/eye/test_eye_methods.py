"""Methods on the eye: nothing changes before training, only the method learns, and the memory is read."""

import dataclasses

import pytest
import torch

from keepsight.errors import KeepsightError
from keepsight.pvm import replace_memory
from studies.eye import lengths, sequences, shares
from studies.eye.comparing import methods
from studies.eye.drawings import brush
from studies.eye.drawings.scenes import Scenes
from studies.eye.language import with_eye
from studies.eye.making.align import answers
from studies.eye.making.stages import generator
from studies.eye.questions import Question
from tests.studies.eye.tiny_eye import SIZE, drawings, language, tokenizer

EXACT = dataclasses.replace(SIZE, dtype="float32")
TOLD = [sequences.narration("It was a long way to the sea. " * 30, tokenizer()).ids for _ in range(2)]


def eye():
    torch.manual_seed(1)
    return with_eye(language(), tokenizer(), EXACT)


@torch.no_grad()
def logits_of(model, length=20):
    image = Scenes(drawings(), ["round"]).image(1, SIZE.cell, 0.0, generator(5))[0]
    told = TOLD[0][:length]
    part = lengths.asked(
        Question("name", "What is here?", "A cat."), "base", told, SIZE.tokens, tokenizer(), model.config
    )
    return answers(model, tokenizer(), image, [[sequences.Part(told, length), part]], 1, EXACT)[1]


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_learns_and_nothing_else(method, tmp_path):
    model = eye()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits_of(model)
    trial = methods.Trial(method, 16, 0, steps=6, images=1, questions=2)
    new = methods.equipped(eye(), trial)
    assert torch.equal(logits_of(methods.bare(new)), plain)
    trained, stage = methods.train(model, tokenizer(), drawings(), EXACT, TOLD, trial, tmp_path)
    assert stage.done
    inner = methods.bare(trained).eval()
    found = logits_of(inner)
    assert not torch.equal(found, plain)
    if method == "sft":
        changed = [name for name, value in inner.state_dict().items() if not torch.equal(value, before[name])]
        assert all("language_model" in name or name == "lm_head.weight" for name in changed)
        return
    with trained.disable_adapter():
        assert torch.equal(logits_of(inner), plain)
    kept = {name.replace(".base_layer", ""): value for name, value in inner.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    with replace_memory(lambda embeds, valid: torch.randn_like(embeds)):
        assert torch.equal(logits_of(inner), found) == (not method.startswith("pvm"))


def test_a_narration_of_no_tokens_is_none():
    trial = methods.Trial("lora", 0, 0, images=1, questions=1)
    model = eye()
    lessons = methods.Lessons(tokenizer(), drawings(), EXACT, TOLD, trial, model.config)
    images, rows, side, step = lessons.batch(0)
    with torch.no_grad():
        alone = sequences.loss(*answers(model, tokenizer(), images, [rows[0][1:]], side, EXACT)[1:])
        assert torch.equal(lessons.loss(model, (images, rows, side, step)), alone)


def test_methods_have_the_same_number_of_parameters():
    found = {
        method: methods.learning(methods.equipped(eye(), methods.Trial(method, 16, 0)))
        for method in methods.METHODS
        if method != "sft"
    }
    assert max(found.values()) <= 1.1 * min(found.values()), found


def test_all_methods_are_shown_the_same():
    batches = [
        methods.Lessons(tokenizer(), drawings(), EXACT, TOLD, methods.Trial(method, 64, 3), eye().config).batch(2)
        for method in ("lora", "pvm-warm")
    ]
    assert torch.equal(batches[0][0], batches[1][0])
    assert batches[0][1:] == batches[1][1:]


def test_a_look_up_comes_first_on_images_alone_and_is_gone_on_from(tmp_path):
    trial = methods.Trial("pvm-warm", 16, 0, steps=2, images=1, questions=8, look_up_steps=3)
    alone, _ = methods.train(eye(), tokenizer(), drawings(), EXACT, TOLD, trial.look_up, tmp_path / "alone")
    trained, stage = methods.train(eye(), tokenizer(), drawings(), EXACT, TOLD, trial, tmp_path)
    assert sorted(file.stem for file in tmp_path.glob("*.safetensors")) == sorted([trial.name, trial.look_up.name])
    assert stage.done
    halfway, first = methods.train(eye(), tokenizer(), drawings(), EXACT, TOLD, trial.look_up, tmp_path)
    assert stage.cpu_seconds > first.cpu_seconds > 0
    plain = dataclasses.replace(trial, look_up_steps=0)
    without, _ = methods.train(eye(), tokenizer(), drawings(), EXACT, TOLD, plain, tmp_path)
    found = [logits_of(methods.bare(one).eval()) for one in (alone, trained, without)]
    assert not torch.equal(found[1], found[2])
    again, _ = methods.train(eye(), tokenizer(), drawings(), EXACT, TOLD, trial, tmp_path)
    assert torch.equal(logits_of(methods.bare(again).eval()), found[1])
    _, part = methods.train(eye(), tokenizer(), drawings(), EXACT, TOLD, trial, tmp_path / "new", lambda: True)
    assert part.name == trial.look_up.name
    assert torch.equal(found[0], logits_of(methods.bare(halfway).eval()))


def test_more_images_are_more_to_look_at_for_as_many_questions():
    names = set()
    for images in (2, 4, 8, 12):
        trial = methods.Trial("pvm", 16, 0, images=images)
        pictures, rows, _, _ = methods.Lessons(tokenizer(), drawings(), EXACT, TOLD, trial, eye().config).batch(1)
        asked = [len(row) - 1 for row in rows]
        assert (len(pictures), asked) == (images, [12 // images] * images)
        names.add(trial.name)
    assert len(names) == 4
    assert methods.Trial("pvm", 16, 0).name in names


@pytest.mark.parametrize("method", ["lora", "pvm-warm"])
def test_text_beside_the_questions_is_held_to_what_the_eye_expects_of_it(method, tmp_path):
    plain = methods.Trial(method, 16, 0, steps=6, images=1, questions=2)
    beside = dataclasses.replace(plain, text=True)
    without, lessons = (
        methods.Lessons(tokenizer(), drawings(), EXACT, TOLD, trial, eye().config) for trial in (plain, beside)
    )
    trained, _ = methods.train(eye(), tokenizer(), drawings(), EXACT, TOLD, plain, tmp_path)
    for step, piece in ((4, []), (5, lessons.texts.piece(5))):
        batch = lessons.batch(step)
        assert torch.equal(batch[0], without.batch(step)[0])
        assert batch[1:] == without.batch(step)[1:]
        assert lessons.texts.piece(step) == piece
        for model, moved in ((methods.equipped(eye(), beside), False), (trained, True)):
            more = lessons.loss(model, batch) - without.loss(model, batch)
            assert (more.item() > 1e-4) == bool(piece and moved)
    lessons.texts.apart(trained, batch[0][:1], batch[2], piece).backward()
    learnt = {name: value.grad for name, value in trained.named_parameters() if value.requires_grad}
    assert any(grad is not None and grad.abs().max() > 0 for grad in learnt.values())
    other, _ = methods.train(eye(), tokenizer(), drawings(), EXACT, TOLD, beside, tmp_path)
    assert not torch.equal(logits_of(methods.bare(other)), logits_of(methods.bare(trained)))
    assert [methods.Trial.of(trial.told()) for trial in (plain, beside)] == [plain, beside]
    assert "text" not in plain.told()


@pytest.mark.parametrize("method", ["sft", methods.NONE])
def test_text_is_refused_where_there_is_nothing_to_hold_it_to(method):
    with pytest.raises(KeepsightError, match=rf"--text .* {method} cannot be taken off.* lora, mlp, pvm, pvm-warm"):
        methods.Trial(method, 16, 0, text=True)


def test_the_memory_off_reads_as_the_eye_does():
    rows = lengths.measure(eye(), tokenizer(), drawings(), EXACT, [one * 20 for one in TOLD], 2, ("base", "hidden"))
    at_once = {row["condition"]: row["right"] for row in rows if row["length"] == 0 and row["images"] == "unseen grids"}
    assert at_once["base"] == at_once["hidden"]
    assert {len(row["right"]) for row in rows} == {2}
    assert shares.difference("11", "01") == (50.0, pytest.approx(-48.0), pytest.approx(148.0))
    assert any("hidden against base at 2048" in line for line in lengths.table(rows))
    assert brush.HELD_OUT_FONT not in brush.FONTS
