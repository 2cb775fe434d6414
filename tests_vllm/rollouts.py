"""One short GRPO run whose completions vLLM writes, in a process of its own (fresh.py).

A job says the family, what learns beside the memory, and whether the tensors that learn are handed to vLLM. The logs
are TRL's, among them how far vLLM's log-probability of each token that it wrote lies from the trainer's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import tiny
import torch
import transformers
from engine import SETTINGS
from PIL import Image


def varied(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that differs between completions: how many words one has."""
    return [float(len(set(one[0]["content"].split()))) for one in completions]


def main(job_file: str, logs_file: str) -> None:
    torch.set_num_threads(1)
    job, folder = json.loads(Path(job_file).read_text()), Path(job_file).parent
    from keepsight.serve.vllm import rollouts
    from keepsight.train.pvm.grpo import GrpoSettings, train_pvm_grpo

    if not job["packed"]:  # as on a GPU: weights of linear maps stay what they are
        from vllm import _custom_ops

        _custom_ops._supports_onednn = False
    if not job["handed"]:
        rollouts.learned_tensors = lambda model: _nothing()
    logs: list[dict[str, float]] = []
    train_pvm_grpo(
        _memory(job["family"], folder),
        _prompts(folder),
        folder / "trained",
        policy=job["policy"],
        lora_rank=4,
        settings=GrpoSettings(
            max_steps=3,
            batch_size=8,
            grad_accum=1,
            group_size=4,
            max_new_tokens=12,
            lr=job["lr"],
            mask_truncated=False,
            rewards=("rollouts:varied",),
            dtype="float32",
            device="cpu",
        ),
        writer=rollouts.VllmRollouts(
            use_vllm=True,
            engine=SETTINGS,
        ),
        on_log=lambda values, step, total: logs.append(values),
    )
    Path(logs_file).write_text(json.dumps(logs))


def _nothing() -> Iterator[Any]:
    yield from ()


def _memory(family: str, folder: Path) -> Path:
    """A memory on a model that hardly ever writes a special token: forbidding placeholders changes next to nothing."""
    base = tiny.make_base(family, folder / "base")
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head *= 4
        head[: tiny.FIRST_WORD] = 0
    model.save_pretrained(base)
    return tiny.make_memory(base, folder / "memory")


def _prompts(folder: Path) -> Path:
    rows = []
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 255, (24 + 8 * (i % 3), 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        rows.append({"prompt": f"w{i} w{i + 3}", "answer": f"w{i}", "image": f"{i}.png"})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
