"""How one run compares with the committed study of many seeds, each with a base of its own (benchmarks/lab/seeds.py).

One seed is one draw. The study's summary ships with the package, so that a report can say what other draws gave.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

STUDY = Path(__file__).with_name("seeds.json")
"""Written by `benchmarks/lab/seeds.py` from its raw results: `plan`, and by method and length mean, lowest, highest."""
COMPARED = ("pvm", "lora", "mlp", "base")


@lru_cache(maxsize=1)
def study() -> dict[str, Any]:
    """The shipped summary."""
    return json.loads(STUDY.read_text(encoding="utf-8"))


def compare(results: dict[str, Any]) -> dict[str, Any] | None:
    """This run beside the study, at the greatest length that both have read; None if there is none.

    Args:
        results: as assembled by the demo.

    Returns:
        `length`; `same_plan`, whether the methods were trained as in the study; and by method `here`, `mean`, `min`,
        `max`, `seeds` and `place`: "within", "above" or "below" what the seeds span.
    """
    found = study()["accuracy_by_length"]
    lengths = [n for n in results["lengths"] if str(n) in found["pvm"]]
    if not lengths:
        return None
    methods = {}
    for method in COMPARED:
        if method not in results or method not in found:
            continue
        here = results[method]["accuracy_by_length"][str(lengths[-1])]["accuracy"]
        spread = found[method][str(lengths[-1])]
        place = "below" if here < spread["min"] else "above" if here > spread["max"] else "within"
        methods[method] = {"here": here, **{n: spread[n] for n in ("mean", "min", "max", "seeds")}, "place": place}
    same = json.loads(json.dumps(results["plan"])) == study()["plan"]
    return {"length": lengths[-1], "same_plan": same, "methods": methods}


def in_words(compared: dict[str, Any]) -> str:
    """What a report says of PVM."""
    pvm = compared["methods"]["pvm"]
    where = "within what they span" if pvm["place"] == "within" else f"{pvm['place']} all of them"
    text = (
        f"This run's PVM reads {pvm['here']:.1%} after {compared['length']:,} tokens. In a study of {pvm['seeds']} "
        f"seeds, each with a base of its own, it read {pvm['mean']:.1%} on average, the lowest seed {pvm['min']:.1%}, "
        f"the highest {pvm['max']:.1%}; this run lies {where}."
    )
    return text if compared["same_plan"] else f"{text} The study trained otherwise than this run, so expect some less."
