"""Chooses the words that the eye learns: those whose drawings are alike across the training styles.

`python -m studies.eye.drawings.choose [WORK]` prints them. No drawing of a style that serves as a test is looked at:
of these, only the names count. `pictures.py` holds what it printed when 205 words could be chosen; of the 206 that can
be now it takes 96 of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from studies.eye.drawings.pictures import Pictures, render, things

KEPT = 100
SIGNS = frozenset(
    """aquarius bikini cancer collision construction cooking copyright customs cyclone detective divide fog gemini guard
    information joker leo libra link man metro minus motorway multiply om pisces plus prohibited registered
    restroom scorpio taurus virgo warning wedding""".split()  # noqa: SIM905
)
"""Signs and scenes, no things."""
_DROPPED_AT_ONCE = 8
_BINS = 9


def features(pixels: torch.Tensor) -> torch.Tensor:
    """`[N, 64, 64, 4]` RGBA -> `[N, features]`: directions of edges in cells of 8 px, and a coarse colour picture."""
    rgba = pixels.permute(0, 3, 1, 2).float() / 255
    alpha = rgba[:, 3:]
    seen = rgba[:, :3] * alpha + 1 - alpha
    grey = torch.cat([seen.mean(1, keepdim=True), alpha], 1)
    right, down = F.pad(grey, (0, 1, 0, 0)).diff(dim=3), F.pad(grey, (0, 0, 0, 1)).diff(dim=2)
    strength = (right**2 + down**2).sqrt()
    angle = torch.atan2(down, right) % torch.pi
    bins = (angle / torch.pi * _BINS).long().clamp(max=_BINS - 1)
    edges = F.one_hot(bins, _BINS).movedim(-1, 2) * strength[:, :, None]
    edges = F.avg_pool2d(edges.flatten(1, 2), 8).flatten(1).sqrt()
    colours = F.avg_pool2d(torch.cat([seen, alpha], 1), 8).flatten(1)
    return torch.cat([F.normalize(edges, dim=1), 0.5 * F.normalize(colours - colours.mean(0), dim=1)], 1)


def recognised(found: torch.Tensor, words: list[str], styles: list[str]) -> dict[str, float]:
    """For each word, the share of styles whose drawing is nearest to the word's average over the *other* styles."""
    order = sorted(set(words))
    number = torch.tensor([order.index(word) for word in words])
    right: dict[str, list[float]] = {word: [] for word in order}
    for style in sorted(set(styles)):
        out = torch.tensor([one == style for one in styles])
        rest, of = found[~out], number[~out]
        count = torch.zeros(len(order)).index_add(0, of, torch.ones(len(of)))
        centres = torch.zeros(len(order), found.shape[1]).index_add(0, of, rest) / count[:, None].clamp(min=1)
        within = rest - centres[of]
        spread = within.T @ within / len(within)
        spread = spread + 0.3 * spread.diagonal().mean() * torch.eye(len(spread))
        close = torch.linalg.solve(spread, centres.T)
        score = found[out] @ close - 0.5 * (centres.T * close).sum(0)
        score[:, count == 0] = -torch.inf
        for at, best in zip(number[out].tolist(), score.argmax(1).tolist(), strict=True):
            right[order[at]].append(float(at == best))
    return {word: sum(these) / len(these) for word, these in right.items()}


def choose(pictures: Pictures, candidates: list[str], kept: int = KEPT) -> tuple[list[str], float]:
    """The candidates that stay when the least recognised go, a few at a time; and the share recognised at the end."""
    words = list(candidates)
    rows = [
        number
        for number, (name, style, first) in enumerate(
            zip(pictures.names, pictures.styles, pictures.firsts, strict=True)
        )
        if first and style in pictures.seen and name in set(candidates)
    ]
    found = features(pictures.pixels[rows])
    while True:
        among = [at for at, row in enumerate(rows) if pictures.names[row] in set(words)]
        shares = recognised(
            found[among], [pictures.names[rows[at]] for at in among], [pictures.styles[rows[at]] for at in among]
        )
        if len(words) <= kept:
            return sorted(words), sum(shares.values()) / len(shares)
        gone = sorted(words, key=lambda word: (shares[word], word))[: min(_DROPPED_AT_ONCE, len(words) - kept)]
        words = [word for word in words if word not in gone]


if __name__ == "__main__":
    from studies.eye.language import language_model

    work = Path(sys.argv[1] if len(sys.argv) > 1 else "keepsight-eye")
    _, tokenizer = language_model(work / "packages", work)
    drawn = render(work / "packages", things(work / "packages"))
    pool = [word for word in drawn.concepts if word not in SIGNS and len(tokenizer(f" {word}")["input_ids"]) == 1]
    words, share = choose(drawn, pool)
    print(f"of {len(pool)} words of one token, {len(words)}; recognised in a style left out: {100 * share:.0f} %")
    print(" ".join(words))
