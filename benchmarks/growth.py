"""How the cost of a memory grows: with visual tokens, images, text and batch, from bytes and operations.

Nothing here is timed. Weights are counted on the meta device, at the 8B shape; a step takes at least as long as its
bytes at the GPU's bandwidth and its operations at its speed (the longer of the two), and that floor is what grows. The
same formulas are held against the operations that torch counts while a small model really decodes and forms memories.

    python benchmarks/growth.py            # table and picture: docs/images/growth.png, benchmarks/results/growth.json
    python benchmarks/growth.py --quick    # does it run? Nothing is written but into results/quick

It also asks the dry run what a 72B base with a PVM keeps on each of 8 GPUs (FSDP2), and says what tensor parallelism
adds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from shared.measuring import place
from shared.shapes import build_config, qwen2_5_vl
from torch.utils.flop_counter import FlopCounterMode

import keepsight
from keepsight.backbone import Backbone
from keepsight.errors import KeepsightWarning
from keepsight.pvm.module import PvmBlock
from keepsight.vismem import VisMemBranch, VisMemConfig

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "growth.png"
BANDWIDTH, SPEED = 4.8e12, 989e12  # an H200's data sheet: bytes and dense bfloat16 operations a second
WORDS = 256  # written, in what a VisMem costs
USUAL = {"visual": 1024, "images": 1, "text": 1024, "batch": 1}
AXES = {
    "visual": (256, 1024, 4096, 16384),
    "images": (1, 4, 16, 64),
    "text": (1024, 4096, 16384, 65536),
    "batch": (1, 4, 16, 64),
}
TITLES = {"visual": "visual tokens of an image", "images": "images", "text": "text before", "batch": "batch"}


@dataclass(frozen=True)
class Work:
    """What something moves and computes, at least."""

    bytes: float
    operations: float

    @property
    def seconds(self) -> float:
        """On a GPU that does both at once and neither faster than its data sheet says."""
        return max(self.bytes / BANDWIDTH, self.operations / SPEED)

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Sizes:
    """What arithmetic depends on; weights are numbers of them.

    Attributes:
        text: that every text position is multiplied with, the head included.
        head: of these, the head's: a prompt needs it at its last position only.
        attention: heads x head width over all layers; kv: the same of keys and values together.
        vision, vision_attention: of the vision encoder; merge: patches of a visual token.
        visual_width, width: of a patch and of a token.
        block: of all PVM blocks, for a text position; project: for a visual token.
        block_attention, block_kv: as above, of the blocks.
        positions: Q and M_init of a short memory (in patches) and of a long one.
        low_rank: of their adapters, for a position.
        builder: of the query builder, for a state; builder_attention: its width over its layers.
    """

    text: int
    head: int
    attention: int
    kv: int
    vision: int
    vision_attention: int
    merge: int
    visual_width: int
    width: int
    block: int
    project: int
    block_attention: int
    block_kv: int
    positions: tuple[int, int]
    low_rank: tuple[int, int]
    builder: int
    builder_attention: int

    @classmethod
    def of(cls, config: Any, width: int | None = None) -> Sizes:
        """Of the model that `config` describes, with both memories."""
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(config)
        backbone = Backbone.of(model)
        text, vision = backbone.text_config, config.vision_config
        matrices = [p.numel() for p in backbone.layers.parameters() if p.ndim == 2]
        head = model.get_output_embeddings().weight.numel()
        encoder = sum(p.numel() for p in backbone.vision_tower.blocks.parameters() if p.ndim == 2)
        pvm = keepsight.PvmConfig(width=width)
        pvm.resolve(backbone)
        with torch.device("meta"):
            block = PvmBlock(pvm.block_shape)
        names = {n: p.numel() for n, p in block.named_parameters() if p.ndim == 2}
        project = sum(n for k, n in names.items() if any(part in k for part in ("vision_reducer", "k_proj", "v_proj")))
        count, shape = len(pvm.layers or []), pvm.block_shape
        with torch.device("meta"):
            memory = VisMemBranch.of(get_peft_model(model, VisMemConfig())).active
        settings, layers = VisMemConfig(), len(backbone.layers)
        builder = sum(p.numel() for p in memory.builder.parameters() if p.ndim == 2) - memory.builder.queries.numel()
        return cls(
            text=sum(matrices) + head,
            head=head,
            attention=layers * text.num_attention_heads * text.head_dim,
            kv=2 * layers * text.num_key_value_heads * text.head_dim,
            vision=encoder,
            vision_attention=vision.depth * vision.hidden_size,
            merge=backbone.merge_side**2,
            visual_width=vision.hidden_size,
            width=text.hidden_size,
            block=count * (sum(names.values()) - project),
            project=count * project,
            block_attention=count * shape.width,
            block_kv=count * 2 * shape.num_kv_heads * shape.head_dim,
            positions=(
                settings.num_queries + settings.num_short * backbone.merge_side**2,
                settings.num_queries + settings.num_long,
            ),
            low_rank=tuple(  # type: ignore[arg-type]
                sum(p.numel() for p in bank.parameters()) for bank in (memory.short_bank, memory.long_bank)
            ),
            builder=builder,
            builder_attention=settings.query_layers * memory.builder.reduce.out_features,
        )

    def step(self, length: int, batch: int) -> Work:
        """One decoded token a row, behind `length` positions."""
        cache = batch * length * self.kv
        return Work(2 * (self.text + cache), batch * (2 * self.text + 4 * length * self.attention))

    def prompt(self, length: int, visual: int, images: int, batch: int) -> Work:
        """Reading a prompt of `length` positions, `visual` of them of `images` images."""
        decoder = batch * length * (2 * (self.text - self.head) + 2 * length * self.attention)
        patches = visual * self.merge
        encoder = batch * patches * (2 * self.vision + 4 * patches / images * self.vision_attention)
        return Work(2 * (self.text + self.vision), decoder + encoder)

    def look(self, visual: int, batch: int) -> Work:
        """What a PVM adds to a step."""
        kept = batch * visual * self.block_kv
        return Work(2 * (self.block + kept), batch * (2 * self.block + 4 * visual * self.block_attention))

    def remember(self, visual: int, text: int, batch: int) -> Work:
        """What a PVM adds to a prompt: each visual token is projected, each text position looks."""
        rows = visual * 2 * self.project + text * (2 * self.block + 4 * visual * self.block_attention)
        return Work(2 * (self.block + self.project), batch * rows)

    def form(self, short: bool, visual: int, images: int, thought: int, batch: int) -> Work:
        """Forming one memory a row, from `visual` visual tokens of all its images and `thought` text states."""
        states = visual + thought
        queries = self.positions[1] - VisMemConfig().num_long
        built = (states + queries) * (2 * self.builder + 4 * (states + queries) * self.builder_attention)
        if short:
            patches, own = visual * self.merge, self.positions[0]
            pairs = patches * (patches / images + own) + own * (patches + own)
            ran = (patches + own) * 2 * (self.vision + self.low_rank[0]) + 4 * pairs * self.vision_attention
            return Work(2 * self.vision, batch * (built + ran))
        length, body = states + self.positions[1], self.text - self.head
        ran = length * (2 * (body + self.low_rank[1]) + 2 * length * self.attention)
        return Work(2 * body, batch * (built + ran))


def row(sizes: Sizes, visual: int, images: int, text: int, batch: int) -> dict[str, float]:
    """What both memories add at one point."""
    seen = visual * images
    length = seen + text
    base, added = sizes.step(length, batch), sizes.look(seen, batch)
    prompt = sizes.prompt(length, seen, images, batch)
    memory = sizes.remember(seen, text, batch)
    plain = prompt.seconds + WORDS * sizes.step(length + WORDS // 2, batch).seconds
    thought = WORDS // 3  # two memories, evenly spaced
    short, long = (sizes.form(kind, seen, images, thought, batch).seconds for kind in (True, False))
    # each memory takes two calls more: its invocation token, and its latents at once
    read = 4 * sizes.step(length + WORDS // 2, batch).seconds
    return {
        "step_ms": 1e3 * base.seconds,
        "pvm_step": (base + added).seconds / base.seconds - 1,
        "pvm_prompt": (prompt + memory).seconds / prompt.seconds - 1,
        "pvm_keeps_mib": 2 * batch * seen * sizes.block_kv / 2**20,
        "cache_mib": 2 * batch * length * sizes.kv / 2**20,
        "short_ms": 1e3 * short,
        "long_ms": 1e3 * long,
        "vismem_sample": (short + long + read) / plain,
        "vismem_sample_8": 4 * (short + long + read) / plain,
        "vismem_keeps_mib": 2 * batch * seen * (sizes.width + sizes.merge * sizes.visual_width) / 2**20,
    }


def grow(sizes: Sizes) -> dict[str, list[dict[str, float]]]:
    """Along each axis, the others as usual."""
    return {
        axis: [{"at": value} | row(sizes, **(USUAL | {axis: value})) for value in values]
        for axis, values in AXES.items()
    }


# --- against what torch counts ----------------------------------------------------------------------------------------


def counted(work: Any) -> int:
    """Operations that torch counts in matrix products and attention while `work` runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def check(visual: int, thought: int = 12) -> dict[str, dict[str, float]]:
    """Formula and count, of a small Qwen3-VL: a decoded token without and with PVM, a short and a long memory."""
    from shared.decoding import IMAGE, SHAPES, Decoder, build_models, make_prompt

    from keepsight.vismem.memory import Formation, Sight
    from keepsight.vismem.vision import Patches

    device, found = torch.device("cpu"), {}
    models = build_models(SHAPES["tiny"], torch.float32, device)
    sizes, config = Sizes.of(models[0].config), models[0].config
    inputs, embeds = make_prompt(visual, 32, device), torch.randn(visual, config.text_config.hidden_size)
    length = inputs["input_ids"].shape[1]
    assert int((inputs["input_ids"] == IMAGE).sum()) == visual
    steps = {"step": sizes.step(length + 1, 1), "step with PVM": sizes.step(length + 1, 1) + sizes.look(visual, 1)}
    for (name, work), model in zip(steps.items(), models, strict=True):
        decoder = Decoder(model, inputs, embeds, length + 2, None, False)
        found[name] = {"formula": work.operations, "counted": counted(decoder.step)}

    config = build_config("tiny-qwen3-vl")
    sizes = Sizes.of(config)
    torch.manual_seed(0)
    model = get_peft_model(transformers.AutoModelForImageTextToText.from_config(config).eval(), VisMemConfig())
    branch = VisMemBranch.of(model)
    side = int(visual**0.5) * branch.backbone.merge_side
    places = torch.stack([torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)], -1)
    patches = torch.randn(side * side, sizes.visual_width)
    rotary = branch.formers()._rotary(places, patches)
    seen = Patches(patches, (side * side,), (side * side,), rotary, (side, side))
    formation = Formation(Sight(torch.randn(visual, sizes.width), seen), torch.randn(thought, sizes.width))
    for kind in ("short", "long"):
        formula = sizes.form(kind == "short", visual, 1, thought, 1).operations
        if kind == "long":  # torch counts the whole square of causal attention, of which a kernel computes half
            formula += 2 * (visual + thought + sizes.positions[1]) ** 2 * sizes.attention
        count = counted(lambda kind=kind: branch.formers().form(kind, [formation]))
        found[f"{kind} memory"] = {"formula": formula, "counted": count}
    return found


# --- many devices -----------------------------------------------------------------------------------------------------


def many(devices: int = 8) -> dict[str, Any]:
    """A 72B base with a PVM, trained over so many GPUs: what each keeps, by the dry run, and what is moved."""
    from keepsight.train.estimate.dry_run import dry_run
    from keepsight.train.run.engines import Engine
    from keepsight.train.run.learner import Learner
    from keepsight.train.run.settings import SftSettings

    config = qwen2_5_vl(8192, 29568, (64, 8), (32, 1280, 3456), [7, 15, 23, 31], num_hidden_layers=80)
    config.dtype = torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        learner, settings = Learner(memory=keepsight.PvmConfig()), SftSettings(gradient_checkpointing=True)
        engines = (Engine(), Engine("fsdp2", devices))
        one, shared = (dry_run(folder, learner, settings, length=2048, visual=1024, engine=e) for e in engines)
    text = config.text_config
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_key_value_heads
    weights = one.need.weights
    trained = 4 * one.trained
    share = (devices - 1) / devices
    position = 2 * layers * 2 * hidden * share * 2  # two all-reduces a layer, ring, bfloat16
    return {
        "devices": devices,
        "parameters": one.total,
        "trained": one.trained,
        "one": asdict(one.need) | {"total": one.need.total},
        "fsdp2": asdict(shared.need) | {"total": shared.need.total},
        "fsdp2_moves_per_step": share * (2 * weights + trained),
        "fsdp2_of_which_memory": share * (2 * trained + trained),
        "tp_weights": 2 * (one.total - one.trained) / devices + 2 * one.trained,
        "tp_moves_per_token": position,
        "tp_cache_per_token": 2 * 2 * layers * heads * (hidden // text.num_attention_heads) / devices,
    }


# --- output -----------------------------------------------------------------------------------------------------------


def draw(growth: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Four charts, one per axis: what each memory adds, in per cent of the floor without it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    lines = (
        ("pvm_step", "PVM, a token", "#0e7490", "o"),
        ("pvm_prompt", "PVM, the prompt", "#38bdf8", "s"),
        ("vismem_sample", "VisMem, 2 memories in 256 words", "#c2410c", "^"),
    )
    for axes, (axis, rows) in zip(figure.subplots(1, len(AXES), sharey=True), growth.items(), strict=True):
        at = [r["at"] for r in rows]
        for name, label, color, marker in lines:
            axes.plot(at, [100 * r[name] for r in rows], color=color, marker=marker, label=label, lw=1.8, ms=5)
        axes.set(xscale="log", yscale="log", title=TITLES[axis], xticks=at, xticklabels=[f"{int(n):,}" for n in at])
        axes.minorticks_off()
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("added to the floor, %")
    first.set(yticks=[0.1, 0.3, 1, 3, 10, 30, 100], yticklabels=["0.1", "0.3", "1", "3", "10", "30", "100"])
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(file, dpi=130)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Compute, check, write; returns the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="does it run? Nothing to quote")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", KeepsightWarning)  # random weights, and said so
    sizes = Sizes.of(build_config("tiny-qwen3-vl" if args.quick else "Qwen/Qwen3-VL-8B-Instruct"))
    report: dict[str, Any] = {
        "assumed": {"bytes_per_second": BANDWIDTH, "operations_per_second": SPEED, "words": WORDS, "usual": USUAL},
        "sizes": asdict(sizes),
        "growth": grow(sizes),
        "counted": {str(n): check(n) for n in ((64,) if args.quick else (64, 256, 1024))},
    }
    if not args.quick:
        report["many"] = many()
    file = place(args.out, "growth", args.quick)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report["growth"], file.with_suffix(".png") if args.quick or args.out != RESULTS else PICTURE)
    for size, found in report["counted"].items():
        for name, pair in found.items():
            print(f"{size} visual tokens, {name}: formula / counted = {pair['formula'] / pair['counted']:.4f}")
    print(f"{file}\nThe tables: make docs-figures")
    return report


if __name__ == "__main__":
    main()
