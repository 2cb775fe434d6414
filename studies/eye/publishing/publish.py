"""A folder to publish: the eye's file and a model card, of which every figure is read from a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from keepsight.errors import KeepsightError
from studies.eye.publishing.eye import EYE, about_eye
from studies.eye.shares import interval

CARD = "README.md"

_LICENCES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "MIT": "https://opensource.org/license/mit",
}
_USES = {
    "train": "named drawings to learn from",
    "shapes": "shapes for the tower alone",
    "test": "test or validation: no weight was learnt from them",
}


def publish(eye: Path, results: Path, to: Path) -> bool:
    """Copy the eye in `eye` into `to`, with its card; returns whether the gate's figures are in the card.

    Args:
        eye: folder of the eye.
        results: folder of the raw results; those of another eye are not taken.
        to: folder, made where it is not there; what is in it under these names is replaced.

    Raises:
        KeepsightError: there is no eye, or it is not done.
    """
    about = about_eye(eye)
    if not about["done"]:
        raise KeepsightError(f"{eye / EYE} is not done yet, so it is nothing to publish: python -m studies eye make")
    gate = gate_of(about, results)
    to.mkdir(parents=True, exist_ok=True)
    if (to / EYE).resolve() != (eye / EYE).resolve():
        shutil.copyfile(eye / EYE, to / EYE)
    (to / CARD).write_text(card(about, gate, (to / EYE).stat().st_size), encoding="utf-8")
    return gate is not None


def gate_of(about: dict[str, Any], results: Path) -> dict[str, Any] | None:
    """The raw result of the gate that was measured on this very eye, if there is one."""
    file = results / f"{about['size']}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if found.get("conditions", {}).get("eye") == about["sha256"] else None


def card(about: dict[str, Any], gate: dict[str, Any] | None, weighs: int | None) -> str:
    """The model card.

    Args:
        about: what `about_eye` says.
        gate: raw result of its gate; None where it was not measured.
        weighs: bytes of the eye's file; None for the card of the whole model that it was exported into.
    """
    settings, pictures = about["settings"], [one for one in about["packages"] if one["use"] != "language model"]
    language = next(one for one in about["packages"] if one["use"] == "language model")
    minutes = {stage: seconds / 60 for stage, seconds in about["cpu_seconds"].items()}
    grids = ", ".join(f"{side} x {side}" for side in settings["sides"] if side > 1)
    lines = [
        "---",
        "license: apache-2.0",
        f"base_model: {language['source'].removeprefix('https://huggingface.co/')}",
        f"base_model_relation: {'finetune' if weighs is None else 'adapter'}",
        "pipeline_tag: image-text-to-text",
        "language:",
        "- en",
        "tags:",
        *(f"- {tag}" for tag in ("vision-language-model", "small", "drawings", "keepsight")),
        "---",
        "# A small trained eye for SmolLM2-135M-Instruct",
        f"A vision tower with its projector and a LoRA of rank {settings['lora']} that let SmolLM2-135M-Instruct see "
        "drawings. **What it is: a real language model with a small trained eye. What it is not: a state-of-the-art "
        "VLM.** It exists so that methods against visual forgetting can be measured on real text on a CPU.",
        "",
        f"- It was taught to name {len(about['concepts'])} things, and paper colours, drawing styles, places in a grid "
        f"({grids}), numbers and short words; how much of each it learnt stands below. Anything else it was never "
        "shown; what it says of a photograph means nothing.",
        f"- A picture is {settings['cell']} px square, on paper of one colour of which some is left on every side; a "
        f"grid has {settings['cell']} px for each of its pictures. Other sizes and shapes are nothing that it knows.",
        "- English; questions in the words of its training (studies/eye/questions.py) are answered best.",
        "- It is for research on methods. No decision should rest on what it says.",
        "",
        "## What it reads",
        *_read(gate),
        "",
        *_loaded(weighs),
        "",
        f"Of the eye's file, `{EYE}`: sha256 `{about['sha256']}`.",
        "",
        "## How it was made",
        f"`python -m studies eye make --size {about['size']}`, seed {settings['seed']}, with torch {about['torch']} "
        f"and transformers {about['transformers']}: {sum(minutes.values()):.0f} CPU minutes ("
        + ", ".join(f"{stage} {spent:.0f}" for stage, spent in minutes.items())
        + "). Settings:",
        "",
        *(f"    {key}: {json.dumps(value)}" for key, value in settings.items()),
        "",
        f"The language model: {_named(language)}, a copy in four bits (Q4_1) by way of the package "
        f"{language['name']} {language['version']} (sha256 {language['sha256']}).",
        "",
        "The words: " + ", ".join(about["concepts"]) + ".",
        "",
        "## Pictures and attribution",
        "Packages of npm. For training the drawings were rendered at 64 px, bent, recoloured and put on coloured "
        "paper; none of them is part of the weights' file.",
        "",
        "| pictures | licence | used as | package, sha256 |",
        "|---|---|---|---|",
        *(
            f"| {_named(one)} | [{one['licence']}]({_LICENCES.get(one['licence'], one['source'])}) "
            f"| {_USES[one['use']]} | {one['name']} {one['version']}, {one['sha256']} |"
            for one in pictures
        ),
        "",
    ]
    return "\n".join(lines)


def _loaded(weighs: int | None) -> list[str]:
    if weighs is None:
        return [
            "## How to load it",
            "An ordinary Qwen2.5-VL checkpoint of transformers, in float32. Crop images to a square; the processor "
            "brings them to the eye's size.",
            "",
            '    keepsight generate FOLDER -i picture.png -p "What is here?"',
        ]
    return [
        "## How to load it",
        "In a clone of keepsight, with this folder as FOLDER:",
        "",
        "    pip install gguf==0.19.0 resvg-py==0.5.0",
        "    python -m studies eye fetch                       # the language model, which is not in this folder",
        "    python -m studies eye export my-vlm --eye FOLDER  # an ordinary Qwen2.5-VL checkpoint",
        '    keepsight generate my-vlm -i picture.png -p "What is here?"',
        "",
        "docs/eye.md says how pictures are to be given, and how the figures above are measured again. The file has "
        f"{weighs / 1e6:.1f} MB, in bfloat16, with the names of transformers' Qwen2.5-VL and of PEFT's LoRA; its "
        "metadata (`about`) holds everything that this card says of its making.",
    ]


def _named(package: dict[str, Any]) -> str:
    title = package["source"].rpartition("/")[2] if package["registry"] == "pypi" else package["name"].partition("/")[2]
    return f"[{title}]({package['source']}) by {package['author']}"


def _read(gate: dict[str, Any] | None) -> list[str]:
    if gate is None:
        return ["Not measured: `python -m studies eye gate --eye FOLDER`, then `publish` again."]
    distances = gate["distances"]
    told = [
        "Exact answers by greedy decoding, with so many positions and nothing that is seen between image and "
        "question; in brackets Wilson's 95 % interval over images. One eye, one seed.",
        "",
        "| drawing style | image | task | n | " + " | ".join(f"{one:,}" for one in distances) + " |",
        "|---|---|---|---|" + "---|" * len(distances),
    ]
    for row in gate["rows"]:
        shares = [_share(right, row["n"]) for right in row["right"]]
        told.append(f"| {row['style']} | {row['image']} | {row['task']} | {row['n']} | " + " | ".join(shares) + " |")
    told.append("")
    for style, alone in gate["encoder alone"].items():
        told.append(
            f"The tower alone, names in `{style}`, {alone['n']} of them: {_share(alone['named'], alone['n'])} by the "
            f"nearest word, {_share(alone['right'], alone['n'])} by the nearest average of the seen styles."
        )
    told += [
        "",
        "The gate of docs/eye.md "
        + (
            "holds."
            if gate["gate"]["holds"]
            else "**does not hold**, so nothing measured with this eye says anything about dilution."
        ),
    ]
    return told


def _share(right: int, count: int) -> str:
    low, high = interval(right, count)
    return f"{100 * right / count:.0f} % [{low:.0f}, {high:.0f}]"
