"""When memory is invoked while text is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from keepsight.errors import KeepsightError
from keepsight.settings import check_kinds
from keepsight.vismem.config import PolicyName, VisMemConfig
from keepsight.vismem.tokens import LONG, SHORT, TYPES


@dataclass(frozen=True)
class MemoryPolicy:
    """When memory is invoked.

    Attributes:
        name: "free": the model decides, by writing an invocation token. "off": never; exactly plain generation.
            "forced": at the places in `at`, and nowhere else. "random": after a delimiter with `probability`, either
            type equally likely (a row without an image has long-term memory only). "only_short", "only_long": the
            model decides, but the other type's token is skipped. "reversed": the model decides, and gets the other
            type of memory than it asked for: that type's invocation token is written in place of its own.
        at: "forced": number of text tokens written -> type, e.g. `{0: "short", 20: "long"}`; one mapping for all rows
            or one per row.
        probability: "random"; default: the config's `random_probability`.
        places: "random": an invocation is drawn after every delimiter, or "anywhere" (before the first word and after
            every word that is written).
        max_invocations: at most so many per sequence; default: the config's.
        min_words: where the model decides: so many words at least between two memories; default: the config's.
    """

    name: PolicyName = "free"
    at: Mapping[int, str] | Sequence[Mapping[int, str]] | None = None
    probability: float | None = None
    max_invocations: int | None = None
    places: Literal["delimiters", "anywhere"] = "delimiters"
    min_words: int | None = None

    def __post_init__(self) -> None:
        check_kinds(type(self), {n: getattr(self, n) for n in ("probability", "max_invocations", "min_words")})
        if self.name not in get_args(PolicyName):
            raise KeepsightError(f"memory={self.name!r}: expected one of {', '.join(get_args(PolicyName))}.")
        if (self.name == "forced") != (self.at is not None):
            raise KeepsightError(
                "MemoryPolicy('forced', at={0: 'short', 20: 'long'}) names the places; other policies take no `at`."
            )
        for plan in [self.at] if isinstance(self.at, (Mapping, str)) else list(self.at or ()):
            if not isinstance(plan, Mapping) or not all(_is_place(at, kind) for at, kind in plan.items()):
                raise KeepsightError(f"at={plan!r}: expected text tokens written (from 0) -> 'short' or 'long'.")
        if self.max_invocations is not None and self.max_invocations < 0:
            raise KeepsightError(f"max_invocations={self.max_invocations}: expected memories in a sequence, from 0.")
        if self.probability is not None:
            if self.name != "random":
                raise KeepsightError(f"probability={self.probability} has no effect under policy {self.name!r}.")
            if not 0 <= self.probability <= 1:
                raise KeepsightError(f"probability={self.probability}: expected a number from 0 to 1.")
        if self.places not in ("delimiters", "anywhere"):
            raise KeepsightError(f"places={self.places!r}: expected 'delimiters' or 'anywhere'.")
        if self.places == "anywhere" and self.name != "random":
            raise KeepsightError(f"places={self.places!r} has no effect under policy {self.name!r}.")
        if self.min_words is not None:
            if not self.model_decides:
                raise KeepsightError(f"min_words={self.min_words} has no effect under policy {self.name!r}.")
            if self.min_words < 0:
                raise KeepsightError(f"min_words={self.min_words}: expected words between two memories, from 0.")

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

    @property
    def can_invoke(self) -> bool:
        """Whether it can invoke any memory at all."""
        plans = [self.at] if isinstance(self.at, Mapping) else list(self.at or ())
        return self.name != "off" and (self.name != "forced" or any(plans))

    def formed(self, kind: str) -> str:
        """The type that is formed where `kind` is asked for."""
        return kind if self.name != "reversed" else (LONG if kind == SHORT else SHORT)

    def admits(self, kind: str) -> bool:
        """Whether the model may choose the invocation token of this type."""
        return self.model_decides and self.name != {SHORT: "only_long", LONG: "only_short"}[kind]

    def plan(self, row: int) -> Mapping[int, str]:
        """The forced places of one row."""
        if self.at is None:
            return {}
        return self.at if isinstance(self.at, Mapping) else self.at[row]

    def check_rows(self, rows: int) -> None:
        """Raise unless per-row settings fit the number of rows."""
        if self.at is not None and not isinstance(self.at, Mapping) and len(self.at) != rows:
            raise KeepsightError(f"at holds {len(self.at)} entries for {rows} rows (num_return_sequences counts).")


def _is_place(at: Any, kind: Any) -> bool:
    return isinstance(at, int) and not isinstance(at, bool) and at >= 0 and kind in TYPES


#: Draws nothing, writes what it is told, and never invokes.
NO_MEMORY = MemoryPolicy("forced", at={})
