"""Chooses the words that the eye learns: those that a tower names in *training* styles that were kept from it.

`python -m studies.eye.drawings.choose [WORK] [HALF]` trains two small towers on all words of one token, each on half of
the training styles, and asks it for the other half; without HALF it prints the words, which `pictures.py` holds. No
drawing of a style that serves as a test is looked at: of these, only the names count.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from studies.eye.drawings import brush
from studies.eye.drawings.pictures import Pictures, render, things
from studies.eye.language import language_model, with_eye, word_embeddings
from studies.eye.making import windows
from studies.eye.making.pretrain import Pretraining
from studies.eye.making.stages import Stage, generator
from studies.eye.sizes import CPU, OF_ALIGNING, OF_RESTYLING

KEPT = 100
HALVES = (
    ("noto", "noto-v1", "fxemoji", "streamline-emojis"),
    ("twemoji", "emojione", "emojione-monotone", "fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast"),
)
"""Styles of one hand stand in one half."""
SIGNS = frozenset(
    """aquarius bikini cancer collision construction cooking copyright customs cyclone detective divide fog gemini guard
    information joker leo libra link man metro minus motorway multiply om pisces plus prohibited registered
    restroom scorpio taurus virgo warning wedding""".split()  # noqa: SIM905
)
"""Signs and scenes, no things."""
SIZE = replace(CPU, pretrain_steps=800, sides=(1,))
_DROPPED_AT_ONCE = 4
_PAPERS = 5


def held_out(language: Any, tokenizer: Any, pictures: Pictures, half: int, folder: Path) -> Pretraining:
    """A tower that has seen all training styles but those of a half."""
    torch.manual_seed(half)
    shown = replace(pictures, held_out=[*pictures.held_out, *HALVES[half]])
    tower = with_eye(language, tokenizer, SIZE).model.visual
    windows.use(tower)
    names = [*shown.concepts, *sorted(set(shown.names) - set(shown.concepts))]
    said = partial(word_embeddings, language, tokenizer)
    learner = Pretraining(tower, shown, said(names), names, SIZE, said)
    weights = {name: (value, 1.0) for name, value in learner.named_parameters()}
    matrices = [name for name, (value, _) in weights.items() if ".blocks." in name and value.ndim == 2]
    settings = SIZE.settings(*OF_ALIGNING, *OF_RESTYLING) | {"half": half, "words": shown.concepts}
    stage = Stage(
        f"half-{half}", folder, weights, SIZE.pretrain_steps, SIZE.pretrain_lr, settings, matrices, SIZE.muon_lr
    )
    stage.run(learner.batch, learner.loss, lambda: False, lambda _, *told: print(half, *told, flush=True))
    return learner


def asked(learner: Pretraining, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every drawing of the half's styles on papers of several colours: scores `[N, concepts]`, and `[N]` what it is."""
    scores, right = [], []
    for style in (style for style in HALVES[half] if style not in learner.pictures.shapes):
        found = learner.pictures.of(style)
        numbers = torch.tensor([learner.names[name] for name in found])
        for paper in range(_PAPERS):
            draws = generator(half, paper)
            papers = torch.randint(len(brush.COLOURS), (len(found),), generator=draws) if paper else numbers * 0
            scores.append(learner.scores(list(found.values()), papers, 0.5 * bool(paper), draws))
            right.append(numbers)
    return torch.cat(scores), torch.cat(right)


def choose(scores: torch.Tensor, right: torch.Tensor, kept: int = KEPT) -> tuple[list[int], torch.Tensor]:
    """The concepts that stay when those told worst from the others go, a few at a time; and the share of each that is
    named right among them."""
    stay = torch.ones(scores.shape[1], dtype=torch.bool)
    count = torch.zeros(len(stay)).index_add(0, right, torch.ones(len(right))).clamp(min=1)
    while True:
        among = torch.where(stay, scores, -torch.inf)
        sure = among.softmax(1).gather(1, right[:, None])[:, 0]
        sure = torch.zeros(len(stay)).index_add(0, right, sure) / count
        if int(stay.sum()) <= kept:
            named = (among.argmax(1) == right).float()
            return torch.nonzero(stay)[:, 0].tolist(), torch.zeros(len(stay)).index_add(0, right, named) / count
        worst = torch.where(stay, sure, torch.inf).argsort()[: min(_DROPPED_AT_ONCE, int(stay.sum()) - kept)]
        stay[worst] = False


if __name__ == "__main__":
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "keepsight-eye")
    halves = [int(sys.argv[2])] if len(sys.argv) > 2 else [0, 1]
    language, tokenizer = language_model(work / "packages", work)
    file = work / "choose" / "pictures.safetensors"
    if not file.is_file():
        one = [word for word in things(work / "packages") if len(tokenizer(f" {word}")["input_ids"]) == 1]
        render(work / "packages", [word for word in one if word not in SIGNS]).save(file)
    drawn = Pictures.load(file)
    found = [asked(held_out(language, tokenizer, drawn, half, file.parent), half) for half in halves]
    if len(halves) == len(HALVES):
        scores, right = (torch.cat(part) for part in zip(*found, strict=True))
        kept, shares = choose(scores, right)
        every = float((scores.argmax(1) == right).float().mean())
        print(f"of {len(drawn.concepts)} words, {100 * every:.0f} % named in styles left out, these {len(kept)}; "
              f"of them {100 * float(shares[kept].mean()):.0f} %")  # fmt: skip
        print(" ".join(drawn.concepts[number] for number in kept))
