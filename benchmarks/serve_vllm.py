"""What a memory costs in vLLM: throughput and time per token with and without it, on the same prompts.

    python benchmarks/serve_vllm.py --quick                   # minutes, any machine: does it run? Nothing to quote
    python benchmarks/serve_vllm.py --shape tiny              # CPU
    python benchmarks/serve_vllm.py --shape 8b --dtype bfloat16 --no-eager    # a GPU with 40 GB
    python benchmarks/serve_vllm.py --show benchmarks/results/serve/*.json

Run it where vLLM is installed (`tests_vllm/make_env.py` on a machine without a GPU). Weights are random and never
written: vLLM fills them in itself. Two engines, one of the plain model and one with a memory, live in processes of
their own and take turns, so that a busy machine slows both; what is compared are the turns of one round. CPU seconds
of the engine's process are kept beside the clock's: on a CPU they are the steadier measure of the two.
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


def make_folders(shape: str, root: Path) -> dict[str, Path]:
    """Config and processor of the plain model, and the same with a memory. No weights."""
    import torch
    import transformers

    import keepsight
    from keepsight.backbone import Backbone
    from keepsight.serve.vllm.export import describe
    from keepsight.serve.vllm.names import SERVED

    config, processor = describe_model(shape)
    with torch.device("meta"):
        backbone = Backbone.of(transformers.Qwen3VLForConditionalGeneration(config))
    memory = keepsight.PvmConfig(**SHAPES[shape]["memory"])
    memory.resolve(backbone)
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    plain = config.to_dict()
    folders = {}
    for name, content in (("base", plain), ("pvm", describe(plain, memory, SERVED["qwen3_vl"]))):
        folders[name] = root / name
        processor.save_pretrained(folders[name])
        (folders[name] / "config.json").write_text(json.dumps(content))
    return folders


# --- one engine ----------------------------------------------------------------


def work(folder: str, options: dict[str, Any]) -> None:
    """Serve turns from stdin: each line {"batch": n}; answers a line with seconds and tokens."""
    answers = only_answers()
    from PIL import Image
    from vllm import LLM, SamplingParams

    prompts = [
        {
            "prompt": "<|vision_start|><|image_pad|><|vision_end|>" + " the" * options["text_tokens"],
            "multi_modal_data": {"image": Image.fromarray(image)},
        }
        for image in noise(options)
    ]
    llm = LLM(
        folder,
        load_format="dummy",
        dtype=options["dtype"],
        enforce_eager=options["eager"],
        max_model_len=options["visual_tokens"] + options["text_tokens"] + options["new_tokens"] + 64,
        max_num_seqs=options["requests"],
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,  # every turn does all of its work
        disable_log_stats=False,
        seed=0,
    )
    params = SamplingParams(temperature=0, max_tokens=options["new_tokens"], ignore_eos=True)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        count = json.loads(line)["batch"]
        start, spent = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts[:count], params, use_tqdm=False)
        seconds, spent = time.perf_counter() - start, time.process_time() - spent
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        times = [output.metrics for output in outputs]
        per_token = [(t.last_token_ts - t.first_token_ts) / (options["new_tokens"] - 1) for t in times]
        turn = {
            "seconds": seconds,
            "cpu_seconds": spent,
            "tokens": tokens,
            "ms_per_token": 1000 * statistics.median(per_token),
        }
        print(json.dumps(turn), file=answers, flush=True)


# --- the measurement ------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both engines take turns; returns every turn and what follows from them."""
    options = {name: getattr(arguments, name) for name in ("visual_tokens", "text_tokens", "new_tokens", "requests")}
    options |= {"dtype": arguments.dtype, "eager": arguments.eager}
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        folders = make_folders(arguments.shape, Path(root))
        with running(folders, dict.fromkeys(folders, options), SCRIPT) as engines:
            for engine in engines.values():
                engine.turn(arguments.requests)  # warm up
                engine.turn(1)
            for number in range(arguments.rounds):
                for batch in (1, arguments.requests):
                    order = list(engines) if number % 2 == 0 else list(engines)[::-1]
                    samples.append({"batch": batch} | {name: engines[name].turn(batch) for name in order})
                print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    return {"options": options | {"shape": arguments.shape}, "samples": samples, "summary": summarise(samples)}


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per batch size: medians, and quartiles of the ratios of paired turns."""
    from shared.measuring import spread

    rows = []
    for batch in sorted({sample["batch"] for sample in samples}):
        chosen = [sample for sample in samples if sample["batch"] == batch]
        row: dict[str, Any] = {"batch": batch, "rounds": len(chosen)}
        for name in ("base", "pvm"):
            speeds = [sample[name]["tokens"] / sample[name]["seconds"] for sample in chosen]
            row[name] = {
                "tokens_per_second": statistics.median(speeds),
                "ms_per_token": statistics.median(sample[name]["ms_per_token"] for sample in chosen),
            }
        row["throughput_ratio"] = spread([s["base"]["seconds"] / s["pvm"]["seconds"] for s in chosen])
        row["cpu_ratio"] = spread([s["base"]["cpu_seconds"] / s["pvm"]["cpu_seconds"] for s in chosen])
        row["token_time_ratio"] = spread([s["pvm"]["ms_per_token"] / s["base"]["ms_per_token"] for s in chosen])
        rows.append(row)
    return rows


def show(result: dict[str, Any]) -> None:
    """Print a result."""
    options = result["options"]
    print(", ".join(f"{name} {value}" for name, value in options.items()))
    for row in result["summary"]:
        ratio, time_ratio, cpu = row["throughput_ratio"], row["token_time_ratio"], row["cpu_ratio"]
        print(
            f"  {row['batch']:>3} at once   base {row['base']['tokens_per_second']:8.1f} tokens/s, "
            f"{row['base']['ms_per_token']:7.2f} ms/token   pvm {row['pvm']['tokens_per_second']:8.1f} tokens/s, "
            f"{row['pvm']['ms_per_token']:7.2f} ms/token   throughput x {ratio['median']:.3f} "
            f"[{ratio['q1']:.3f}, {ratio['q3']:.3f}]   time per token x {time_ratio['median']:.3f} "
            f"[{time_ratio['q1']:.3f}, {time_ratio['q3']:.3f}]   tokens per CPU second x {cpu['median']:.3f} "
            f"[{cpu['q1']:.3f}, {cpu['q3']:.3f}]   ({row['rounds']} rounds)"
        )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], json.loads(sys.argv[3]))
    parser = make_parser(__doc__, visual_tokens=256, text_tokens=64, new_tokens=64, requests=16, rounds=15)
    quick = {"rounds": 2, "requests": 4, "new_tokens": 8, "visual_tokens": 16}
    return run(parser, SCRIPT, ["src/keepsight/serve/vllm", "src/keepsight/pvm"], measure, show, "vllm", quick)


if __name__ == "__main__":
    main()
