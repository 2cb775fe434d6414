"""Engines of vLLM that take turns, each in a process of its own, and what the scripts that time them are asked."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1]
RESULTS = FOLDER / "results" / "serve"
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


class Engine:
    """An engine in a process of its own.

    Args:
        folder: the model's.
        options: the worker's.
        script: the benchmark whose worker it is, of this folder.
    """

    def __init__(self, folder: Path, options: dict[str, Any], script: str):
        self.process = subprocess.Popen(
            [sys.executable, str(FOLDER / script), "--worker", str(folder), json.dumps(options)],
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


@contextlib.contextmanager
def running(folders: dict[str, Path], options: dict[str, dict[str, Any]], script: str) -> Iterator[dict[str, Engine]]:
    """Engines by name, of folders and options by the same names; stopped at the end whatever happens."""
    engines = {name: Engine(folder, options[name], script) for name, folder in folders.items()}
    try:
        for engine in engines.values():
            engine.wait()
        yield engines
    finally:
        for engine in engines.values():
            engine.stop()


def only_answers() -> Any:
    """Where a worker answers: stdout, to which vLLM prints too, so that it gets stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def noise(options: dict[str, Any]) -> Any:
    """Images of as many visual tokens as asked for, one a request: [requests, side, side, 3]."""
    import numpy as np

    side = 32 * round(options["visual_tokens"] ** 0.5)
    return np.random.default_rng(0).integers(0, 255, (options["requests"], side, side, 3), dtype=np.uint8)


# --- the script ------------------------------------------------------------------


def make_parser(doc: str, **defaults: int) -> argparse.ArgumentParser:
    """The options of both scripts; `defaults` are those of the four sizes and of the rounds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True, help="no torch.compile")
    parser.add_argument("--visual-tokens", type=int)
    parser.add_argument("--text-tokens", type=int)
    parser.add_argument("--new-tokens", type=int, help="positions, memories included")
    parser.add_argument("--requests", type=int, help="requests at once")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="two short rounds, nothing to quote")
    parser.add_argument("--note", default="", help="what no program can find out, for the record")
    parser.add_argument("--out", type=Path, help="where to write the result; default: benchmarks/results/serve")
    parser.add_argument("--show", nargs="+", type=Path, help="print earlier results")
    parser.set_defaults(**defaults)
    return parser


def run(
    parser: argparse.ArgumentParser,
    script: str,
    measured: list[str],
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    kind: str,
    quick: dict[str, int],
) -> None:
    """Measure and write, or show what was written.

    Args:
        parser: `make_parser`'s.
        script: in this folder.
        measured: the paths whose code is timed.
        measure: what the script measures: {"options", "samples", "summary"}.
        show: prints a result.
        kind: how names of result files begin.
        quick: the options of a quick run.
    """
    arguments = parser.parse_args()
    if arguments.show:
        for file in arguments.show:
            show(json.loads(file.read_text()))
        return
    if arguments.quick:
        vars(arguments).update(quick)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import vllm

    from shared.measuring import conditions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = f"benchmarks/{script}"
    described = conditions(
        path, sys.argv[1:], [*measured, path, "benchmarks/shared/engines.py"], device, arguments.note
    )
    described |= {"vllm": vllm.__version__, "threads": os.environ.get("OMP_NUM_THREADS")}
    result = {"conditions": described} | measure(arguments)
    show(result)
    if arguments.out is None and arguments.quick:
        return
    name = f"{kind}-{arguments.shape}-{arguments.dtype}{'-eager' if arguments.eager else '-compiled'}.json"
    out = arguments.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")
