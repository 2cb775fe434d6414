"""Interventions on a memory's contents: zeros, matched noise, another image's, mixtures, scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: What is remembered: PVM's visual tokens, one [1, M, D] per call that brings images; VisMem's latents, one [1, N, D]
#: per invocation, in order.
Contents = list[torch.Tensor]
#: contents -> as many other contents of the same shapes
Change = Callable[[Contents], Contents]


def zeroed(contents: Contents) -> Contents:
    """Nothing in it."""
    return [torch.zeros_like(part) for part in contents]


def scaled(factor: float) -> Change:
    """The same contents, louder or quieter."""
    return lambda contents: [part * factor for part in contents]


def matched_noise(seed: int, like: Sequence[Contents] = ()) -> Change:
    """Gaussian noise with the mean and spread that each dimension has over the tokens.

    Args:
        seed: of the noise.
        like: contents whose mean and spread are taken, all together; default: those that are replaced. The few latents
            of one memory are better matched to other images' latents: their own mean would still tell of the image.
    """

    def change(contents: Contents) -> Contents:
        generator = torch.Generator().manual_seed(seed)
        found = []
        for which, part in enumerate(contents):
            noise = torch.randn(part.shape, generator=generator).to(part.device, part.dtype)
            pool = torch.cat([_at(other, which) for other in like], 1).to(part) if like else part
            mean, spread = pool.mean(1, keepdim=True), pool.std(1, keepdim=True, correction=0)
            found.append(mean + noise * spread)
        return found

    return change


def taken_from(other: Contents) -> Change:
    """What another image left, stretched to the same number of tokens."""
    return lambda contents: [
        stretched(_at(other, which), part.shape[1]).to(part).expand_as(part) for which, part in enumerate(contents)
    ]


def mixed_from(others: Sequence[Contents], seed: int) -> Change:
    """Every token from the same place of some other image, drawn anew for each: no image is left whole."""

    def change(contents: Contents) -> Contents:
        generator = torch.Generator().manual_seed(seed)
        found = []
        for which, part in enumerate(contents):
            pool = torch.cat([stretched(_at(other, which), part.shape[1]) for other in others])  # [K, M, D]
            pick = torch.randint(len(pool), (part.shape[1],), generator=generator).to(pool.device)
            mixed = pool[pick, torch.arange(part.shape[1], device=pool.device)]
            found.append(mixed[None].to(part).expand_as(part))
        return found

    return change


def stretched(memory: torch.Tensor, length: int) -> torch.Tensor:
    """[B, M, D] -> [B, length, D], by repeating or leaving out tokens evenly."""
    if memory.shape[1] == length:
        return memory
    index = torch.linspace(0, memory.shape[1] - 1, length).round().long()
    return memory[:, index.to(memory.device)]


def _at(contents: Contents, which: int) -> torch.Tensor:
    return contents[min(which, len(contents) - 1)]
