"""Several datasets as one: checked one by one, held out from as they are, then mixed by their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keepsight.data.check import CheckedData
from keepsight.data.errors import DataError
from keepsight.data.mixture import Together, load_sources
from keepsight.data.tables.reading import Source
from keepsight.words import counted

_MOST_TIMES = 1000
"""A sample that were seen more often in an epoch is a slip of the pen, not a weight."""


def check_sources(given: Any, split: str, check: Callable[[Source], CheckedData]) -> CheckedData:
    """Check one dataset, or several that are to be mixed.

    Args:
        given: what `mixture_of` takes.
        split: of all of them.
        check: checks one.

    Raises:
        FileNotFoundError, DataError: as `load_sources` and `check`.
    """
    sources, weights = load_sources(given, split)
    found = [check(source) for source in sources]
    return found[0] if len(found) == 1 else MixedData.of(found, weights)


@dataclass(frozen=True)
class MixedData(CheckedData):
    """Samples of several datasets: each once, until `mixed` gives every dataset its share.

    Attributes:
        weights: of the datasets; None: every sample is seen once an epoch.
        origins: (dataset, sample of it) of each kept sample.
    """

    weights: tuple[float, ...] | None = None
    origins: tuple[tuple[int, int], ...] = field(default=())

    @classmethod
    def of(cls, found: Sequence[CheckedData], weights: tuple[float, ...] | None) -> MixedData:
        """What was found in each, as one: good and bad, in order."""
        source = Together.of([one.source for one in found])
        told: dict[str, tuple[int, Counter[str]]] = {}
        for one in found:
            for subject, (samples, words) in one.told.items():
                before = told.get(subject, (0, Counter[str]()))
                told[subject] = (before[0] + samples, before[1] + words)
        named = list(zip(found, (one.source.name for one in found), strict=True))
        return cls(
            source,
            [_moved(row, start) for one, start in zip(found, source.starts, strict=True) for row in one.kept],
            dict(sum((Counter(one.formats) for one in found), Counter[str]())),
            tuple((f"{name}, {where}", what) for one, name in named for where, what in one.problems),
            tuple(dict.fromkeys(hint for one in found for hint in one.hints)),
            tuple((f"{name}, {where}", why) for one, name in named for where, why in one.skipped),
            told,
            tuple(count for one in found for count in one.image_counts),
            tuple(length for one in found for length in one.lengths),
            sum(one.cut for one in found),
            sum(one.duplicates for one in found),
            weights,
            tuple((place, number) for place, one in enumerate(found) for number in range(one.rows)),
        )

    def good(self) -> MixedData:
        """Itself, if every sample can be used and every dataset has some."""
        super().good()
        there = {place for place, _ in self.origins}
        for place, source in enumerate(self._members):
            if place not in there:
                raise DataError(f"{source.name}: no sample is left, so it would have no part in the mix. Leave it out.")
        return self

    def select(self, indices: Sequence[int]) -> MixedData:
        """Some of the samples, in this order; one may be there several times."""
        fewer = super().select(indices)
        origins = tuple(self.origins[index] for index in indices)
        return replace(self, kept=fewer.kept, image_counts=fewer.image_counts, origins=origins)

    def mixed(self) -> MixedData:
        """An epoch: the datasets in the shares of their weights, and every sample at least once.

        A dataset that needs more samples than it has repeats all of them as often as the next; what is left over is
        taken evenly spaced. Nothing is drawn, so the same data and weights are the same epoch; its order is the
        trainer's.

        Raises:
            DataError: if a sample would be seen absurdly often.
        """
        if self.weights is None or len(set(self.origins)) < self.rows:
            return self
        rows: list[list[int]] = [[] for _ in self._members]
        for index, (place, _) in enumerate(self.origins):
            rows[place].append(index)
        counts = epoch_of([source.name for source in self._members], [len(own) for own in rows], self.weights)
        chosen: list[int] = []
        for own, wanted in zip(rows, counts, strict=True):
            whole, rest = divmod(wanted, len(own))
            chosen += own * whole + [own[place * len(own) // rest] for place in range(rest)]
        return self.select(chosen)

    def mix(self, full: bool = True) -> str:
        """What share of an epoch each dataset has, in words.

        Args:
            full: names as given, and how often samples are seen; otherwise the files' names alone, for a card.
        """
        epoch = self.mixed()
        seen = Counter(place for place, _ in epoch.origins)
        there = Counter(place for place, _ in set(epoch.origins))
        places = range(len(self._members))
        names = [source.name for source in self._members]
        return in_words(names, [there[place] for place in places], [seen[place] for place in places], full)

    def agreed(self) -> dict[str, Any]:
        """The same, and the weights."""
        return {**super().agreed(), "weights of the datasets": None if self.weights is None else list(self.weights)}

    @property
    def _members(self) -> tuple[Source, ...]:
        assert isinstance(self.source, Together)
        return self.source.members


def epoch_of(names: Sequence[str], sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """How many samples of each dataset an epoch has: in the shares of the weights, and every sample at least once.

    Raises:
        DataError: if a sample would be seen absurdly often.
    """
    if weights is None:
        return list(sizes)
    shares = [weight / sum(weights) for weight in weights]
    total = max(size / share for size, share in zip(sizes, shares, strict=True))
    counts = [max(size, round(total * share)) for size, share in zip(sizes, shares, strict=True)]
    for name, size, share, wanted in zip(names, sizes, shares, counts, strict=True):
        if wanted > _MOST_TIMES * size:
            raise DataError(
                f"{name}: for {share:.2%} of an epoch that sees every sample of the others, each of its "
                f"{counted(size, 'sample')} would be seen {wanted / size:,.0f} times. Bring the weights nearer to each "
                "other."
            )
    return counts


def in_words(names: Sequence[str], sizes: Sequence[int], seen: Sequence[int], full: bool = True) -> str:
    """What share of an epoch each dataset has.

    Args:
        names: of the datasets.
        sizes: samples of each.
        seen: how many of them an epoch has, some of them several times.
        full: as `MixedData.mix`.
    """
    words = []
    for name, size, count in zip(names, sizes, seen, strict=True):
        often = count / max(1, size)
        more = f" ({counted(size, 'sample')}, each {'once' if often == 1 else f'{often:.3g} times'})"
        words.append(f"{name if full else Path(name).name} {count / max(1, sum(seen)):.1%}{more * full}")
    return "; ".join(words) + f": an epoch of {counted(sum(seen), 'sample')}" * full


def _moved(row: dict[str, Any], start: int) -> dict[str, Any]:
    """A row whose stored images are found in sources that stand together."""
    images = [cell if cell["row"] is None else {**cell, "row": cell["row"] + start} for cell in row["images"]]
    return {**row, "images": images}
