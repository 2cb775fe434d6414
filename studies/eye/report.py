"""Part two of docs/evidence.md: what was measured with a real language model, from the raw results and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from studies.eye import gate, lengths
from studies.eye.comparing import adapters
from studies.eye.comparing.report import section
from studies.eye.shares import difference


def part_two(folder: Path, page: str, raw: str, size: str = "cpu") -> str:
    """The section, in markdown.

    Args:
        folder: of all raw results; the eye's are in its `eye`.
        page: link to the page about the eye.
        raw: link to `folder`.
        size: of the eye.
    """
    lines = ["## Part two: a real language model with a small trained eye", ""]
    read, far = (_raw(folder / "eye" / name) for name in (f"{size}.json", f"lengths-{size}.json"))
    if read is None:
        return "\n".join([*lines, f"Not run: `python -m studies eye make` ([{Path(page).name}]({page})).", ""])
    parts = "; ".join(
        f"{name} {', '.join(f'{share:.0f} %' for share in part['percent'])} (n = {part['n']})"
        for name, part in read["gate"]["parts"].items()
    )
    lines += [
        "SmolLM2-135M-Instruct, frozen but for a LoRA that is merged in, and a tower of 3.3 M parameters, trained "
        f"here on drawings ([what it is]({page})): no state-of-the-art VLM; one eye, one seed. The gate asks for names "
        f"with 0, 1,024 and 2,048 positions between image and question and nothing seen in them: {parts}. "
        + (
            "**It holds.**"
            if read["gate"]["holds"]
            else f"**It does not hold**: both must be at {gate.SHORT:.0f} % at once and stay within {gate.WITHIN:.0f} "
            "points far off. So what follows is a measurement, and no claim about dilution rests on it."
        ),
        "",
    ]
    if far is None:
        return "\n".join([*lines, "How reading falls with length: not run, `python -m studies eye lengths`.", ""])
    said = "; ".join(f"*{name}*: {what}" for name, what in lengths.CONDITIONS.items())
    lines += [
        "**How reading falls with length.** The narrations are the language model's own "
        f"([all of them]({raw}/eye/narrations.json)); one question an image, right by exact greedy decoding, Wilson's "
        f"95 % interval over images. {said}. {far['conditions']['cpu_seconds'] / 60:.0f} CPU minutes.",
        "",
        *lengths.table(far["rows"]),
        *_reading(far["rows"]),
        "In training no text that is seen stood between image and question, only positions; so what base loses may be "
        "dilution or the unfamiliar text: LoRA and SFT behind narrations, below, are the control.",
        "",
        *section(folder / "eye", size, read["conditions"].get("eye")),
        "The attention meter and the controls of `keepsight diagnose`, of one of these memories: "
        "[docs/eye.md](eye.md#methods-on-the-frozen-eye).",
        "",
        *(
            adapters.section(folder / "eye" / "adapters")
            or ["**Not run**: VisMem ([its commands](eye.md#vismem-by-the-products-commands)).", ""]
        ),
    ]
    return "\n".join(lines)


def _reading(rows: list[dict[str, Any]]) -> list[str]:
    """What makes a condition say nothing about length: it reads badly where there is no narration at all."""
    at_once = {(row["images"], row["condition"]): row["right"] for row in rows if row["length"] == 0}
    broken = dict.fromkeys(
        condition for (images, condition), right in at_once.items() if difference(right, at_once[images, "base"])[2] < 0
    )
    return [
        f"*{condition.capitalize()}* is below base without any narration already: it disturbs this eye, which never "
        "met it in training. This says nothing about length, nor about a model that was trained for it.\n"
        for condition in broken
    ]


def _raw(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
