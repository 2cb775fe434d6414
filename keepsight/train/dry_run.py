"""What a run would need, found without reading a weight: parameters, memory, tokens, and one step traced on shapes.

The model is built on torch's meta device, from its config.json alone: every tensor has its shape and dtype and no
values. What is to be learned is put on it as in training, and the decoder's forward and backward run there. So the
trace goes through the real code: it counts the operations, and the bytes that the backward pass keeps.

Not traced: the vision encoder (frozen, it keeps nothing; its operations are counted from its weights), the head (TRL
computes the loss in chunks), allocator overhead and CUDA's own memory (about 1 GiB).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from keepsight.backbone import Backbone
from keepsight.bases import base_config
from keepsight.errors import KeepsightError
from keepsight.pvm.hooks import MEMORY
from keepsight.pvm.tuner import PvmBranch
from keepsight.train.accounting import duration
from keepsight.train.engines import Engine
from keepsight.train.flops import ModelShape
from keepsight.train.learner import Learner
from keepsight.train.settings import GrpoSettings, RunSettings

GIB = 2**30
DEFAULT_TOKENS = 2048


class SeenImage:
    """Stands for the visual memory of one image per row in a trace: M rows of the decoder's width, seen by all text."""

    visual_mask = None

    def __init__(self, embeds: torch.Tensor):
        self.embeds = embeds

    def states(self, name: str, project: Callable[[torch.Tensor], Any]) -> Any:
        """Keys and values of a block."""
        return project(self.embeds)

    def view(self, length: int, causal: bool) -> tuple[None, None]:
        """Nothing is hidden."""
        return None, None


@dataclass(frozen=True)
class Trace:
    """One forward and backward of the decoder, on shapes.

    Attributes:
        flops: operations, as torch counts them (attention over the full square, which causal kernels halve).
        kept: bytes that the forward keeps for the backward, without checkpointing.
        layers: decoder layers.
        learning: decoder layers that the backward passes through.
        boundary: bytes of one layer's input, which is all that checkpointing keeps of a layer.
        untrained: trained tensors that got no gradient; none, if all is well.
    """

    flops: float
    kept: int
    layers: int
    learning: int
    boundary: int
    untrained: tuple[str, ...]

    @property
    def checkpointed(self) -> int:
        """Bytes that checkpointing keeps: every layer's input, and all of one layer while it is recomputed."""
        return self.layers * self.boundary + math.ceil(self.kept / max(1, self.learning))


def trace(model: Any, rows: int, length: int, visual: int) -> Trace:
    """Run the decoder forward and backward on the meta device.

    Args:
        model: on the meta device, with what is learned on it and `requires_grad` as in training.
        rows: B.
        length: T, positions of a row.
        visual: M, visual tokens of a row.
    """
    from torch.utils.flop_counter import FlopCounterMode

    backbone = Backbone.of(model)
    first: Any = backbone.layers[0]
    dtype: torch.dtype = first.post_attention_layernorm.weight.dtype
    width = backbone.text_config.hidden_size
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Kernels never keep the square of attention; torch takes the plain formula on the meta device, which does.
        square = tensor.dim() >= 3 and tensor.shape[-2] == length and tensor.shape[-1] in (length, visual)
        if storage._cdata not in weights and not square:
            kept[storage._cdata] = storage
        return tensor

    arguments: dict[str, Any] = {}
    if any(isinstance(module, PvmBranch) for module in backbone.decoder.modules()):
        arguments[MEMORY] = SeenImage(torch.empty(rows, visual, width, dtype=dtype, device="meta"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    was_training = model.training
    model.train()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        embeds = torch.empty(rows, length, width, dtype=dtype, requires_grad=_needs_input_gradient(backbone))
        if "mrope" in str(getattr(backbone.text_config, "rope_parameters", "")):
            arguments["position_ids"] = torch.arange(length).expand(3, rows, -1)
        else:  # a finished mask keeps the decoder from looking for packed samples, which would need values
            arguments["attention_mask"] = torch.ones(rows, 1, length, length, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            try:
                states = backbone.decoder(inputs_embeds=embeds, use_cache=False, **arguments)
            except RuntimeError as error:
                if "BF16" not in str(error):
                    raise
                raise KeepsightError(
                    "This torch can trace a mixture of experts in bfloat16 only. Give --bf16 (or --dtype bfloat16), as "
                    "on a GPU, or use a newer torch (2.15 can do without)."
                ) from error
        loss = backbone.model.get_output_embeddings()(states.last_hidden_state).sum()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    model.train(was_training)
    unused = [
        name
        for (name, _), gradient in zip(trained.items(), found, strict=True)
        if gradient is None and "embed_tokens" not in name  # its rows are looked up before the decoder
    ]
    return Trace(
        flops=float(counter.get_total_flops()),
        kept=sum(storage.nbytes() for storage in kept.values()),
        layers=len(backbone.layers),
        learning=round(ModelShape.of(model).trained_depth * len(backbone.layers)),
        boundary=rows * length * width * dtype.itemsize,
        untrained=tuple(unused),
    )


def _needs_input_gradient(backbone: Backbone) -> bool:
    return any(parameter.requires_grad for parameter in backbone.model.get_input_embeddings().parameters())


@dataclass(frozen=True)
class Need:
    """What one device holds while a run trains, in bytes.

    Attributes:
        weights: of the model, adapters included.
        gradients: of what is trained.
        optimiser: AdamW's two moments (and float32 copies, where an engine keeps them).
        activations: what the backward needs, as the run is set.
        activations_plain, activations_checkpointed: without and with gradient checkpointing.
        cache: keys and values of a rollout, which is over before the backward starts; 0 in supervised training.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    activations_plain: int
    activations_checkpointed: int
    cache: int = 0

    @property
    def total(self) -> int:
        """The most that is held at a time."""
        return self.weights + self.gradients + self.optimiser + max(self.activations, self.cache)


@dataclass(frozen=True)
class DryRun:
    """What a run would need.

    Attributes:
        source: the base.
        learner: what is trained, in words.
        trained, total: parameters.
        need: bytes on one device.
        rows, length, visual: of one forward: samples, positions, visual tokens of each.
        generated: tokens of the completion among `length`; 0 in supervised training.
        tokens_per_step: by all devices.
        flops_per_step: by all devices, by shapes; rollouts included.
        traced: the traced step.
        engine: that the run was launched with.
    """

    source: str
    learner: str
    trained: int
    total: int
    need: Need
    rows: int
    length: int
    visual: int
    generated: int
    tokens_per_step: int
    flops_per_step: float
    traced: Trace
    engine: Engine

    def seconds_per_step(self, flops_per_second: float) -> float:
        """Time of a step on devices that reach so many operations per second, each (H100 in bf16: about 4e14)."""
        return self.flops_per_step / self.engine.processes / flops_per_second

    def rows_of_table(self) -> list[tuple[str, str]]:
        """What to print."""
        need, engine = self.need, self.engine
        where = "" if engine.name == "single" else f" ({engine.name}, {engine.processes} processes)"
        sample = f"{self.length:,} positions, {self.visual:,} of them visual"
        sample += f", {self.generated:,} generated" if self.generated else ""
        untrained = ", ".join(self.traced.untrained[:3])
        plain, checkpointed = need.activations_plain / GIB, need.activations_checkpointed / GIB
        rows = [
            ("trained", f"{self.trained:,} of {self.total:,} parameters: {self.learner}"),
            ("sample", sample),
            ("tokens per step", f"{self.tokens_per_step:,}"),
            ("operations per step", f"{self.flops_per_step / 1e15:.4g} PFLOP by shapes"),
            ("at 40 % of an H100", f"{duration(self.seconds_per_step(4e14))} per step"),
            ("weights", f"{need.weights / GIB:.2f} GiB per device{where}"),
            ("gradients", f"{need.gradients / GIB:.2f} GiB"),
            ("optimiser", f"{need.optimiser / GIB:.2f} GiB"),
            ("activations", f"{plain:.2f} GiB; {checkpointed:.2f} GiB with gradient checkpointing"),
        ]
        if need.cache:
            rows.append(("rollout", f"{need.cache / GIB:.2f} GiB of keys and values"))
        return [
            *rows,
            ("together", f"{need.total / GIB:.2f} GiB per device, as set; CUDA and fragments come on top"),
            (
                "traced step",
                f"decoder forward and backward on shapes ({self.rows} x {self.length:,}): "
                f"{self.traced.flops / 1e12:.4g} TFLOP as torch counts; "
                + (f"NO GRADIENT for {untrained}" if untrained else "every trained tensor gets a gradient"),
            ),
        ]


def meta_model(source: str | Path, dtype: torch.dtype) -> Any:
    """A base on the meta device, from its config.json alone."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(base_config(source), dtype=dtype)


def dry_run(
    source: str | Path,
    learner: Learner,
    settings: RunSettings,
    *,
    length: int = DEFAULT_TOKENS,
    visual: int | None = None,
    what: str = "the memory",
    engine: Engine | None = None,
    bits: int | None = None,
) -> DryRun:
    """What a run of `train_pvm` or `train_pvm_grpo` would need.

    Args:
        source: the base: a hub id, or a folder that holds at least its config.json.
        learner: what is trained. Adapters are not read: a memory that exists needs what a new one needs.
        settings: of the run (`GrpoSettings` for a run with rollouts).
        length: positions of a sample, images included; of a prompt, where completions are generated.
        visual: how many of them are visual; default: half, at most 1,024.
        what: is trained, in words.
        engine: what shares the work; default: what this process was launched with.
        bits: 4 or 8 for a base quantised to so many.

    Raises:
        UnsupportedModelError, FileNotFoundError: if `source` is no base.
    """
    from keepsight.train.engines import current_engine

    engine = current_engine() if engine is None else engine
    generated = settings.max_new_tokens if isinstance(settings, GrpoSettings) else 0
    half = settings.uses_bf16 or settings.dtype == "bfloat16"
    stored = _stored(source, settings, learner, engine)
    model = meta_model(source, torch.bfloat16 if half else torch.float32)
    with torch.device("meta"):
        put = learner.put_on(model, settings.seed)
    visual = min(1024, length // 2) if visual is None else visual
    if not 0 <= visual < length:
        raise KeepsightError(f"{visual} visual tokens do not fit into {length} positions with text beside them.")
    return estimate(
        str(source), put, settings, length, visual, generated, what, engine, stored if bits is None else bits / 8
    )


def measured(source: str | Path, dataset: Any, split: str = "train", answers: bool = True, most: int = 200) -> Any:
    """(tokens, visual tokens) of the longest among up to `most` samples, evenly spaced.

    Args:
        source: the base, with its processor.
        dataset: whatever `load_dataset_any` reads.
        split: of hub datasets.
        answers: measure prompt and answer; otherwise the prompt.
        most: how many samples to look at.
    """
    from keepsight.train import preflight
    from keepsight.train.collate import ConversationCollator
    from keepsight.train.data import load_dataset_any
    from keepsight.train.images import open_image
    from keepsight.train.samples import check_images, sample_reader, undecoded

    collator = ConversationCollator(preflight.load_processor(source))
    data = load_dataset_any(dataset, split)
    kind: Any = "chat" if answers else "prompt"
    read, rows = sample_reader(data, kind), undecoded(data.rows, kind)
    longest = (0, 0)
    for index in range(0, len(rows), max(1, len(rows) // most)):
        sample = read(rows[index])
        check_images(sample, data.folder, False)
        images = [open_image(image) for image in sample["images"]]
        if answers:
            batch = collator([{"messages": sample["messages"], "images": images}])
            visual = len(collator.visual_positions(batch["input_ids"][0]))
            longest = max(longest, (batch["input_ids"].shape[1], visual))
        else:
            longest = max(longest, collator.prompt_tokens(sample["messages"], images))
    return longest


def _stored(source: str | Path, settings: RunSettings, learner: Learner, engine: Engine) -> float:
    """Bytes of one weight of the base as the run reads it."""
    if settings.dtype != "auto":
        return {"float32": 4.0}.get(settings.dtype, 2.0)
    if learner.policy == "full" and not engine.name.startswith("zero"):
        return 4.0
    recorded = str(getattr(base_config(source), "dtype", None)).removeprefix("torch.")
    return 2.0 if recorded in ("bfloat16", "float16") else 4.0


def estimate(
    source: str,
    model: Any,
    settings: Any,
    length: int,
    visual: int,
    generated: int,
    what: str,
    engine: Engine,
    stored: float,
) -> DryRun:
    """What a run needs that trains `model` as its `requires_grad` says; also for other trainers than PVM's.

    Args:
        source: name of the base.
        model: on the meta device, with what is learned on it.
        settings: with `batch_size`, `grad_accum`, `checkpoints_gradients`; and `rollouts`, where tokens are generated.
        length: positions of a sample or prompt.
        visual: how many of them are visual.
        generated: tokens of a completion.
        what: is trained, in words.
        engine: what shares the work.
        stored: bytes of one frozen weight.
    """
    backbone, shape = Backbone.of(model), ModelShape.of(model)
    whole = length + generated
    # Long sequences are traced on shapes like any other: no value is ever computed.
    traced = trace(model, settings.batch_size, whole, visual)
    named = list(model.named_parameters())
    trained = [p for _, p in named if p.requires_grad]
    frozen = sum(p.numel() for _, p in named if not p.requires_grad)
    count = sum(p.numel() for p in trained)
    share = engine.processes if engine.name in ("zero1", "zero2", "zero3", "fsdp2", "fsdp1") else 1
    spread = engine.processes if engine.shards_weights else 1
    master = 4 * count if engine.name.startswith("zero") and stored == 2 else 0
    size = 2 if master else 4
    need = Need(
        weights=round((frozen * stored + count * size) / spread),
        gradients=count * size // (share if engine.name != "zero1" else 1),
        optimiser=(8 * count + master) // share,
        activations=traced.checkpointed if settings.checkpoints_gradients else traced.kept,
        activations_plain=traced.kept,
        activations_checkpointed=traced.checkpointed,
        cache=_cache(backbone, settings.rollouts, whole, stored) if generated else 0,
    )
    forwards = settings.grad_accum * engine.processes
    patches = settings.batch_size * visual * backbone.merge_side**2
    flops = shape.train(settings.batch_size, whole, patches, settings.checkpoints_gradients)
    flops += shape.forward(settings.batch_size, whole, patches) if generated else 0.0
    return DryRun(
        source=source,
        learner=what,
        trained=count,
        total=frozen + count,
        need=need,
        rows=settings.batch_size,
        length=whole,
        visual=visual,
        generated=generated,
        tokens_per_step=settings.batch_size * whole * forwards,
        flops_per_step=flops * forwards,
        traced=traced,
        engine=engine,
    )


def _cache(backbone: Backbone, rows: int, length: int, size: float) -> int:
    text = backbone.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = sum(map(Backbone.has_softmax_attention, backbone.layers))
    return round(
        2 * rows * length * layers * text.num_key_value_heads * head_dim * min(size, 2.0 if size == 2 else 4.0)
    )


def print_dry_run(found: DryRun) -> Any:
    """A `rich` table of a dry run."""
    from rich.table import Table

    title = f"Dry run on {found.source} (estimates; no weights were read)"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.rows_of_table():
        table.add_row(name, value)
    return table
