"""The README's picture of a look: which part of the image the memory reads for a word, 8 to 2,048 words into an answer.

    make demo && python benchmarks/lab/look.py keepsight-demo/adapter

One narration about one test image is read by the demo's VLM with its PVM, up to each of four words; the weights are
those of the memory's layer that looks most sharply there, of all layers that have one. Writes docs/images/look.png and
benchmarks/results/lab-look.json.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import keepsight
from keepsight.diagnose.instruments.attention import AttentionMeter
from keepsight.diagnose.instruments.retrieval import RetrievalMeter
from keepsight.lab.demo.plots import COLORS
from keepsight.lab.digits import CELLS, GRID
from keepsight.lab.narration import VOCABULARY, make_narrations

ROOT = Path(__file__).parents[2]
PICTURE, RESULT = ROOT / "docs" / "images" / "look.png", ROOT / "benchmarks" / "results" / "lab-look.json"
GAPS = (6, 238, 764, 1027)
"""Words of filler before each fact, so that the digits are words 8, 249, 1,016 and 2,046."""
SEED = 3


@torch.no_grad()
def looks(adapter: str) -> dict[str, Any]:
    """What memory and model looked at for each digit of a narration."""
    model, processor = keepsight.load(adapter)
    told = make_narrations(processor, GAPS, 1, "test", np.random.default_rng(SEED))
    found = []
    for fact, at in enumerate(told.answers.tolist()):
        inputs = {**told.model_inputs()}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, :at]
        with RetrievalMeter(model) as memory, AttentionMeter(model, "auto") as own:
            said = int(model(**inputs).logits[0, -1].argmax())
        weights = memory.trace.weights[-1]  # [layers, 16]
        layer = int(weights.max(1).argmax())
        found.append(
            {
                "word": int(told.lengths[fact]) + 1,
                "cell": CELLS[int(told.cells[0, fact])],
                "digit": VOCABULARY[int(told.truth()[0, fact])],
                "said": VOCABULARY[said],
                "layer": int(memory.trace.layers[layer]),
                "weights": [round(float(w), 4) for w in weights[layer]],
                "own attention on the image": round(float(np.nanmean(own.trace.mass[-1, :, 0])), 4),
            }
        )
    return {"adapter": "made by keepsight demo, seed 0", "image": np.asarray(told.images[0]).tolist(), "looks": found}


def draw(result: dict[str, Any]) -> bytes:
    """The image once for each word; what the memory read has an outline as thick as its weight (above 0.1)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    ink, image = COLORS["light"]["ink"], np.asarray(result["image"], np.uint8)
    side, found = image.shape[0] / GRID, result["looks"]
    figure = Figure(figsize=(9, 3.1), dpi=130, layout="constrained", facecolor=COLORS["light"]["paper"])
    FigureCanvasAgg(figure)
    for axes, look in zip(figure.subplots(1, len(found)), found, strict=True):
        axes.imshow(image)
        for cell, weight in enumerate(look["weights"]):
            row, column = divmod(cell, GRID)
            if weight >= 0.1:
                corner = (column * side - 0.2, row * side - 0.2)
                style = {"fill": False, "edgecolor": "#ffb000", "linewidth": 1 + 6 * weight, "alpha": 0.5 + weight}
                axes.add_patch(Rectangle(corner, side - 0.6, side - 0.6, **style))
        axes.set_title(f"word {look['word']:,}: {look['cell']} is {look['said']}", fontsize=12, color=ink)
        share = look["weights"][CELLS.index(look["cell"])]
        own = look["own attention on the image"]
        axes.set_xlabel(f"memory on {look['cell']}: {share:.0%}\nbase on the image: {own:.0%}", fontsize=10, color=ink)
        axes.set_xticks([])
        axes.set_yticks([])
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("python benchmarks/lab/look.py ADAPTER, the adapter of keepsight demo")
    result = looks(sys.argv[1])
    RESULT.write_text(json.dumps(result) + "\n", encoding="utf-8")
    PICTURE.write_bytes(draw(result))
    for look in result["looks"]:
        print(f"word {look['word']}: {look['cell']} is {look['digit']}, said {look['said']}, layer {look['layer']}")


if __name__ == "__main__":
    main()
