"""Teach a latent memory to the small VLM that ships with keepsight: an image, a long text, and then what it showed.

    python examples/train_vismem.py data FOLDER    # images of digits, and questions with a long text behind the image
    python examples/train_vismem.py score ADAPTER  # held-out handwriting, 1,300 words after the image
    python examples/train_vismem.py tell ADAPTER FOLDER  # what the model itself tells of held-out handwriting

With some hundred words behind an image the model no longer sees it well; a memory, formed anew from the image while the
model writes, can help. docs/train-vismem.md has the commands in between, which take `facts` as their reward, and what
came of them. Needs: pip install -e ".[train,lab]"
"""

import contextlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

import keepsight
from keepsight.lab.digits import CELLS, draw_grids
from keepsight.lab.evaluation import SCORED
from keepsight.lab.narration import VOCABULARY, filler_ids, gaps_for_length, make_narrations
from keepsight.vismem import MemoryPolicy, RolloutOptions
from keepsight.vismem.scope import replace_latents
from studies.vismem.reading import Reading, decision_column

CONDITIONS = (
    ("no memory", None, False),
    ("long", "long", False),
    ("long, other image's", "long", True),
    ("short", "short", False),
    ("short, other image's", "short", True),
)
SPLITS = {"short": ("train", 256, 0, 40), "train": ("train", 256, 400, 800), "test": ("test", 192, 400, 800)}
"""File -> whose handwriting, how many questions, and words between image and answer. No glyph is in train and test."""


def told(text: str) -> dict[str, str]:
    """What a text says first of each cell: {"b3": "7"}."""
    words, found = text.split(), {}
    for cell, digit in itertools.pairwise(words):
        if cell in CELLS and digit.isdigit():
            found.setdefault(cell, digit)
    return found


def facts(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Reward: the share of right facts among those told after the first, which is told before a memory can be there."""
    scores = []
    for text, truth in zip(completions, map(told, answer), strict=True):
        later = list(told(text).items())[1:]
        scores.append(sum(truth[cell] == digit for cell, digit in later) / max(1, len(later)))
    return scores


def write_data(folder: Path) -> None:
    """Questions as `keepsight train` reads them: prompt, answer, image."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, (glyphs, count, shortest, longest)) in enumerate(SPLITS.items()):
        rng = np.random.default_rng(index)
        images, digits = draw_grids(count, glyphs, rng)
        with (folder / f"{name}.jsonl").open("w") as file:
            for row, (image, grid) in enumerate(zip(images, digits, strict=True)):
                image.save(folder / f"{name}-{row}.png")
                words = filler_ids(1, int(rng.integers(shortest, longest + 1)), rng)[0]
                prompt = " ".join(["describe :", *(VOCABULARY[word] for word in words)])
                answer = " ".join(f"{cell} {digit}" for cell, digit in zip(CELLS, grid, strict=True))
                file.write(json.dumps({"prompt": prompt, "answer": answer, "image": f"{name}-{row}.png"}) + "\n")


@torch.no_grad()
def score(adapter: str, images: int = 32, length: int = 1300) -> None:
    """Six facts per image, near `length` words: read without memory, with one just before, with another image's."""
    model, processor = keepsight.load(adapter)
    right: dict[str, list[float]] = {}
    for part in range(images // 16):
        batch = make_narrations(processor, gaps_for_length(length), 16, "test", np.random.default_rng([9, part]))
        reading = Reading(model.eval(), batch, decision_column(batch))
        start, truth, others = reading.mark(), batch.truth()[:, -SCORED:], batch.truth(1)[:, -SCORED:]
        for name, kind, swap in CONDITIONS:
            reading.rewind(start)
            if kind is not None:
                reading.invoke(kind)
                latents = reading.form(kind)
                reading.splice(kind, latents.roll(1, 0) if swap else latents)
            found = reading.predict(batch.answers[-SCORED:])
            likely = found.softmax(-1).gather(-1, truth[..., None]).mean()
            values = ((found.argmax(-1) == truth).float().mean(), likely, (found.argmax(-1) == others).float().mean())
            right.setdefault(name, []).append(torch.stack(values))
    for name, parts in right.items():
        read, likely, followed = torch.stack(parts).mean(0).tolist()
        print(f"{name:22} right {read:.3f}  probability {likely:.3f}  right for the other image {followed:.3f}")


@torch.no_grad()
def tell(adapter: str, folder: Path, behind: int = 3, words: int = 32, rows: int = 32) -> None:
    """What the model writes about held-out images, with one memory behind its first fact (three tokens and a stop)."""
    model, processor = keepsight.load(adapter)
    questions = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    image_pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for name, kind, swap in CONDITIONS:
        rewards, right = [], []
        for first in range(0, len(questions), rows):
            part = questions[first : first + rows]
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}],
                    add_generation_prompt=True,
                )
                for row in part
            ]
            images = [[keepsight.open_image(folder / row["image"])] for row in part]
            inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
            seeds = list(range(first, first + len(part)))
            at = {} if kind is None else {behind: kind}
            with replace_latents(lambda _, latents: latents.roll(1, 0)) if swap else contextlib.nullcontext():
                written = model.generate(
                    **inputs,
                    memory=MemoryPolicy("forced", at=at),
                    rollout=RolloutOptions(seeds=seeds),
                    max_new_tokens=words,
                    do_sample=True,
                    top_k=0,
                    suppress_tokens=[image_pad],
                )
            for row, ids in zip(part, written[:, inputs["input_ids"].shape[1] :], strict=True):
                text, truth = processor.tokenizer.decode(ids, skip_special_tokens=True), told(row["answer"])
                rewards += facts([text], [row["answer"]])
                right += [truth[cell] == digit for cell, digit in list(told(text).items())[1:]]
        error = 1.96 * np.std(rewards) / len(rewards) ** 0.5
        print(
            f"{name:22} reward {np.mean(rewards):.3f} ± {error:.3f}  right {np.mean(right):.3f} of {len(right)} facts "
            "after the first"
        )


if __name__ == "__main__":
    what, *where = sys.argv[1:]
    if what == "data":
        write_data(Path(where[0]))
    elif what == "score":
        score(where[0])
    else:
        tell(where[0], Path(where[1]))
