"""Studies for tests: cells that cost nothing, one of which can be killed in the middle."""

import os
import signal

from keepsight.lab.study.results import judged
from keepsight.lab.study.study import Bench, Claim, Column, Measured, Plot, Study, TableRow


def toy_cell(bench: Bench, settings: dict, seed: int) -> Measured:
    if settings.get("fails"):
        raise RuntimeError("this cell always fails")
    if settings.get("deadly") and not (bench.work / "killed").exists():
        (bench.work / "killed").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    made = bench.keep("shared", lambda folder: (folder / "made-by").write_text(str(os.getpid())))
    return Measured(
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
        TableRow("low", "low", {"level": 0.25}),
        TableRow("high", "high | with a bar", {"level": 0.5, "deadly": True}),
        TableRow("again", "high again", same_as=("toy", "high")),
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
    rows=(TableRow("bad", "bad", {"fails": True}), TableRow("good", "good", {"level": 0.1})),
    columns=(Column("1", "1"),),
    seeds=(0,),
)
