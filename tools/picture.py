"""Draws the house from its contract: docs/images/architecture.svg from .importlinter.

python tools/picture.py
"""

from __future__ import annotations

import configparser
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
WIDTH, FLOOR, GAP, MARGIN, ROOM = 860, 40, 8, 16, 22
SAYS = {
    "cli": "one file a command",
    "lab": "the reference VLM, its tasks, the demo",
    "serve": "OpenAI's API, and vLLM's plugin",
    "evaluate": "answers, memory on and off",
    "diagnose": "is the memory used?",
    "train": "SFT, GRPO, controls, costs",
    "data": "any picture, any conversation",
    "checkpoints": "folders and weights, whole or refused",
    "pvm": "persistent visual memory",
    "vismem": "latent vision memory",
    "peft_method": "what both share as PEFT methods",
    "card": "the model card of a saved memory",
    "loading": "stored, expected, loaded names",
    "installed": "how it was installed",
    "backbone": "what a memory must know of a VLM family",
    "compat": "what differs between releases",
    "tested": "the releases that were tested",
    "shipped": "the small models inside the package",
    "early": "before PEFT is imported",
    "errors": "short lessons",
    "threads": "what each thread has for itself",
    "words": "counts and times in English",
    "settings": "settings take values of their kind",
    "modes": "who may read what is saved",
}
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1b1f24 } .s { font-size: 12px; fill: #57606a }
  rect { fill: #f6f8fa; stroke: #8c959f } .room { fill: #ddf4ff; stroke: #54aeff }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .s { fill: #9198a1 } rect { fill: #151b23; stroke: #3d444d }
    .room { fill: #0c2d6b; stroke: #1f6feb }
  }
"""


def floors(contract: configparser.SectionProxy) -> list[list[str]]:
    """The floors of a contract, top first, each with its rooms."""
    return [
        [room.strip() for room in line.replace(":", "|").split("|")] for line in contract["layers"].split("\n") if line
    ]


def draw() -> str:
    """The picture."""
    plan = configparser.ConfigParser()
    plan.read(ROOT / ".importlinter")
    inner = {
        plan[name]["containers"].strip().removeprefix("keepsight."): floors(plan[name])
        for name in plan.sections()
        if name.count(":") == 2 and plan[name].get("type") == "layers" and "floors" not in name
    }
    parts, y = [], MARGIN
    for rooms in floors(plan["importlinter:contract:floors"]):
        inside = max((len(inner.get(room, ())) for room in rooms), default=0)
        height = FLOOR + inside * (ROOM + 4)
        width = (WIDTH - 2 * MARGIN - GAP * (len(rooms) - 1)) / len(rooms)
        for number, room in enumerate(rooms):
            x = MARGIN + number * (width + GAP)
            parts.append(f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{height}" rx="6"/>')
            parts.append(f'<text x="{x + 12:.0f}" y="{y + 25}">{escape(room)}')
            parts.append(f'<tspan class="s" dx="10">{escape(SAYS[room])}</tspan></text>')
            for which, row in enumerate(inner.get(room, ())):
                top, small = y + FLOOR - 4 + which * (ROOM + 4), (width - 24 - 6 * (len(row) - 1)) / len(row)
                for place, name in enumerate(row):
                    left = x + 12 + place * (small + 6)
                    size = f'width="{small:.0f}" height="{ROOM}" rx="4"'
                    parts.append(f'<rect class="room" x="{left:.0f}" y="{top}" {size}/>')
                    parts.append(f'<text class="s" x="{left + 8:.0f}" y="{top + 15}">{escape(name)}</text>')
        y += height + GAP
    parts.append(
        f'<text class="s" x="{MARGIN}" y="{y + 12}">A floor may import what stands below it, never above.</text>'
    )
    height = y + 12 + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(PICTURE.relative_to(ROOT))
