"""Writes the table of families into docs/families.md, from the code: `python tools/families.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from keepsight.backbone import FAMILIES, PENDING, REMOTE, UNFIT
from keepsight.serve.vllm.names import SERVED

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
START, END = "<!-- families: written by tools/families.py -->", "<!-- end of families -->"


def table() -> str:
    """The families, and those that cannot have a memory, in Markdown."""
    lines = ["| family | `model_type` | PVM | VisMem | video | vLLM | tested sizes |", "|---|---|---|---|---|---|---|"]
    for model_type, family in FAMILIES.items():
        latent = "yes" if family.vision is not None else "no"
        video = "yes" if "video" in family.modalities else "no"
        vllm = "yes" if model_type in SERVED else "no"
        sizes = "tiny, random" + (f"; {family.tested}" if family.tested else "")
        lines.append(f"| {family.name} | `{model_type}` | yes | {latent} | {video} | {vllm} | {sizes} |")
    lines += [
        "",
        "*vLLM*: a PVM there hooks into vLLM's own class of the family, written and tested for those that say yes",
        "([serve-vllm.md](serve-vllm.md)); `keepsight serve` needs no vLLM.",
        "",
        "VisMem is missing where",
    ]
    reasons: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        if family.vision is None:
            reasons.setdefault(family.no_vismem, []).append(family.name)
    lines += [f"- {reason}: {', '.join(names)};" for reason, names in reasons.items()]
    lines[-1] = lines[-1][:-1] + "."
    lines += ["", "These VLMs of transformers cannot have a memory:"]
    lines += _by_reason(UNFIT)
    lines += ["", "These have their code beside their weights (`trust_remote_code`), which keepsight does not run:"]
    lines += [f"- `{model_type}`{reason and ': ' + reason}" for model_type, reason in REMOTE.items()]
    if PENDING:
        lines += ["", "transformers 5.24 has these too, and they have no row yet:"]
        lines += _by_reason(PENDING)
    return "\n".join(lines)


def _by_reason(reasons: dict[str, str]) -> list[str]:
    shared: dict[str, list[str]] = {}
    for model_type, reason in reasons.items():
        shared.setdefault(reason, []).append(f"`{model_type}`")
    return [f"- {', '.join(names)}: {reason}" for reason, names in shared.items()]


def written(page: str) -> str:
    """The page with the table as it is now."""
    head, _, rest = page.partition(START)
    return f"{head}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    sys.stdout.write(f"{PAGE} is current.\n")
