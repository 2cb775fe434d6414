"""A published eye: what is measured is what is published, and the card says what the files say."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import keepsight
from keepsight.errors import KeepsightError
from studies.__main__ import app
from studies.eye import lengths, sequences
from studies.eye.comparing import methods
from studies.eye.drawings import brush
from studies.eye.drawings.scenes import Scenes
from studies.eye.making.make import make
from studies.eye.making.stages import generator
from studies.eye.publishing.eye import EYE, about_eye, made_model
from studies.eye.publishing.publish import CARD
from studies.eye.questions import Question
from studies.eye.registries.packages import LANGUAGE_MODEL, PICTURES
from tests.studies.eye.tiny_eye import CONCEPTS, SIZE, drawings, language, texts, tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder with what `fetch` leaves, and two makings of the same tiny eye."""
    folder = tmp_path_factory.mktemp("work")
    language().save_pretrained(folder / "language-model")
    tokenizer().save_pretrained(folder / "language-model")
    drawings().save(folder / "pictures.safetensors")
    for name in ("tiny", "again"):
        make(language(), tokenizer(), drawings(), texts(), SIZE, folder / name, lambda: False)
    return folder


def command(*words):
    return CliRunner().invoke(app, ["eye", *map(str, words)], catch_exceptions=False)


def published(work, to, *more):
    done = command("publish", "--work", work, "--size", "tiny", "--to", to, *more)
    assert done.exit_code == 0, done.output
    return (to / CARD).read_text()


def test_what_is_measured_is_what_is_published(work, tmp_path):
    published(work, tmp_path / "out")
    here, _, about = made_model(language(), tokenizer(), work / "tiny", SIZE)
    there, size, same = made_model(language(), tokenizer(), tmp_path / "out")
    assert (size, same) == (SIZE, about)
    assert all(torch.equal(one, other) for one, other in zip(here.parameters(), there.parameters(), strict=True))
    assert {value.dtype for value in load_file(tmp_path / "out" / EYE).values()} == {torch.bfloat16}


def test_the_same_weights_are_the_same_file(work):
    """An eye is known by its file's sha256; what took other times to make says so, and is another."""
    # is done, and writes the file again
    make(language(), tokenizer(), drawings(), texts(), SIZE, work / "tiny", lambda: False)
    first, again = (load_file(work / name / EYE) for name in ("tiny", "again"))
    assert all(torch.equal(first[name], again[name]) for name in {*first, *again})
    before = about_eye(work / "tiny")["sha256"]
    make(language(), tokenizer(), drawings(), texts(), SIZE, work / "tiny", lambda: False)
    assert about_eye(work / "tiny")["sha256"] == before


def test_the_card_says_what_the_files_say(work, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    text = published(work, tmp_path / "out", "--results", results)
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {"license", "pipeline_tag", "tags", "language"} <= set(head)
    for package in (LANGUAGE_MODEL, *PICTURES):
        assert all(one in text for one in (package.sha256, package.version, package.author, package.source))
    assert about_eye(work / "tiny")["sha256"] in text
    assert ", ".join(CONCEPTS) in text
    assert "Not measured" in text

    done = command("gate", "--eye", tmp_path / "out", "--work", work, "--results", results, "--grids", 4)
    assert done.exit_code == 0, done.output
    file = results / "tiny.json"
    found = json.loads(file.read_text())
    text = published(work, tmp_path / "out", "--results", results)
    assert "Not measured" not in text
    assert "does not hold" in text
    for row in found["rows"]:
        assert f"| {row['style']} | {row['image']} | {row['task']} | {row['n']} | " in text
    found["conditions"]["eye"] = "another"
    file.write_text(json.dumps(found))
    assert "Not measured" in published(work, tmp_path / "out", "--results", results)


def test_a_published_eye_is_published_again_in_its_place(work, tmp_path):
    published(work, tmp_path / "out")
    before = (tmp_path / "out" / EYE).read_bytes()
    assert command("publish", "--eye", tmp_path / "out", "--to", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / EYE).read_bytes() == before


def test_a_published_eye_is_exported(work, tmp_path):
    published(work, tmp_path / "out")
    done = command("export", tmp_path / "vlm", "--eye", tmp_path / "out", "--work", work)
    assert done.exit_code == 0, done.output
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm").state_dict()
    expected = made_model(language(), tokenizer(), work / "tiny", SIZE)[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    head = yaml.safe_load((tmp_path / "vlm" / CARD).read_text().split("---")[1])
    assert head["base_model_relation"] == "finetune"
    with pytest.raises(KeepsightError, match="not empty"):
        command("export", tmp_path / "vlm", "--eye", tmp_path / "out", "--work", work)
    with pytest.raises(KeepsightError, match=r"--side 3.*1, 2"):
        command("export", tmp_path / "other", "--side", 3, "--eye", tmp_path / "out", "--work", work)


@torch.no_grad()
def test_a_trained_method_is_exported_with_the_eye(work, tmp_path):
    """The memory that was trained behind narrations in the studies' sequences gives the same logits in a chat."""
    about = about_eye(work / "tiny")
    trial = methods.Trial("pvm-warm", 16, 0, steps=6, images=1, questions=2, rate=0.1)
    heard = sequences.narration("It was a long way to the sea.", tokenizer())
    model, *_ = made_model(language(), tokenizer(), work / "tiny")
    folder = work / "tiny" / "methods" / about["sha256"][:12]
    with torch.enable_grad():
        trained, _ = methods.train(model, tokenizer(), drawings(), SIZE, [heard.ids] * 3, trial, folder)
    words = ["export", tmp_path / "vlm", "--size", "tiny", "--work", work]
    with pytest.raises(KeepsightError, match=f"There are: {trial.name}"):
        command(*words, "--method", "pvm-9-9")
    assert not (tmp_path / "vlm").exists()
    assert command(*words, "--method", trial.name).exit_code == 0

    loaded, processor = keepsight.load(tmp_path / "vlm" / trial.name)
    image = (255 * Scenes(drawings(), ["round"]).image(1, SIZE.cell, 0.0, generator(5))[0]).round()
    picture = Image.fromarray(image[0].byte().permute(1, 2, 0).numpy())
    said = [{"type": "text", "text": "It was a long way to the sea."}]
    words = [{"type": "text", "text": "What is here?"}]
    turns = [("user", [{"type": "image", "image": picture}]), ("assistant", said), ("user", words)]
    asked = processor.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    found = loaded(**asked).logits[0, -1]
    pixels, grids = brush.patches(image / 255, SIZE.patch, SIZE.merge)
    part = lengths.asked(Question("name", "What is here?", "A."), "base", heard.ids, 3, tokenizer(), model.config)
    batch = sequences.lay_out([[heard, part]], 3, model, tokenizer())
    expected = sequences.answers(methods.bare(trained).eval(), batch, pixels, grids)[0][0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with keepsight.memory_off(loaded):
        assert (loaded(**asked).logits[0, -1] - found).abs().max() > 1e-2


def test_what_is_no_eye_is_refused(work, tmp_path):
    with pytest.raises(KeepsightError, match=r"both given"):
        command("gate", "--eye", work / "tiny", "--size", "cpu")
    with pytest.raises(KeepsightError, match="no eye yet"):
        command("gate", "--eye", tmp_path, "--work", work)
    left = iter([False] * 7)
    make(language(), tokenizer(), drawings(), texts(), SIZE, tmp_path / "half", lambda: next(left, True))
    with pytest.raises(KeepsightError, match="not done"):
        command("publish", "--eye", tmp_path / "half")
    shutil.copytree(work / "tiny", tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / EYE)
    about = {"about": json.dumps({key: value for key, value in about_eye(work / "tiny").items() if key != "sha256"})}
    weights.pop(next(name for name in weights if "merger" in name))
    save_file(weights, tmp_path / "cut" / EYE, about)
    with pytest.raises(KeepsightError, match=r"no eye for this language model: .*merger"):
        made_model(language(), tokenizer(), tmp_path / "cut")
    save_file(weights, tmp_path / "cut" / EYE)
    with pytest.raises(KeepsightError, match="what it was made with"):
        about_eye(tmp_path / "cut")
