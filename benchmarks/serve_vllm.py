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
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results" / "serve"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

#: Text and vision sizes. "8b" is the released Qwen3-VL-8B, with the memory of the paper; "tiny" is ours, with its
#: latent width in the paper's proportion, an eighth of the model's.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "vocab_size": 8192,
        },
        "vision": {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "deepstack": [0]},
        "memory": {"layers": [3, 6, 9], "width": 64},
    },
    "8b": {
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        "vision": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "deepstack": [8, 16, 24],
        },
        "memory": {"layers": [8, 16, 24], "width": 512},
    },
}


def describe_model(shape: str) -> tuple[Any, Any]:
    """Config and processor of the plain model."""
    import transformers

    from keepsight.lab.narration import IMAGE_PAD, TOKEN, VIDEO_PAD, VISION_END, VISION_START
    from keepsight.lab.reference import build_tokenizer

    sizes = SHAPES[shape]
    width, vision = sizes["text"]["hidden_size"], dict(sizes["vision"])
    mrope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    half = sizes["text"]["head_dim"] // 2
    mrope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    config = transformers.Qwen3VLConfig(
        text_config=sizes["text"] | {"rope_parameters": mrope, "max_position_embeddings": 32768},
        vision_config={
            "deepstack_visual_indexes": vision.pop("deepstack"),
            "out_hidden_size": width,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            **vision,
        },
        image_token_id=TOKEN[IMAGE_PAD],
        video_token_id=TOKEN[VIDEO_PAD],
        vision_start_token_id=TOKEN[VISION_START],
        vision_end_token_id=TOKEN[VISION_END],
    )
    geometry = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    geometry |= {"size": {"shortest_edge": 32 * 32, "longest_edge": 4096 * 32 * 32}}
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**geometry),
        tokenizer=build_tokenizer(),
        video_processor=transformers.Qwen3VLVideoProcessor(**geometry),
    )
    return config, processor


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
    answers = os.fdopen(os.dup(1), "w")  # vLLM prints to stdout, so it gets stderr
    os.dup2(2, 1)
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    side = 32 * round(options["visual_tokens"] ** 0.5)
    noise = np.random.default_rng(0).integers(0, 255, (options["requests"], side, side, 3), dtype=np.uint8)
    prompts = [
        {
            "prompt": "<|vision_start|><|image_pad|><|vision_end|>" + " the" * options["text_tokens"],
            "multi_modal_data": {"image": Image.fromarray(image)},
        }
        for image in noise
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


class Engine:
    """An engine in a process of its own.

    Args:
        folder: the model's.
        options: the worker's.
        script: the benchmark whose worker it is.
    """

    def __init__(self, folder: Path, options: dict[str, Any], script: Path = HERE):
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--worker", str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **os.environ},
        )

    def wait(self) -> None:
        """Until it has started."""
        if self._read() != "ready":
            raise RuntimeError("The engine did not start; its output stands above.")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def turn(self, batch: int, **more: Any) -> dict[str, Any]:
        """Answer the first `batch` prompts."""
        assert self.process.stdin is not None
        print(json.dumps({"batch": batch} | more), file=self.process.stdin, flush=True)
        return json.loads(self._read())

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# --- the measurement ------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both engines take turns; returns every turn and what follows from them."""
    options = {name: getattr(arguments, name) for name in ("visual_tokens", "text_tokens", "new_tokens", "requests")}
    options |= {"dtype": arguments.dtype, "eager": arguments.eager}
    with tempfile.TemporaryDirectory() as root:
        engines = {name: Engine(f, options) for name, f in make_folders(arguments.shape, Path(root)).items()}
        samples: list[dict[str, Any]] = []
        try:
            for engine in engines.values():
                engine.wait()
                engine.turn(arguments.requests)  # warm up
                engine.turn(1)
            for number in range(arguments.rounds):
                for batch in (1, arguments.requests):
                    order = list(engines) if number % 2 == 0 else list(engines)[::-1]
                    samples.append({"batch": batch} | {name: engines[name].turn(batch) for name in order})
                print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        finally:
            for engine in engines.values():
                engine.stop()
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True, help="no torch.compile")
    parser.add_argument("--visual-tokens", type=int, default=256)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16, help="requests at once")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two short rounds, nothing to quote")
    parser.add_argument("--note", default="", help="what no program can find out, for the record")
    parser.add_argument("--out", type=Path, help="where to write the result; default: benchmarks/results/serve")
    parser.add_argument("--show", nargs="+", type=Path, help="print earlier results")
    arguments = parser.parse_args()
    if arguments.show:
        for file in arguments.show:
            show(json.loads(file.read_text()))
        return None
    if arguments.quick:
        arguments.rounds, arguments.requests, arguments.new_tokens, arguments.visual_tokens = 2, 4, 8, 16
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from shared.measuring import conditions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = ["src/keepsight/serve/vllm", "src/keepsight/pvm", "benchmarks/serve_vllm.py"]
    described = conditions("benchmarks/serve_vllm.py", sys.argv[1:], measured, device, arguments.note)
    import vllm

    described |= {"vllm": vllm.__version__, "threads": os.environ.get("OMP_NUM_THREADS")}
    result = {"conditions": described} | measure(arguments)
    show(result)
    name = f"vllm-{arguments.shape}-{arguments.dtype}{'-eager' if arguments.eager else '-compiled'}.json"
    if arguments.out is None and arguments.quick:
        return None
    out = arguments.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")
    return None


if __name__ == "__main__":
    main()
