"""What a latent vision memory costs per sample.

One model writes the same number of text tokens in turn, within one run, so that whatever the machine does hits all
alike:

    plain              transformers' own generate, memory off
    literal, k         k memories, short and long in turn, evenly spaced; each a pass over everything seen

Weights are random: what is written differs, what it costs does not. Memory positions come on top of the text tokens.

    python benchmarks/vismem.py --shape 7b --visual-tokens 256 1024 4096 --batch 1 16       # needs a GPU with 40 GB
    python benchmarks/vismem.py --quick                                                     # smoke run, seconds

Raw samples and conditions go to benchmarks/results/vismem/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.table import Table
from shared.measuring import conditions, make_console, place, spread
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from keepsight.errors import KeepsightWarning
from keepsight.vismem import MemoryPolicy, VisMemBranch, VisMemConfig
from keepsight.vismem.formers import Formers

RESULTS = Path(__file__).parent / "results" / "vismem"
MEASURED = ("src/keepsight/vismem", "src/keepsight/backbone", "benchmarks/vismem.py", "benchmarks/shared/measuring.py")
IMAGE, VIDEO, START, END = 10, 11, 12, 13


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5-VL. 3b and 7b are the released models' own; their vision encoders are alike but for the projector."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vision_size: int = 1280
    vision_depth: int = 32
    vision_heads: int = 16
    vision_intermediate: int = 3420
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)
    vocabulary: int = 151936


SHAPES = {
    "tiny": Shape(256, 4, 4, 2, 704, 128, 4, 4, 344, (1, 3), 4096),
    "3b": Shape(2048, 36, 16, 2, 11008),
    "7b": Shape(3584, 28, 28, 4, 18944, vocabulary=152064),
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype, text_states: int | None) -> Any:
    """The model with a memory."""
    head = shape.hidden_size // shape.heads
    section = [head // 8, head // 16 * 3, head // 2 - head // 8 - head // 16 * 3]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_size,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden_size,
            "fullatt_block_indexes": list(shape.full_blocks),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    config = VisMemConfig(max_text_states=text_states, max_invocations=64)
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def make_inputs(visual_tokens: int, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`batch` rows of one square image and 32 words."""
    side = int(visual_tokens**0.5)
    if side * side != visual_tokens:
        raise SystemExit(f"--visual-tokens {visual_tokens}: a square number is needed, such as 256, 1024 or 4096.")
    ids = torch.tensor([[START, *[IMAGE] * visual_tokens, END, *range(100, 132)]]).repeat(batch, 1)
    patches = 4 * visual_tokens * batch
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "mm_token_type_ids": (ids == IMAGE).int().to(device),
        "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * batch).to(device),
    }


class FormationTimes:
    """Seconds of every formation while the block runs: (type, rows at once, seconds)."""

    def __init__(self, device: torch.device):
        self.device, self.samples = device, []

    def __enter__(self) -> FormationTimes:
        original, times = Formers.form, self

        def timed(self: Any, kind: str, formations: Any) -> Any:
            times.wait()
            started = time.perf_counter()
            result = original(self, kind, formations)
            times.wait()
            times.samples.append((kind, len(formations), time.perf_counter() - started))
            return result

        self._original, Formers.form = original, timed
        return self

    def __exit__(self, *error: Any) -> None:
        Formers.form = self._original

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def plan(count: int, tokens: int, config: VisMemConfig) -> tuple[MemoryPolicy | str, int]:
    """Where `count` memories go in `tokens` text tokens, and the positions they take."""
    places = [(i + 1) * tokens // (count + 1) for i in range(count)]
    kinds = [("short", "long")[i % 2] for i in range(count)]
    extra = sum({"short": config.num_short, "long": config.num_long}[kind] + 2 for kind in kinds)
    return MemoryPolicy("forced", at=dict(zip(places, kinds, strict=True))), extra


def run(model: Any, inputs: dict[str, torch.Tensor], variant: tuple[str, int], tokens: int) -> dict[str, Any]:
    """One sample of one variant."""
    form, count = variant
    branch, device = VisMemBranch.of(model), inputs["input_ids"].device
    policy: MemoryPolicy | str = "off"
    extra = 0
    if form != "plain":
        policy, extra = plan(count, tokens, branch.config)
    with FormationTimes(device) as formations:
        formations.wait()
        started = time.perf_counter()
        out = model.generate(**inputs, memory=policy, max_new_tokens=tokens + extra, do_sample=False)
        formations.wait()
        seconds = time.perf_counter() - started
    new = out.shape[1] - inputs["input_ids"].shape[1]
    assert new == tokens + extra, (new, tokens, extra)
    assert len(formations.samples) == count
    return {"seconds": seconds, "formations": formations.samples}


Rows = list[dict[str, Any]]


def measure(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, keep: Callable[[Rows], None]
) -> Rows:
    """All rows of the table; `keep` gets those so far whenever a prompt is done: a stopped run keeps what it has."""
    model = build(SHAPES[arguments.shape], device, dtype, arguments.max_text_states)
    variants = [("plain", 0), *(("literal", count) for count in arguments.invocations)]
    results = []
    for batch in arguments.batch:
        for visual in arguments.visual_tokens:
            inputs = make_inputs(visual, batch, device, dtype)
            samples: dict[tuple[str, int], list[dict[str, Any]]] = {variant: [] for variant in variants}
            for variant in (("plain", 0), ("literal", max(arguments.invocations))):
                run(model, inputs, variant, arguments.tokens)  # warm-up
            for round_ in range(arguments.repeats):
                turn = round_ % len(variants)
                for variant in (*variants[turn:], *variants[:turn]):
                    samples[variant].append(run(model, inputs, variant, arguments.tokens))
            for (form, count), found in samples.items():
                ratios = [a["seconds"] / b["seconds"] for a, b in zip(found, samples["plain", 0], strict=True)]
                results.append(
                    {
                        "form": form,
                        "invocations": count,
                        "visual_tokens": visual,
                        "batch": batch,
                        "seconds": spread([s["seconds"] for s in found]),
                        "ratio_to_plain": spread(ratios),
                        "first_and_later_formation_ms": _formation_ms(found),
                        "samples": found,
                    }
                )
                print(f"{form} {count} invocations, {visual} visual, batch {batch}: done", file=sys.stderr)
            keep(results)
    return results


def _formation_ms(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median milliseconds of the first formation of each type in a sample, and of the later ones."""
    result: dict[str, dict[str, float]] = {}
    for kind in ("short", "long"):
        for name, pick in (("first", slice(0, 1)), ("later", slice(1, None))):
            times = [t for s in found for t in [x[2] for x in s["formations"] if x[0] == kind][pick]]
            if times:
                result.setdefault(kind, {})[name] = spread(times)["median"] * 1000
    return result


def show(result: dict[str, Any]) -> None:
    """The table of one result file."""
    found = result["conditions"]
    table = Table(title=f"{result['arguments']['shape']}, {result['arguments']['dtype']}, {found['device']}")
    for column in (
        "visual",
        "batch",
        "form",
        "memories",
        "s / sample",
        "x plain",
        "short ms (first, later)",
        "long ms",
    ):
        table.add_column(column, justify="right")
    for row in result["results"]:
        ms = row["first_and_later_formation_ms"]
        table.add_row(
            str(row["visual_tokens"]),
            str(row["batch"]),
            row["form"],
            str(row["invocations"]),
            f"{row['seconds']['median']:.3f}",
            f"{row['ratio_to_plain']['median']:.3f}",
            *(", ".join(f"{v:.1f}" for v in ms.get(kind, {}).values()) for kind in ("short", "long")),
        )
    make_console().print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--invocations", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--max-text-states", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    parser.add_argument("--note", default="")
    parser.add_argument("--quick", action="store_true", help="does it run? Nothing to quote")
    parser.add_argument("--show", nargs="+", type=Path, help="print the tables of result files")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", KeepsightWarning)  # random weights, and said so
    if arguments.show:
        for path in arguments.show:
            show(json.loads(path.read_text()))
        return
    if arguments.quick:
        arguments.visual_tokens, arguments.invocations, arguments.tokens, arguments.repeats = [64], [0, 2], 24, 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    arguments.dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    given = sys.argv[1:] if argv is None else argv
    found = conditions("benchmarks/vismem.py", given, MEASURED, device, arguments.note)
    options = {k: v for k, v in vars(arguments).items() if k not in ("show", "name", "out")}
    result = {
        "conditions": found,
        "arguments": options,
        "shape": asdict(SHAPES[arguments.shape]),
        "results": [],
    }
    name = arguments.name or f"{device.type}-{arguments.shape}-{arguments.dtype}"
    file = place(arguments.out, name, arguments.quick)

    def keep(rows: Rows) -> None:
        file.write_text(json.dumps(result | {"results": rows}, indent=1) + "\n")

    result["results"] = measure(arguments, device, getattr(torch, arguments.dtype), keep)
    show(result)
    print(f"Raw samples: {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
