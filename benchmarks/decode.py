"""What a persistent visual memory costs per decoded token.

Three models with the same weights decode in turn, within one run, so that whatever the machine does hits all alike:

    base          the plain model: no hooks, no memory
    pvm           keepsight's PVM: visual keys and values projected once, read from the KV cache
    reprojected   the same PVM, but every step projects all visual tokens again in every block, as the published code
                  does. It exists in the benchmark only, and must give pvm's logits before anything is timed.
    beside        with --graph: pvm with its branches on a second stream, beside the feed-forward networks; must give
                  pvm's logits to the bit
    fused         with --graph: pvm's branches as six kernels each; must give pvm's logits in float32
    fused-beside  with --graph: both; must give those of fused to the bit

Weights are random and the vision tower is replaced by precomputed embeddings: neither changes what a decode step does.

    python benchmarks/decode.py --shape 8b --visual-tokens 256 1024 4096 16384             # eager
    python benchmarks/decode.py --shape 8b --visual-tokens 256 1024 4096 16384 --compile   # static cache, CUDA graphs
    python benchmarks/decode.py --shape 8b --graph [--batch 16]                            # the step captured by hand
    python benchmarks/decode.py --quick                                                    # smoke run, seconds

Raw samples and conditions go to benchmarks/results/decode/NAME.json; benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shared.decoding import SCOPES, SHAPES, Decoder, GraphDecoder, blocks_of, build_models, make_prompt
from shared.measuring import OperationCounter, ceilings, conditions, make_console, place, spread

VARIANTS = ("base", "pvm", "reprojected")
RESULTS = Path(__file__).parent / "results" / "decode"
MEASURED = (
    "src/keepsight/pvm",
    "src/keepsight/backbone",
    "benchmarks/decode.py",
    "benchmarks/shared/decoding.py",
    "benchmarks/shared/measuring.py",
)
CHECK_STEPS = 3
TOLERANCE = 1e-4  # of the largest logit, in float32


# --- measuring -------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_variants(shape: Any, visual_tokens: int, text_tokens: int, device: torch.device) -> dict[str, float]:
    """Same tokens into all variants: reprojected must give pvm's logits, and the memory must do something.

    In float32, on the first layers of the shape with a small vocabulary: at many visual tokens, bfloat16 rounds by more
    than a memory of gate 0.1 moves the logits.

    Raises:
        RuntimeError: if either does not hold; nothing is timed then.
    """
    small = replace(shape, num_hidden_layers=min(shape.num_hidden_layers, 4), vocab_size=1024)
    models = build_models(small, torch.float32, device)
    decoders = make_decoders(
        models, visual_tokens, text_tokens, 1, CHECK_STEPS, device, Decoder, None, static=False, scopes=("fused",)
    )
    tokens = [decoders["pvm"].token + i for i in range(CHECK_STEPS)]
    logits = {name: torch.cat([decoder.step(token).clone() for token in tokens]) for name, decoder in decoders.items()}
    scale = logits["pvm"].abs().max().item()
    difference = (logits["pvm"] - logits["reprojected"]).abs().max().item()
    effect = (logits["pvm"] - logits["base"]).abs().max().item()
    of_fused = (logits["pvm"] - logits["fused"]).abs().max().item()
    if not of_fused <= TOLERANCE * scale:
        raise RuntimeError(f"fused logits differ from pvm's by {of_fused:.3g} (largest logit {scale:.3g}).")
    if device.type == "cuda" and not decoders["fused"].fuses():
        raise RuntimeError("these blocks have no fused form here, so what would be timed as fused is pvm.")
    if not difference <= TOLERANCE * scale:
        raise RuntimeError(f"reprojected logits differ from pvm's by {difference:.3g} (largest logit {scale:.3g}).")
    if not effect > 4 * difference:
        raise RuntimeError(f"the memory changes logits by {effect:.3g} only: it is not being read, or hardly.")
    return {
        "layers": small.num_hidden_layers,
        "dtype": "float32",
        "steps": CHECK_STEPS,
        "largest_logit": scale,
        "max_difference_pvm_reprojected": difference,
        "max_difference_pvm_fused": of_fused,
        "fused": decoders["fused"].fuses(),  # or, on a CPU that interprets no kernels, pvm again
        "max_difference_pvm_base": effect,
    }


def check_effect(decoders: dict[str, Decoder]) -> float:
    """How far the memory moves the logits of the models that are timed; 0 is an error."""
    token = decoders["pvm"].token.clone()
    steps = {name: decoders[name].step(token).float().clone() for name in decoders}
    effect = (steps["pvm"] - steps["base"]).abs().max().item()
    if not effect > 0:
        raise RuntimeError("pvm's logits are the base's: its memory is not being read, so nothing is timed.")
    for beside, plain in (("beside", "pvm"), ("fused-beside", "fused")):
        if beside in steps and not torch.equal(steps[beside], steps[plain]):
            raise RuntimeError("on a second stream the memory gives other logits than in order, so nothing is timed.")
    return effect


def time_turns(
    decoders: dict[str, Decoder], device: torch.device, repeats: int, steps: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds per token of every turn: `repeats` rounds, in each of which every variant decodes `steps` tokens.

    The order rotates from round to round. Each turn is one sample: the device is waited for at its ends only. On a GPU
    the time is the device's own, between two events.
    """
    samples: dict[str, list[float]] = {name: [] for name in decoders}
    names = list(decoders)
    for _ in range(warmup):
        for decoder in decoders.values():
            decoder.step()
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(milliseconds(decoders[name], steps, device) / steps)
    return samples


def milliseconds(decoder: Decoder, steps: int, device: torch.device) -> float:
    """What some steps take."""
    synchronize(device)
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(steps):
            decoder.step()
        last.record()
        synchronize(device)
        return first.elapsed_time(last)
    begin = time.perf_counter()
    for _ in range(steps):
        decoder.step()
    return (time.perf_counter() - begin) * 1e3


def count_operations(decoder: Decoder, device: torch.device) -> dict[str, int]:
    """Operations of one step: at the dispatcher, and on a GPU the kernels that ran, a graph's as well."""
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


def bytes_moved(decoders: dict[str, Decoder], length: int) -> dict[str, Any]:
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
        projecting += once + size([decoders["pvm"].packed])
    total = weights + cached * length
    return {
        "base": total,
        "pvm": total + read + states,
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


def make_decoders(
    models: tuple[Any, Any],
    visual_tokens: int,
    text_tokens: int,
    batch: int,
    steps: int,
    device: torch.device,
    kind: type[Decoder],
    mode: str | None,
    static: bool,
    scopes: Sequence[str] = (),
) -> dict[str, Decoder]:
    """Every variant behind the same prompt, with room for `steps` more tokens; pvm again in each of `scopes`."""
    base, pvm = models
    g = torch.Generator().manual_seed(1)
    hidden = base.config.text_config.hidden_size
    embeds = torch.randn(visual_tokens, hidden, generator=g).to(device, base.dtype)
    inputs = make_prompt(visual_tokens, text_tokens, device, batch)
    room = inputs["input_ids"].shape[1] + steps
    how = (inputs, embeds, room, mode, static)
    plain = {name: kind(base if name == "base" else pvm, *how, name == "reprojected") for name in VARIANTS}
    return plain | {name: kind(pvm, *how, scope=SCOPES[name]) for name in scopes}


def measure(models: tuple[Any, Any], visual_tokens: int, args: argparse.Namespace, device: torch.device) -> dict:
    checked = check_variants(SHAPES[args.shape], visual_tokens, args.text_tokens, device)
    steps = (
        10 + args.warmup + args.repeats * args.steps
    )  # 10: checks, counts, and what is run before a graph is captured
    torch._dynamo.reset()
    begin = time.perf_counter()
    kind = GraphDecoder if args.graph else Decoder
    decoders = make_decoders(
        models,
        visual_tokens,
        args.text_tokens,
        args.batch,
        steps,
        device,
        kind,
        args.mode,
        args.static,
        tuple(SCOPES) if args.graph else (),
    )
    synchronize(device)
    prefill = time.perf_counter() - begin
    checked["max_difference_pvm_base_as_timed"] = check_effect(decoders)
    samples = time_turns(decoders, device, args.repeats, args.steps, args.warmup)
    floor = bytes_moved(decoders, decoders["base"].max_length)
    result = {
        "visual_tokens": visual_tokens,
        "prompt_tokens": decoders["base"].start,
        "seconds_of_prefill_all_variants": prefill,
        "logits_check": checked,
        "samples_ms_per_token": samples,
        "summary": summarise(samples),
        "bytes_floor": floor,
    }
    if args.mode is None and (device.type == "cuda" or not args.graph):
        result["operations_per_step"] = {name: count_operations(d, device) for name, d in decoders.items()}
    return result


# --- output ------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    where, setup = report["conditions"], report["settings"]
    console.print(
        f"{setup['shape']} shape, {setup['dtype']}, {setup['mode']}, {setup['cache']} cache, batch {setup['batch']}, "
        "on "
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
    for result in report["results"]:
        for name in SCOPES:
            if name in result["summary"]["ratio_to_base"]:
                ratio = quartiles(result["summary"]["ratio_to_base"][name], ".4f")
                console.print(f"{result['visual_tokens']} visual tokens, {name} / base: {ratio}", markup=False)
    best = report.get("ceilings")
    if best is not None:
        speed = best["copy_bytes_per_second"]
        shares = ", ".join(
            f"{r['visual_tokens']}: "
            + " / ".join(
                f"{1e3 * r['bytes_floor'][n] / speed / r['summary']['ms_per_token'][v]['median']:.0%}"
                for n, v in (("base", "base"), ("pvm", "pvm"))
            )
            for r in report["results"]
            if "pvm" in r["bytes_floor"]
        )
        console.print(
            f"A large copy moved {speed / 1e9:,.0f} GB/s and a large matmul made "
            f"{best['matmul_operations_per_second'] / 1e12:,.1f} TFLOP/s in this run. Share of the time that moving "
            f"the bytes of a step takes at that speed, base / pvm: {shares}."
        )
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
    parser.add_argument("--graph", action="store_true", help="static cache, the step captured in a CUDA graph by hand")
    parser.add_argument("--batch", type=int, default=1, help="rows, each with the same prompt (default: 1)")
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
    args.repeats = args.repeats or (3 if args.quick else 25 if args.graph else 9)
    args.dtype = args.dtype or ("float32" if args.shape == "tiny" else "bfloat16")
    args.static = args.static or args.compile or args.graph
    if args.graph and args.compile:
        parser.error("--graph captures the eager step; leave --compile out.")
    gpu = torch.device(args.device).type == "cuda"
    args.mode = ("reduce-overhead" if gpu else "default") if args.compile else None
    kind = "compiled" if args.compile else "graph" if args.graph else "eager-static" if args.static else "eager"
    rows = f"-batch{args.batch}" if args.batch > 1 else ""
    args.name = args.name or f"{torch.device(args.device).type}-{args.shape}-{args.dtype}-{kind}{rows}"
    if min(*args.visual_tokens, args.steps, args.repeats, args.batch) < 1 or args.text_tokens < 2:
        parser.error("--visual-tokens, --steps, --repeats and --batch are at least 1, --text-tokens at least 2.")
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
            "mode": (
                f"torch.compile(mode={args.mode!r}, fullgraph=True)"
                if args.compile
                else ("captured graph" if device.type == "cuda" else "rehearsal of a graph: not captured on a CPU")
                if args.graph
                else "eager"
            ),
            "cache": "static" if args.static else "dynamic",
            "batch": args.batch,
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
    report["ceilings"] = ceilings(device)
    report["results"] = []
    file = place(args.out, args.name, args.quick)
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
