"""Results of the battery, and the rule by which a memory is called used, barely used or not used."""

from __future__ import annotations

from dataclasses import dataclass, field

from keepsight.diagnose.statistics import Estimate

#: Smallest contrast that counts as "used" rather than "barely used".
ENOUGH_SCORE = 0.05
ENOUGH_LOGPROB = 0.02  # nats per token


@dataclass(frozen=True)
class Condition:
    """What one change did, as paired differences to the intact memory (negative: worse than intact).

    Attributes:
        name, what: the change.
        score: difference in task score (share of right answers); None without references.
        logprob: difference in log-probability per token, of the references or else of the model's own answer.
        content: difference in log-probability per token of text written without the memory; None with references.
        changed: share of the answer's tokens that change when the model answers again; None with references.
    """

    name: str
    what: str
    score: Estimate | None
    logprob: Estimate
    content: Estimate | None = None
    changed: Estimate | None = None


@dataclass(frozen=True)
class HalfWay:
    """What happened after the image changed half-way through an output.

    Attributes:
        name, what: the change.
        stays: share of later answers that are right for the first image; None without references.
        follows: share of later answers that are right for the new image; None without references.
        logprob: difference in log-probability per token of the second half, to the unchanged image.
        changed: share of the second half's tokens that change when the model writes it again; None with references.
    """

    name: str
    what: str
    stays: Estimate | None
    follows: Estimate | None
    logprob: Estimate
    changed: Estimate | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether the memory is used, in words.

    Attributes:
        word: "used", "barely used", "not used", "no memory attached" or "not enough data".
        figure: the contrast right image minus other image; None where there is none.
        measure: what `figure` is measured in.
        rule: how the word follows from the figure.
    """

    word: str
    figure: Estimate | None
    measure: str
    rule: str

    @property
    def sentence(self) -> str:
        """The verdict in one line, with the figure it rests on."""
        if self.figure is None:
            return f"{self.word}: {self.rule}"
        return f"{self.word}: right image minus other image = {self.figure} {self.measure} ({self.rule})"

    def on(self, what: str) -> str:
        """ "Memory used: ...", "Memory: not enough data: ..."."""
        return f"{what}{':' if self.figure is None else ''} {self.sentence}"


@dataclass
class CausalResult:
    """All of the battery.

    Attributes:
        method: the memory's method, or None.
        units: what the intervals resample: samples, answers, or blocks of tokens.
        samples: how many samples were measured.
        intact_score: the task score with the memory intact.
        blind: without references: right image minus other image in the memory, in nats per token of text written
            without the memory, while the decoder itself sees the other image.
        conditions, half_way, verdict: the findings.
        formed: VisMem: memories of each type in the texts that were read, all samples together.
    """

    method: str | None
    units: str
    samples: int
    intact_score: Estimate | None
    blind: Estimate | None = None
    conditions: list[Condition] = field(default_factory=list)
    half_way: list[HalfWay] = field(default_factory=list)
    verdict: Verdict = field(default_factory=lambda: Verdict("not enough data", None, "", "nothing was measured"))
    formed: dict[str, int] = field(default_factory=dict)


def verdict_from(figure: Estimate, measure: str, enough: float) -> Verdict:
    """The rule: used if the whole interval is above 0 and the value is `enough`; barely used if it is less."""
    rule = f"used: 95 % interval above 0 and at least {enough:g}; barely used: above 0 but less; else not used"
    if figure.low > 0:
        return Verdict("used" if figure.value >= enough else "barely used", figure, measure, rule)
    return Verdict("not used", figure, measure, rule)
