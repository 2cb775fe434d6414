"""Runs one vLLM engine, in a process of its own (fresh.py).

A job says which model, which engine arguments, and rounds of requests; all requests of a round are handed over at once.
An answer is its tokens, their log-probabilities, and how many prompt tokens came from the prefix cache.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 1024,
    "block_size": 32,
    "enforce_eager": True,
    "logprobs_mode": "processed_logprobs",
    "seed": 0,
    "disable_log_stats": False,  # preemptions are counted
}


def main(job_file: str, answers_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    for name, value in job.get("environment", {}).items():
        os.environ[name] = value
    if job.get("mutation"):
        _mutate(job["mutation"])
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(job["model"], **(SETTINGS | job["engine"]))
    loras = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(job.get("loras", {}).items(), 1)}
    params = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=1, allowed_token_ids=job["allowed"]
    )
    rounds = []
    for requests in job["rounds"]:
        prompts: list[Any] = []
        for request in requests:
            prompts.append({"prompt": request["text"]})
            if request["images"]:
                prompts[-1]["multi_modal_data"] = {"image": [Image.open(file) for file in request["images"]]}
        chosen = [loras.get(request.get("lora")) for request in requests] if loras else None
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=chosen)
        rounds.append(
            [
                {
                    "prompt": list(output.prompt_token_ids),
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        step[token].logprob
                        for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
                    ],
                    "cached": output.num_cached_tokens or 0,
                }
                for output in outputs
            ]
        )
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    operators = "keepsight.serve.vllm.beside" in sys.modules
    Path(answers_file).write_text(json.dumps({"rounds": rounds, "metrics": metrics, "operators": operators}))


def _mutate(name: str) -> None:
    """Break the memory on purpose: the tests must notice."""
    from keepsight.serve.vllm import attention

    if name == "no flag":  # text keys take part in the softmax
        attention.FLAG_QUERY = 0.0
    elif name == "no memory":
        attention.FlagChannel.unpack = lambda self, out: (out[..., : self.head_dim], out[:, :1, 0] > float("inf"))
    else:
        raise ValueError(name)
