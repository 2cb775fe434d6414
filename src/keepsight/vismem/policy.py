"""When memory is invoked while text is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from keepsight.errors import KeepsightError
from keepsight.vismem.config import PolicyName, VisMemConfig
from keepsight.vismem.tokens import LONG, SHORT, TYPES


@dataclass(frozen=True)
class Replay:
    """The beginning of a continuation, to be written again before the model goes on by itself.

    Attributes:
        tokens: ids [n], as in `sequences` after the prompt. If the last is an invocation token, its memory is formed
            anew, under the policy in force; so one can cut a continuation at an invocation and try another memory.
        latents: [m, D], for the memory positions among `tokens`.
    """

    tokens: torch.Tensor
    latents: torch.Tensor | None = None


@dataclass(frozen=True)
class MemoryPolicy:
    """When memory is invoked.

    Attributes:
        name: "free": the model decides, by writing an invocation token. "off": never; exactly plain generation.
            "forced": at the places in `at`, and nowhere else. "random": after a delimiter with `probability`, either
            type equally likely (a row without an image has long-term memory only). "only_short", "only_long": the
            model decides, but the other type's token is skipped. "reversed": the model decides, and gets the other
            type of memory than it asked for.
        at: "forced": number of text tokens written -> type, e.g. `{0: "short", 20: "long"}`; one mapping for all rows
            or one per row.
        probability: "random"; default: the config's `random_probability`.
        places: "random": an invocation is drawn after every delimiter, or "anywhere" (after every word that
            is written).
        max_invocations: at most so many per sequence; default: the config's.
        replay: per row, what to write first.
        seeds: per row, the seed of all that is drawn at random in it, tokens and invocations. The row is then the same
            whatever rows are beside it. Default: torch's own generator draws for all.
        copies: continuations per row of the prompt, which is read once for all of them. (`num_return_sequences` reads
            it once for each.) Per-row settings above count continuations.
        shadows: per row, the seed of a second continuation that branches off where the first memory is invoked and
            goes on without any: what would have been written. It costs no reading of its own, and its row comes after
            all others in the output; see `VisMemOutput.shadowed`. Needs `seeds`.
    """

    name: PolicyName = "free"
    at: Mapping[int, str] | Sequence[Mapping[int, str]] | None = None
    probability: float | None = None
    max_invocations: int | None = None
    replay: Sequence[Replay | None] | None = None
    places: Literal["delimiters", "anywhere"] = "delimiters"
    seeds: Sequence[int] | None = None
    copies: int = 1
    shadows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(PolicyName):
            raise KeepsightError(f"memory={self.name!r}: expected one of {', '.join(get_args(PolicyName))}.")
        if (self.name == "forced") != (self.at is not None):
            raise KeepsightError(
                "MemoryPolicy('forced', at={0: 'short', 20: 'long'}) names the places; other policies take no `at`."
            )
        plans = [self.at] if isinstance(self.at, Mapping) else list(self.at or ())
        for plan in plans:
            wrong = [(place, kind) for place, kind in plan.items() if kind not in TYPES or place < 0]
            if wrong:
                raise KeepsightError(f"at={plan}: expected text tokens written (from 0) -> 'short' or 'long'.")
        if self.probability is not None:
            if self.name != "random":
                raise KeepsightError(f"probability={self.probability} has no effect under policy {self.name!r}.")
            if not 0 <= self.probability <= 1:
                raise KeepsightError(f"probability={self.probability}: expected a number from 0 to 1.")
        if self.places not in ("delimiters", "anywhere"):
            raise KeepsightError(f"places={self.places!r}: expected 'delimiters' or 'anywhere'.")
        if self.copies < 1:
            raise KeepsightError(f"copies={self.copies}: expected at least 1.")
        if self.shadows is not None and (self.seeds is None or self.replay is not None):
            raise KeepsightError("shadows: they need `seeds` for the first continuations, and go with no `replay`.")
        if self.places == "anywhere" and self.name != "random":
            raise KeepsightError(f"places={self.places!r} has no effect under policy {self.name!r}.")

    @staticmethod
    def of(given: MemoryPolicy | str | None, config: VisMemConfig) -> MemoryPolicy:
        """What `generate(memory=...)` was given, or the config's policy."""
        if isinstance(given, MemoryPolicy):
            return given
        return MemoryPolicy(config.policy if given is None else given)  # type: ignore[arg-type]

    @property
    def model_decides(self) -> bool:
        """Whether the model's own invocation tokens count."""
        return self.name in ("free", "only_short", "only_long", "reversed")

    def formed(self, kind: str) -> str:
        """The type that is formed where `kind` is invoked."""
        return kind if self.name != "reversed" else (LONG if kind == SHORT else SHORT)

    def admits(self, kind: str) -> bool:
        """Whether the model may write the invocation token of this type."""
        return self.model_decides and self.name != {SHORT: "only_long", LONG: "only_short"}[kind]

    def plan(self, row: int) -> Mapping[int, str]:
        """The forced places of one row."""
        if self.at is None:
            return {}
        return self.at if isinstance(self.at, Mapping) else self.at[row]

    def draws(self, room: int | None) -> torch.Tensor | None:
        """Uniform random numbers [B, room, 3] of every row's own seed: for a token, an invocation, and its type.

        Args:
            room: how many positions can be written.
        """
        if self.seeds is None:
            return None
        if room is None:
            raise KeepsightError("seeds: the length must be bounded; pass max_new_tokens.")
        return torch.stack([drawn(seed, room) for seed in self.seeds])

    def check_rows(self, rows: int) -> None:
        """Raise unless per-row settings fit the number of rows."""
        given = {"at": self.at, "replay": self.replay, "seeds": self.seeds, "shadows": self.shadows}
        for name, value in given.items():
            if value is not None and not isinstance(value, Mapping) and len(value) != rows:
                raise KeepsightError(
                    f"{name} holds {len(value)} entries for {rows} rows (num_return_sequences counts)."
                )


def drawn(seed: int, room: int) -> torch.Tensor:
    """What a row draws for each position [room, 3]: for a token, an invocation, and its type."""
    return torch.rand(room, 3, generator=torch.Generator().manual_seed(seed))
