"""Runs one vLLM engine beside its memory's former, in a process of its own (fresh.py).

A job names base and adapter and holds rounds: what invokes memory (`MemoryPolicy`'s arguments, or null for the
adapter's own policy) and the requests, all handed over at once. An answer is its text's tokens, their log-probabilities
and its memories.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine import SETTINGS


def main(job_file: str, answers_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    import torch

    import keepsight
    from keepsight.checkpoints.sources import check_sources
    from keepsight.serve.vllm.engine import VllmEngine
    from keepsight.serve.vllm.vismem import VllmBatch
    from keepsight.vismem import MemoryPolicy

    torch.set_num_threads(1)
    base, (vismem,) = check_sources(job["adapter"], [], job["base"])
    model, processor = keepsight.load(job["adapter"], base=job["base"])
    options = {k: v for k, v in SETTINGS.items() if k not in ("logprobs_mode", "max_num_seqs", "max_model_len")}
    engine = VllmEngine(base, vismem, model, processor.tokenizer, 16, 1024, **(options | job["engine"]))
    rounds = []
    for policy, requests in job["rounds"]:
        if policy and "at" in policy:  # JSON knows no numbers as keys
            policy["at"] = {int(words): kind for words, kind in policy["at"].items()}
        policy = MemoryPolicy(**policy) if policy else None
        batch = VllmBatch(engine.llm, engine._batch.asking.vocabulary, model, processor.tokenizer, policy)
        rounds.append(_answers(batch, processor, requests, job["max_tokens"], job["bias"]))
    Path(answers_file).write_text(json.dumps({"rounds": rounds}))
    engine.close()


def _answers(batch: Any, processor: Any, requests: list[Any], length: int, bias: dict[str, float]) -> list[Any]:
    from PIL import Image

    from keepsight.serve.hf.rows import Job
    from keepsight.serve.hf.sampling import Sampling

    rows = []
    for request in requests:
        images = [Image.open(file).convert("RGB") for file in request["images"]]
        inputs = dict(processor(text=[request["text"]], images=images or None, return_tensors="pt"))
        sampling = Sampling(length, 0.0, logit_bias={int(i): value for i, value in bias.items()}, logprobs=0, seed=0)
        events: list[Any] = []
        length_of_prompt = inputs["input_ids"].shape[1]
        source = (request["text"], images)
        job = Job(inputs, length_of_prompt, sampling, 1, request.get("memory", True), events.append, source=source)
        batch.begin(job)
        rows.append((batch.answers[-1], events))
    kept = [answer for answer, _ in rows]
    while batch.answers:
        for row in batch.step():
            if row.error is not None:
                raise row.error
    return [
        {
            "tokens": answer.row.ids[answer.row.job.prompt_tokens :],
            "logprobs": [entry[1] for event in events for entry in event.logprobs],
            "invocations": [[i.kind, i.invoked_as, i.was_sampled] for i in answer.row.invocations],
            "requests": answer.segments,
        }
        for answer, (_, events) in zip(kept, rows, strict=True)
    ]
