"""An exported eye: asked by anybody's processor and chat template, it reads what its training laid out."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from keepsight import cli
from studies.eye import lengths, sequences
from studies.eye.drawings import brush
from studies.eye.drawings.scenes import Scenes
from studies.eye.language import with_eye
from studies.eye.making.stages import generator
from studies.eye.publishing import examples
from studies.eye.publishing.export import export, pixels
from studies.eye.questions import Question
from studies.eye.registries.packages import PICTURES
from studies.eye.sizes import GPU
from tests.studies.eye.tiny_eye import CONCEPTS, SIZE, drawings, language, tokenizer

EXACT = dataclasses.replace(SIZE, dtype="float32")
QUESTION = Question("name", "What is here?", "A cat.")
TOLD = "Once upon a time, long ago.\n\nThere was no eye to see it."


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return with_eye(language(), tokenizer(), EXACT)


@pytest.fixture(scope="module", params=[1, 2], ids=["picture", "grid"])
def exported(request, model, tmp_path_factory):
    """(side, the folder, a picture of it as a file)."""
    folder = tmp_path_factory.mktemp("exported")
    export(model, tokenizer(), EXACT, request.param, folder / "vlm")
    image = Scenes(drawings(), ["round"]).image(request.param, EXACT.cell, 0.0, generator(5))[0]
    file = folder / "picture.png"
    Image.fromarray((255 * image[0]).round().byte().permute(1, 2, 0).numpy()).save(file)
    return request.param, folder / "vlm", file


def as_trained(model, file, parts, side):
    """The batch of the study's own sequences and the logits of all its tokens."""
    image = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
    batch = sequences.lay_out([parts], side * EXACT.tokens, model, tokenizer())
    values, grids = brush.patches(image, EXACT.patch, EXACT.merge)
    with torch.no_grad():
        hidden = model.model(
            input_ids=batch.ids,
            pixel_values=values,
            image_grid_thw=grids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
        ).last_hidden_state
        return batch, model.lm_head(hidden)


@pytest.mark.parametrize("told", ["", TOLD])
def test_the_chat_template_lays_out_what_was_trained(model, exported, told):
    """Tokens, positions and logits of a question after an image, and behind a text that stands between."""
    side, folder, file = exported
    heard = sequences.narration(told, tokenizer()).ids if told else []
    part = lengths.asked(QUESTION, "base", heard, side * EXACT.tokens, tokenizer(), model.config)
    alone = sequences.Part([*heard, *part.ids], len(heard) + part.answer)
    batch, expected = as_trained(model, file, [alone], side)

    processor = AutoProcessor.from_pretrained(folder)
    between = [{"role": "assistant", "content": [{"type": "text", "text": told}]}] if told else []
    image, words = {"type": "image", "image": Image.open(file)}, {"type": "text", "text": QUESTION.text}
    answer = {"role": "assistant", "content": [{"type": "text", "text": QUESTION.answer}]}
    messages = [{"role": "user", "content": [image]}, *between, {"role": "user", "content": [words]}, answer]
    if not told:  # in one message, as most people ask
        messages = [{"role": "user", "content": [image, words]}, answer]
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    length = batch.ids.shape[1]
    assert found["input_ids"][0, :length].tolist() == batch.ids[0].tolist()
    assert processor.tokenizer.decode(found["input_ids"][0, length:]) == "\n"  # after the answer's end

    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    types = found["mm_token_type_ids"]
    positions, _ = loaded.model.get_rope_index(
        found["input_ids"], mm_token_type_ids=types, image_grid_thw=found["image_grid_thw"]
    )
    assert positions[:, 0, :length].tolist() == batch.positions[:, 0].tolist()
    with torch.no_grad():
        logits = loaded(**found).logits
    torch.testing.assert_close(logits[:, :length], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("right", [True, False])
def test_generate_writes_what_exact_calls_right(model, exported, right):
    """Greedily, by the command line; the answer that it writes is right, and any other is not."""
    side, folder, file = exported
    command = ["generate", str(folder), "-i", str(file), "-p", QUESTION.text, "--max-new-tokens", "6"]
    done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    processor = AutoProcessor.from_pretrained(folder)
    words = [{"type": "image", "image": Image.open(file)}, {"type": "text", "text": QUESTION.text}]
    asked = processor.apply_chat_template(
        [{"role": "user", "content": words}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    written = loaded.generate(**asked, max_new_tokens=6)[0, asked["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(written, skip_special_tokens=True).strip() == done.stdout.strip()
    answer = written.tolist()
    answer[3] = answer[3] if right else answer[3] + 1
    part = sequences.part(QUESTION, tokenizer())
    part = sequences.Part([*part.ids[: part.answer], *answer], part.answer)
    batch, logits = as_trained(model, file, [part], side)
    assert sequences.exact(batch, logits[batch.labels >= 0]) == [[right]]


def test_the_text_alone_is_the_language_models(exported):
    _, folder, _ = exported
    loaded, plain = AutoModelForImageTextToText.from_pretrained(folder), language()
    ids = tokenizer()("<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    text = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hello."}], add_generation_prompt=True
    )
    assert tokenizer()(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert loaded.generation_config.eos_token_id == tokenizer().eos_token_id


@pytest.mark.parametrize("size", [SIZE, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("side", [1, 2])
def test_pictures_of_any_size_come_to_the_eyes_own(size, side):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    shortest, longest = pixels(size, side)
    token, along = size.patch * size.merge, side * size.tokens
    for width in (*range(17, 400), 512, 640, 1000, 1023, 1024, 4000):
        for height in {width, min(width + width // (along + 2), width * (along + 1) // along - 1)}:
            for shape in ((height, width), (width, height)):
                assert smart_resize(*shape, token, shortest, longest) == (side * size.cell,) * 2, shape


def test_examples_are_of_free_sets_only(tmp_path):
    """What is share-alike is never written, whatever its use; every file is named with its author and licence."""
    kinds = {"round": "CC-BY-4.0", "flat": "CC-BY-SA-4.0"}
    packages = [
        {**vars(PICTURES[0]), "name": f"@iconify-json/{style}", "licence": licence, "author": f"Author of {style}"}
        for style, licence in kinds.items()
    ]
    examples.write(drawings(), packages, tmp_path / "none.json", SIZE, 1, tmp_path / "one", 6)
    examples.write(drawings(), packages, tmp_path / "none.json", SIZE, 2, tmp_path / "grids", 3)
    for folder, count, side in (("one", 6, 1), ("grids", 3, 2)):
        files = sorted((tmp_path / folder).glob("*.png"))
        told = (tmp_path / folder / "README.md").read_text()
        assert len(files) == count
        assert all(file.name in told and file.stem.endswith("-round") for file in files)
        assert {Image.open(file).size for file in files} == {(side * SIZE.cell,) * 2}
        assert told.count("Author of round") == count
        assert "flat" not in told
    assert {file.stem.removesuffix("-round") for file in (tmp_path / "one").glob("*.png")} == set(CONCEPTS)
