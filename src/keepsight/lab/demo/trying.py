"""What a reader can try after the demo: one answer behind a long text, with the memory and without it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.checkpoints.load import load
from keepsight.data.images import open_image
from keepsight.lab.digits import CELLS
from keepsight.lab.narration import DESCRIBE, filler_words
from keepsight.pvm import memory_off


@torch.no_grad()
def try_it(adapter: Path, image: Path, digits: Sequence[int], words: int, begun: Path, seed: int) -> dict[str, Any]:
    """Name every cell behind `words` words, and leave the text that ends with the first one that only the memory reads.

    Where there is none, it ends with the first cell.

    Args:
        adapter: a PVM.
        image: a grid of digits, as a file.
        digits: what its cells hold, in reading order.
        words: of filler between image and question.
        begun: text file to write; `keepsight generate --prefill` reads it.
        seed: of the filler.

    Returns:
        Plain JSON: `words`, `cell`, its digit (`truth`), and what was answered `with_memory` and `without`; and of all
        cells together how many were right, `right_with_memory` and `right_without`.
    """
    model, processor = load(adapter)
    filler = " ".join(filler_words(words, np.random.default_rng([seed, 2])))
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]}
    texts = [
        processor.apply_chat_template(
            [asked, {"role": "assistant", "content": [{"type": "text", "text": f"{filler} {cell}"}]}],
            continue_final_message=True,
        )
        for cell in CELLS
    ]
    shown = [[open_image(image)]] * len(texts)
    inputs = processor(text=texts, images=shown, add_special_tokens=False, return_tensors="pt")
    answers = []
    for off in (False, True):
        with memory_off(model) if off else nullcontext():
            ids = model.eval()(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        answers.append([str(processor.tokenizer.decode(one, skip_special_tokens=True)).strip() for one in ids.tolist()])
    truth = [str(digit) for digit in digits]
    rows = list(zip(truth, *answers, strict=True))
    chosen = next((at for at, (true, on, off) in enumerate(rows) if on == true != off), 0)
    begun.write_text(f"{filler} {CELLS[chosen]}\n", encoding="utf-8")
    true, on, off = rows[chosen]
    return {
        "words": words,
        "cell": CELLS[chosen],
        "truth": true,
        "with_memory": on,
        "without": off,
        "right_with_memory": sum(on == true for true, on, _ in rows),
        "right_without": sum(off == true for true, _, off in rows),
    }
