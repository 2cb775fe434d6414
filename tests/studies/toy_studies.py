"""Studies for tests: cells that cost nothing, one of which can be killed in the middle."""

import os
import signal

from studies.study import Bench, Claim, Column, Outcome, Plot, Row, Study
from studies.study_results import judged


def toy_cell(bench: Bench, settings: dict, seed: int) -> Outcome:
    if settings.get("fails"):
        raise RuntimeError("this cell always fails")
    if settings.get("deadly") and not (bench.work / "killed").exists():
        (bench.work / "killed").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    made = bench.keep("shared", lambda folder: (folder / "made-by").write_text(str(os.getpid())))
    return Outcome(
        {"1": settings["level"] + 0.01 * seed, "count": 3.0 * settings["level"]},
        n=100,
        facts={"pid": os.getpid(), "made_by": (made / "made-by").read_text()},
    )


def ahead(results):
    gap = results.difference("high", "low", "1")
    return judged(gap.low > 0, f"high minus low: {gap.points()}")


def behind(results):
    return judged(results.difference("low", "high", "1").low > 0, "low is lower")


TOY = Study(
    name="toy",
    method="PVM",
    title="A toy: is high above low?",
    setting="Numbers out of thin air.",
    cell=toy_cell,
    rows=(
        Row("low", "low", {"level": 0.25}),
        Row("high", "high | with a bar", {"level": 0.5, "deadly": True}),
        Row("again", "high again", same_as=("toy", "high")),
    ),
    columns=(Column("1", "1"), Column("count", "count", percent=False)),
    claims=(
        Claim("High is above low.", "a test", ("high", "low"), ahead),
        Claim("Low is above high.", "a test", ("high", "low"), behind),
    ),
    seeds=(0, 1, 2, 3),
    plot=Plot("bars", columns=("1",)),
)
FAILING = Study(
    name="failing",
    method="PVM",
    title="One of two fails",
    setting="",
    cell=toy_cell,
    rows=(Row("bad", "bad", {"fails": True}), Row("good", "good", {"level": 0.1})),
    columns=(Column("1", "1"),),
    seeds=(0,),
)
