"""What vLLM gives a VisMem: throughput with vLLM as the writer against the Hugging Face path, on the same prompts.

    python benchmarks/serve_vllm_vismem.py --quick            # minutes, any machine: does it run? Nothing to quote
    python benchmarks/serve_vllm_vismem.py                    # CPU, the tiny shape
    python benchmarks/serve_vllm_vismem.py --shape 8b --dtype bfloat16 --no-eager    # a GPU with 80 GB
    python benchmarks/serve_vllm_vismem.py --show benchmarks/results/serve/vllm-vismem-*.json

Two writers, `keepsight serve`'s own (continuous batching on the Hugging Face path) and vLLM with the memories formed
beside it, live in processes of their own and take turns. Memories are forced at the same words in both, so that both
form equally many; with memory off, both write the base's answers. Weights are random. vLLM's prefix cache is emptied
before every turn, so that a turn finds only what it left itself. Whether both wrote the same tokens is recorded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared.engines import SHAPES, describe_model, make_parser, noise, only_answers, run, running

SCRIPT = Path(__file__).name
#: Words written -> memory.
FORCED = {8: "short", 24: "long"}
WRITERS = ("transformers", "vllm")


def make_folders(shape: str, dtype: str, root: Path) -> Path:
    """A random base and a random VisMem on it."""
    import torch
    import transformers
    from peft import get_peft_model

    from keepsight.vismem import VisMemConfig, add_memory_tokens

    config, processor = describe_model(shape)
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).to(getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    for folder in (root / "base", root / "vismem"):
        processor.save_pretrained(folder)
    model.save_pretrained(root / "base")
    model = transformers.AutoModelForImageTextToText.from_pretrained(root / "base", dtype=dtype)
    model = get_peft_model(model, VisMemConfig())
    add_memory_tokens(processor, model)
    model.save_pretrained(root / "vismem")
    processor.save_pretrained(root / "vismem")
    return root


# --- one writer ------------------------------------------------------------------


def work(folder: str, options: dict[str, Any]) -> None:
    """Serve turns from stdin: each line {"batch": n, "memory": bool}; answers a line with seconds and tokens."""
    answers = only_answers()
    import torch

    import keepsight
    from keepsight.serve.hf.batch import Batch
    from keepsight.serve.hf.latent import LatentMemories
    from keepsight.vismem import MemoryPolicy

    root = Path(folder)
    model, processor = keepsight.load(root / "vismem", base=root / "base", dtype=options["dtype"])
    policy = MemoryPolicy("forced", at=FORCED)
    device = next(model.parameters()).device
    writer: Any
    if options["writer"] == "transformers":
        writer = Batch(model, processor.tokenizer, True)
        writer.latent = LatentMemories.of(model, policy)
    else:
        writer = _vllm(root, model, processor, policy, options)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        rows = _jobs(processor, options, told["batch"], told["memory"])
        if options["writer"] == "vllm":
            writer.llm.reset_prefix_cache()
            writer.llm.reset_encoder_cache()
        start, spent = time.perf_counter(), time.process_time()
        done = _write(writer, rows, told["memory"], policy)
        if device.type == "cuda":
            torch.cuda.synchronize()
        turn = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - spent}
        turn["tokens"] = sum(row.written for row in done)
        turn["memories"] = sum(len(row.invocations) for row in done)
        # The last token of an answer is written, and on the Hugging Face path not read any more.
        most = options["new_tokens"] - 1
        turn["ids"] = [row.ids[row.job.prompt_tokens :][:most] for row in sorted(done, key=lambda row: row.job.arrived)]
        print(json.dumps(turn), file=answers, flush=True)


def _vllm(root: Path, model: Any, processor: Any, policy: Any, options: dict[str, Any]) -> Any:
    from keepsight.checkpoints.sources import check_sources
    from keepsight.serve.vllm.engine import VllmEngine

    base, (vismem,) = check_sources(root / "vismem", [], root / "base")
    most = options["visual_tokens"] + options["text_tokens"] + options["new_tokens"] + 64
    more = {"enforce_eager": options["eager"], "max_num_batched_tokens": 4096, "block_size": options["block_size"]}
    if options["gpu_memory_utilization"]:
        more["gpu_memory_utilization"] = options["gpu_memory_utilization"]
    engine = VllmEngine(
        base, vismem, model, processor.tokenizer, options["requests"], most, policy, dtype=options["dtype"], **more
    )
    engine._batch.owner = engine  # type: ignore[attr-defined]  # whose folder lives as long as it does
    return engine._batch


def _jobs(processor: Any, options: dict[str, Any], count: int, memory: bool) -> list[Any]:
    from PIL import Image

    from keepsight.serve.hf.rows import Job
    from keepsight.serve.hf.sampling import Sampling

    text = "<|vision_start|><|image_pad|><|vision_end|>" + " the" * options["text_tokens"]
    jobs = []
    for pixels in noise(options)[:count]:
        image = Image.fromarray(pixels)
        inputs = dict(processor(text=[text], images=[image], add_special_tokens=False, return_tensors="pt"))
        sampling = Sampling(options["new_tokens"], 0.0)
        length = inputs["input_ids"].shape[1]
        jobs.append(Job(inputs, length, sampling, 1, memory, lambda event: None, source=(text, [image])))
    return jobs


def _write(writer: Any, jobs: list[Any], memory: bool, policy: Any) -> list[Any]:
    """Write all answers together; returns their rows."""
    done = []
    if hasattr(writer, "begin"):
        for job in jobs:
            writer.begin(job)
    else:
        writer = writer._empty()
        writer.memory = memory
        writer.latent = writer.latent if memory else None
        for job in jobs:
            writer.join(writer.read(job))
        for row in writer.rows:
            if row.latent is not None:
                row.latent.plan = dict(policy.plan(0))
    while writer.rows:
        done += writer.step()
    assert not any(row.error for row in done)
    return done


# --- the measurement ------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both writers take turns; returns every turn and what follows from them."""
    names = ("visual_tokens", "text_tokens", "new_tokens", "requests", "dtype", "eager", "block_size")
    options = {name: getattr(arguments, name) for name in (*names, "gpu_memory_utilization")}
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        folders = dict.fromkeys(WRITERS, make_folders(arguments.shape, arguments.dtype, Path(root)))
        with running(folders, {name: options | {"writer": name} for name in WRITERS}, SCRIPT) as engines:
            for engine in engines.values():
                engine.turn(arguments.requests, memory=True)  # warm up
            for number in range(arguments.rounds):
                for batch in sorted({1, arguments.requests}):
                    for memory in (True, False):
                        order = list(engines) if number % 2 == 0 else list(engines)[::-1]
                        turns = {name: engines[name].turn(batch, memory=memory) for name in order}
                        ids = [turns[name].pop("ids") for name in WRITERS]
                        equal = sum(a == b for a, b in zip(*ids, strict=True))
                        samples.append({"batch": batch, "memory": memory, "equal_answers": equal} | turns)
                print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    told = options | {"shape": arguments.shape, "forced": FORCED, "model": SHAPES[arguments.shape]}
    return {"options": told, "samples": samples, "summary": summarise(samples)}


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per batch size, with memory and without: medians, and quartiles of the ratios of paired turns."""
    from shared.measuring import spread

    rows = []
    for batch, memory in sorted({(sample["batch"], sample["memory"]) for sample in samples}):
        chosen = [s for s in samples if (s["batch"], s["memory"]) == (batch, memory)]
        row: dict[str, Any] = {"batch": batch, "memory": memory, "rounds": len(chosen)}
        row["memories_per_answer"] = chosen[0]["vllm"]["memories"] / batch
        row["equal_answers"] = sum(s["equal_answers"] for s in chosen) / (batch * len(chosen))
        for name in WRITERS:
            row[name] = {
                "tokens_per_second": statistics.median(s[name]["tokens"] / s[name]["seconds"] for s in chosen),
                "tokens_per_cpu_second": statistics.median(s[name]["tokens"] / s[name]["cpu_seconds"] for s in chosen),
            }
        for name, key in (("throughput_ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
            ratios = [s["transformers"][key] / s["vllm"][key] for s in chosen]
            row[name] = spread(ratios)
        rows.append(row)
    return rows


def show(result: dict[str, Any]) -> None:
    """Print a result."""
    print(", ".join(f"{name} {value}" for name, value in result["options"].items()))
    for row in result["summary"]:
        clock, cpu = row["throughput_ratio"], row["cpu_ratio"]
        print(
            f"  {row['batch']:>3} at once, memory {'on ' if row['memory'] else 'off'} "
            f"({row['memories_per_answer']:.0f} per answer)   tokens per CPU second: transformers "
            f"{row['transformers']['tokens_per_cpu_second']:7.1f}, vLLM {row['vllm']['tokens_per_cpu_second']:7.1f}, "
            f"x {cpu['median']:.3f} [{cpu['q1']:.3f}, {cpu['q3']:.3f}]   tokens per second x {clock['median']:.3f} "
            f"[{clock['q1']:.3f}, {clock['q3']:.3f}]   answers equal {row['equal_answers']:.0%}   "
            f"({row['rounds']} rounds)"
        )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], json.loads(sys.argv[3]))
    parser = make_parser(__doc__, visual_tokens=64, text_tokens=32, new_tokens=96, requests=8, rounds=7)
    parser.add_argument(
        "--block-size", type=int, default=32, help="of vLLM's cache; what is resent is shared by blocks"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.0, help="vLLM's share of a GPU")
    quick = {"rounds": 2, "requests": 2, "visual_tokens": 16}
    return run(parser, SCRIPT, ["src/keepsight/serve", "src/keepsight/vismem"], measure, show, "vllm-vismem", quick)


if __name__ == "__main__":
    main()
