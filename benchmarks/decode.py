"""What a persistent visual memory costs per decoded token.

Three models with the same weights decode in turn, within one run, so that whatever the machine does hits all alike:

    base          the plain model: no hooks, no memory
    pvm           keepsight's PVM: visual keys and values projected once, read from the KV cache
    reprojected   the same PVM, but every step projects all visual tokens again in every block, as the published code
                  does. It exists in this file only, and must give pvm's logits before anything is timed.

Weights are random and the vision tower is replaced by precomputed embeddings: neither changes what a decode step does.

    python benchmarks/decode.py --shape 8b --visual-tokens 256 1024 4096 16384             # eager
    python benchmarks/decode.py --shape 8b --visual-tokens 256 1024 4096 16384 --compile   # static cache, CUDA graphs
    python benchmarks/decode.py --quick                                                    # smoke run, seconds

Raw samples and conditions go to benchmarks/results/decode/NAME.json; benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import OperationCounter, conditions, make_console, spread
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration, StaticCache

import keepsight
from keepsight.backbone import Backbone
from keepsight.pvm import replace_memory
from keepsight.pvm.memory import VisualCacheLayer

VARIANTS = ("base", "pvm", "reprojected")
RESULTS = Path(__file__).parent / "results" / "decode"
MEASURED = ("keepsight/pvm", "keepsight/backbone.py", "benchmarks/decode.py", "benchmarks/measuring.py")
IMAGE, VIDEO, START, END = 10, 11, 12, 13
GATE = 0.1  # any value but 0, at which the logits could not tell the variants apart
CHECK_STEPS = 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}  # of the largest logit


@dataclass(frozen=True)
class Shape:
    """Text model of a Qwen3-VL. 4b and 8b are the released models' own."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool


SHAPES = {
    "tiny": Shape(256, 4, 4, 2, 64, 768, 1024, True),
    "1b": Shape(2048, 16, 16, 8, 128, 6144, 151936, True),
    "4b": Shape(2560, 36, 32, 8, 128, 9728, 151936, True),
    "8b": Shape(4096, 36, 32, 8, 128, 12288, 151936, False),
}


# --- models ----------------------------------------------------------------------------------------------------------


class PrecomputedVision(nn.Module):
    """Stands where the vision tower stood: returns embeddings [M, D] that were made beforehand."""

    spatial_merge_size = 2

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.embeds: torch.Tensor | None = None

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        assert self.embeds is not None
        return BaseModelOutputWithDeepstackFeatures(pooler_output=self.embeds, deepstack_features=[self.embeds] * 3)


def build_models(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Any, Any]:
    """(base, base with PVM), sharing every base parameter; random weights."""
    config = Qwen3VLConfig(
        text_config=asdict(shape)
        | {
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20] if shape.head_dim == 128 else [12, 10, 10],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 1,
            "out_hidden_size": shape.hidden_size,
            "deepstack_visual_indexes": [],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            base = Qwen3VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    base.model.visual = PrecomputedVision(dtype)
    shared = {id(p): p for p in base.parameters()}
    wrapped = get_peft_model(copy.deepcopy(base, shared), keepsight.PvmConfig(), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".pvm_blocks." in name:
                assert parameter.dtype == dtype or parameter.is_meta  # dtype of the base, as keepsight.load does
                if name.endswith(".gate"):
                    parameter.fill_(GATE)
    return base, wrapped.get_base_model()  # generate() of the PEFT wrapper calls the model inside, so this is decoded


def blocks_of(model: Any) -> dict[str, Any]:
    """Name in the cache -> PVM block."""
    return {
        f"{index}.{name}": block
        for index, layer in enumerate(Backbone.of(model).layers)
        if hasattr(layer, "visual_memory")
        for name, block in layer.visual_memory.pvm_blocks.items()
    }


# --- decoding --------------------------------------------------------------------------------------------------------


class Decoder:
    """One variant in the middle of a generation.

    Args:
        model: the model whose steps are timed.
        inputs: the prompt.
        embeds: visual embeddings [M, D].
        max_length: longest sequence (of a static cache).
        compiled: torch.compile mode, or None for eager.
        static: whether the KV cache has a fixed size.
        reproject: project all visual tokens again at every step.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        embeds: torch.Tensor,
        max_length: int,
        compiled: str | None,
        static: bool,
        reproject: bool = False,
    ):
        self.model = model
        self.cache: Any = (
            StaticCache(config=model.config, max_cache_len=max_length) if static else DynamicCache(config=model.config)
        )
        remembered: list[torch.Tensor] = []

        def look(packed: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
            remembered.append(packed)
            return packed

        model.model.visual.embeds = embeds
        with torch.no_grad(), replace_memory(look):
            output = model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(-1)
        self.length = inputs["input_ids"].shape[1]
        delta = int(model.model.rope_deltas.flatten()[0])
        positions = torch.arange(self.length, max_length, device=self.token.device) + delta
        self.positions = positions.view(-1, 1, 1, 1).expand(-1, 3, -1, -1).contiguous().unbind()  # each [3, 1, 1]
        self.start = self.length
        self.graphs = compiled == "reduce-overhead" and self.token.is_cuda

        self.memory = VisualCacheLayer.of(self.cache)
        self.blocks = blocks_of(model)
        assert bool(self.blocks) == (self.memory is not None)
        self.reproject = reproject
        self.packed = remembered[0] if remembered else None
        self.forward: Callable[..., Any] = self._forward
        if compiled is not None:
            self.forward = torch.compile(
                self._forward, mode=None if compiled == "default" else compiled, fullgraph=True, dynamic=False
            )

    def _forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        if self.reproject:
            assert self.memory is not None
            kept = self.memory.states
            self.memory.states = {name: block.project(self.packed) for name, block in self.blocks.items()}
        output = self.model(
            input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        if self.reproject:
            self.memory.states = kept  # or the projections would be outputs of the compiled graph
        return output.logits

    @torch.no_grad()
    def step(self, token: torch.Tensor | None = None) -> torch.Tensor:
        """Decode one token; returns the logits [1, 1, vocabulary] it was chosen from."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        logits = self.forward(self.token if token is None else token, self.positions[self.length - self.start])
        self.token = logits[:, -1:].argmax(-1)
        self.length += 1
        return logits


def make_prompt(visual_tokens: int, text_tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Words, one image of `visual_tokens` tokens, words: `text_tokens` words in all."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(20, 1000, (text_tokens,), generator=g).tolist()
    half = text_tokens // 2
    side = next(s for s in range(int(visual_tokens**0.5), 0, -1) if visual_tokens % s == 0)
    ids = torch.tensor([[*words[:half], START, *[IMAGE] * visual_tokens, END, *words[half:]]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.zeros(1, 1),  # the stand-in for the vision tower does not look at them
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * (visual_tokens // side)]]),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


# --- measuring -------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_logits(decoders: dict[str, Decoder], dtype: torch.dtype) -> dict[str, float]:
    """Same tokens into all variants: reprojected must give pvm's logits, and the memory must do something.

    Raises:
        RuntimeError: if either does not hold; nothing is timed then.
    """
    tokens = [decoders["pvm"].token + i for i in range(CHECK_STEPS)]
    logits = {
        name: torch.cat([decoder.step(token).float().clone() for token in tokens]) for name, decoder in decoders.items()
    }
    scale = logits["pvm"].abs().max().item()
    difference = (logits["pvm"] - logits["reprojected"]).abs().max().item()
    effect = (logits["pvm"] - logits["base"]).abs().max().item()
    if not difference <= TOLERANCE[dtype] * scale:
        raise RuntimeError(f"reprojected logits differ from pvm's by {difference:.3g} (largest logit {scale:.3g}).")
    if not effect > 4 * difference:
        raise RuntimeError(f"the memory changes logits by {effect:.3g} only: it is not being read, or hardly.")
    return {
        "steps": CHECK_STEPS,
        "largest_logit": scale,
        "max_difference_pvm_reprojected": difference,
        "max_difference_pvm_base": effect,
    }


def time_turns(
    decoders: dict[str, Decoder], device: torch.device, repeats: int, steps: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds per token of every turn: `repeats` rounds, in each of which every variant decodes `steps` tokens.

    The order rotates from round to round. Each turn is one sample: the device is waited for at its ends only.
    """
    samples: dict[str, list[float]] = {name: [] for name in decoders}
    names = list(decoders)
    for _ in range(warmup):
        for decoder in decoders.values():
            decoder.step()
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            decoder = decoders[name]
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(steps):
                decoder.step()
            synchronize(device)
            samples[name].append((time.perf_counter() - begin) / steps * 1e3)
    return samples


def count_operations(decoder: Decoder, device: torch.device) -> dict[str, int]:
    """Operations of one eager step: at the dispatcher, and on a GPU the kernels that ran."""
    with OperationCounter() as counter:
        decoder.step()
    counts = {"operations": counter.count}
    if device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
            decoder.step()
            synchronize(device)
        counts["gpu_kernels"] = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in record.events())
    return counts


def bytes_moved(decoders: dict[str, Decoder], visual_tokens: int, length: int) -> dict[str, Any]:
    """The least that one step must read: weights once, KV cache once. No measurement, but arithmetic on the tensors."""

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    base = decoders["base"].model
    embedding = base.get_input_embeddings().weight
    weights = size(base.parameters()) - (0 if base.config.tie_word_embeddings else size([embedding]))
    cached = sum(size([layer.keys, layer.values]) // layer.keys.shape[2] for layer in decoders["base"].cache.layers)
    memory = decoders["pvm"].memory
    assert memory is not None
    states = size(t for pair in memory.states.values() for t in pair)
    read, projecting = 0, 0
    for block in decoders["pvm"].blocks.values():
        once = size([block.vision_reducer.weight, *block.cross_attn.k_proj.parameters()])
        once += size([*block.cross_attn.v_proj.parameters(), block.cross_attn.k_norm.weight])
        read += size(block.parameters()) - once
        projecting += once + visual_tokens * embedding.shape[1] * embedding.element_size()
    total = weights + cached * length
    return {
        "base": total,
        "pvm_adds": read + states,
        "reprojected_adds": read + projecting,
        "pvm_over_base": (total + read + states) / total,
        "reprojected_over_base": (total + read + projecting) / total,
    }


def summarise(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Spread of every variant's ms per token; ratios and differences are of turns of the same round."""
    base = samples["base"]
    return {
        "ms_per_token": {name: spread(values) for name, values in samples.items()},
        "ratio_to_base": {n: spread([a / b for a, b in zip(v, base, strict=True)]) for n, v in samples.items()},
        "added_ms": {n: spread([a - b for a, b in zip(v, base, strict=True)]) for n, v in samples.items()},
    }


def measure(models: tuple[Any, Any], visual_tokens: int, args: argparse.Namespace, device: torch.device) -> dict:
    base, pvm = models
    dtype = base.dtype
    g = torch.Generator().manual_seed(1)
    hidden = base.config.text_config.hidden_size
    embeds = torch.randn(visual_tokens, hidden, generator=g).to(device, dtype)
    inputs = make_prompt(visual_tokens, args.text_tokens, device)
    prompt = inputs["input_ids"].shape[1]
    max_length = prompt + CHECK_STEPS + 2 + args.warmup + args.repeats * args.steps
    torch._dynamo.reset()
    begin = time.perf_counter()
    decoders = {
        name: Decoder(model, inputs, embeds, max_length, args.mode, args.static, reproject=name == "reprojected")
        for name, model in (("base", base), ("pvm", pvm), ("reprojected", pvm))
    }
    synchronize(device)
    prefill = time.perf_counter() - begin
    checked = check_logits(decoders, dtype)
    samples = time_turns(decoders, device, args.repeats, args.steps, args.warmup)
    result = {
        "visual_tokens": visual_tokens,
        "prompt_tokens": prompt,
        "seconds_of_prefill_all_variants": prefill,
        "logits_check": checked,
        "samples_ms_per_token": samples,
        "summary": summarise(samples),
        "bytes_floor": bytes_moved(decoders, visual_tokens, max_length),
    }
    if args.mode is None:
        result["operations_per_step"] = {name: count_operations(d, device) for name, d in decoders.items()}
    return result


# --- output ------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    where, setup = report["conditions"], report["settings"]
    console.print(
        f"{setup['shape']} shape, {setup['dtype']}, {setup['mode']}, {setup['cache']} cache, batch 1, on "
        f"{where['device']} ({where['torch_threads']} torch threads), torch {where['torch']}, "
        f"transformers {where['transformers']}"
    )
    if where["note"]:
        console.print(f"Note: {where['note']}", markup=False)
    table = Table(title="ms per token: min / median / max;  ratio to base: median of paired rounds [quartiles]")
    for column in ("visual tokens", *VARIANTS, "pvm / base", "floor", "reprojected / base", "floor", "pvm adds, ms"):
        table.add_column(column, justify="right")

    def trio(s: dict[str, float], form: str) -> str:
        return " / ".join(format(s[k], form) for k in ("min", "median", "max"))

    def quartiles(s: dict[str, float], form: str) -> str:
        return f"{s['median']:{form}} [{s['q1']:{form}}, {s['q3']:{form}}]"

    for result in report["results"]:
        summary, floor = result["summary"], result["bytes_floor"]
        table.add_row(
            str(result["visual_tokens"]),
            *(trio(summary["ms_per_token"][name], ".2f") for name in VARIANTS),
            quartiles(summary["ratio_to_base"]["pvm"], ".3f"),
            f"{floor['pvm_over_base']:.4f}",
            quartiles(summary["ratio_to_base"]["reprojected"], ".3f"),
            f"{floor['reprojected_over_base']:.4f}",
            quartiles(summary["added_ms"]["pvm"], ".2f"),
        )
    console.print(table)
    console.print(
        "floor: the ratio if reading weights and caches were all that takes time; computed from tensor sizes, not "
        "measured. Where launches or arithmetic dominate, a ratio can fall below it."
    )
    for result in report["results"]:
        if "operations_per_step" in result:
            counts = ", ".join(f"{n} {c}" for n, c in result["operations_per_step"].items())
            console.print(f"{result['visual_tokens']} visual tokens, one step: {counts}", markup=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="text model (default: 8b on a GPU, tiny without)")
    parser.add_argument("--visual-tokens", type=int, nargs="+", metavar="M", help="default: 256 1024 4096 16384")
    parser.add_argument("--text-tokens", type=int, default=64, help="words in the prompt (default: 64)")
    parser.add_argument("--steps", type=int, help="tokens per turn, i.e. per sample (default: 16)")
    parser.add_argument("--repeats", type=int, help="rounds in which every variant has one turn (default: 9)")
    parser.add_argument("--warmup", type=int, default=4, help="untimed steps per variant before the first round")
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph) with a static cache")
    parser.add_argument("--static", action="store_true", help="static cache in eager mode too")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 (tiny: float32)")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU (default: torch's own choice)")
    parser.add_argument("--name", help="of the result file (default: DEVICE-SHAPE-DTYPE-MODE)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    parser.add_argument("--note", default="", help="a condition to record, e.g. that the machine was shared")
    parser.add_argument(
        "--show", type=Path, nargs="+", metavar="FILE", help="print earlier results instead of measuring"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shape, few steps: does it run? No result to quote")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.shape = args.shape or ("tiny" if args.quick or args.device == "cpu" else "8b")
    args.visual_tokens = args.visual_tokens or ([16, 64] if args.quick else [256, 1024, 4096, 16384])
    args.steps = args.steps or (2 if args.quick else 16)
    args.repeats = args.repeats or (3 if args.quick else 9)
    args.dtype = args.dtype or ("float32" if args.shape == "tiny" else "bfloat16")
    args.static = args.static or args.compile
    gpu = torch.device(args.device).type == "cuda"
    args.mode = ("reduce-overhead" if gpu else "default") if args.compile else None
    kind = "compiled" if args.compile else "eager-static" if args.static else "eager"
    args.name = (
        args.name
        or f"{'quick-' if args.quick else ''}{torch.device(args.device).type}-{args.shape}-{args.dtype}-{kind}"
    )
    if min(*args.visual_tokens, args.steps, args.repeats) < 1 or args.text_tokens < 2:
        parser.error("--visual-tokens, --steps and --repeats are at least 1, --text-tokens at least 2.")
    return args


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, write the result file, print the table; returns the file."""
    args = parse(argv)
    if args.show:
        for file in args.show:
            show(json.loads(file.read_text()), make_console())
        return args.show[-1]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape, console = SHAPES[args.shape], make_console()
    report: dict[str, Any] = {
        "benchmark": "decode",
        "quick": args.quick,
        "conditions": conditions(
            "benchmarks/decode.py", list(sys.argv[1:] if argv is None else argv), MEASURED, device, args.note
        ),
        "settings": {
            "shape": args.shape,
            "text_model": asdict(shape),
            "dtype": args.dtype,
            "mode": f"torch.compile(mode={args.mode!r}, fullgraph=True)" if args.compile else "eager",
            "cache": "static" if args.static else "dynamic",
            "batch": 1,
            "text_tokens": args.text_tokens,
            "steps_per_sample": args.steps,
            "rounds": args.repeats,
            "warmup_steps": args.warmup,
        },
    }
    models = build_models(shape, dtype, device)
    blocks = blocks_of(models[1])
    report["settings"] |= {
        "base_parameters": sum(p.numel() for p in models[0].parameters()),
        "pvm_parameters": sum(p.numel() for block in blocks.values() for p in block.parameters()),
        "pvm_layers": [int(name.partition(".")[0]) for name in blocks],
        "pvm_width": next(iter(blocks.values())).shape.width,
        "attention": models[0].config.text_config._attn_implementation,
    }
    report["results"] = []
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.name}.json"
    for visual_tokens in args.visual_tokens:
        console.print(f"{visual_tokens} visual tokens ...", style="dim")
        report["results"].append(measure(models, visual_tokens, args, device))
        report["conditions"]["load_average_at_end"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
        file.write_text(json.dumps(report, indent=1) + "\n")  # after each row: an interrupted run keeps what it has
    show(report, console)
    console.print(f"Raw samples: {file}", markup=False)
    return file


if __name__ == "__main__":
    main()
