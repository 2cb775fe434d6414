"""Teach a memory to the small VLM that ships with keepsight, from a file of images and conversations.

    python examples/train_pvm.py [FOLDER] [STEPS]

Writes images of handwritten digits and a train.jsonl into FOLDER/data, trains on them, and leaves the adapter in
FOLDER/memory. Two hundred steps take a minute or two on one core. Needs: pip install -e ".[train,lab]"
"""

import json
import sys
from pathlib import Path

import numpy as np

from keepsight import PvmConfig
from keepsight.lab.digits import CELLS, draw_grids
from keepsight.train.pvm.sft import SftSettings, train_pvm


def write_data(folder: Path, count: int) -> Path:
    """Images of 4 x 4 digits, and what they show in a random order: each digit needs a look at the image."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images, digits = draw_grids(count, "train", rng)
    with (folder / "train.jsonl").open("w") as file:
        for index, (image, grid) in enumerate(zip(images, digits, strict=True)):
            image.save(folder / f"{index}.png")
            facts = " ".join(f"{CELLS[cell]} {grid[cell]} ." for cell in rng.permutation(len(CELLS)))
            messages = [{"role": "user", "content": "describe"}, {"role": "assistant", "content": facts}]
            file.write(json.dumps({"images": [f"{index}.png"], "messages": messages}) + "\n")
    return folder / "train.jsonl"


def main(folder: Path, steps: int) -> None:
    report = train_pvm(
        "keepsight/reference",
        write_data(folder / "data", count=16 * min(steps, 200)),
        folder / "memory",
        pvm=PvmConfig(layers=[1, 3], width=64),
        # A tiny model learns at rates that would break a large one; for those, keep the defaults.
        settings=SftSettings(
            max_steps=steps,
            batch_size=16,
            grad_accum=1,
            lr=6e-3,
            gate_lr_multiplier=5,
            blindfold_steps=steps // 2,  # keepsight's own warm-up, the default for 3/8 of the steps; see docs/train.md
        ),
        overwrite=True,
        say=print,
        on_log=lambda values, step, total: print(f"step {step}/{total}", values.get("loss", "")),
    )
    print(f"{report.trainable:,} parameters trained; base unchanged: {report.base_unchanged}; gates {report.gates}")
    print(f"now: python examples/generate.py {report.output_dir} {folder / 'data' / '0.png'} describe")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "train-example"), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
