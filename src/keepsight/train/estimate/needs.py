"""Memory per device, tokens and operations per step, from a traced step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from keepsight.backbone import Backbone
from keepsight.train.estimate.tracing import Trace, trace
from keepsight.train.run.engines import Engine
from keepsight.train.run.flops import ModelShape
from keepsight.train.run.four_bit import BYTES_PER_WEIGHT
from keepsight.words import duration

GIB = 2**30
CARDS = {"24 GB": 22.5, "40 GB": 39.4, "48 GB": 44.4, "80 GB": 79.2}
"""GPUs by name, with what the smallest of that name offers, in GiB."""
SPARE = 3.0
"""GiB left for CUDA, the vision encoder while it runs, and fragments."""

S = TypeVar("S")


def runs_on_gpu(settings: Any) -> bool:
    """Whether a dry run is of a run on a GPU: it is, wherever it is made, unless the settings ask for a CPU."""
    return settings.device != "cpu"


def as_on_gpu(settings: S) -> S:
    """Settings of a PVM's run as they are on a GPU with bfloat16, unless they ask for a CPU."""
    if not runs_on_gpu(settings):
        return settings
    left = {name: True for name in ("bf16", "gradient_checkpointing") if getattr(settings, name) is None}
    return replace(settings, **left)  # type: ignore[type-var]


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
        on_gpu: whether the run is one on GPUs.
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
    on_gpu: bool = True

    def fits(self) -> str:
        """Which GPUs hold it, for people."""
        needed, words = self.need.total / GIB, []
        for name, size in CARDS.items():
            answer = "yes" if needed + SPARE <= size else "barely" if needed <= size else "no"
            words.append(f"{name}: {answer}")
        words[0] += f", {needed:.1f} GiB"
        return f"{'; '.join(words)}"

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
            ("runs on", "a GPU that has bfloat16 (assumed; --device cpu for a CPU)" if self.on_gpu else "a CPU"),
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
            *([("fits", f"{self.fits()} (yes: with {SPARE:g} GiB to spare)")] if self.on_gpu else []),
            (
                "traced step",
                f"decoder forward and backward on shapes ({self.rows} x {self.length:,}): "
                f"{self.traced.flops / 1e12:.4g} TFLOP as torch counts; "
                + (f"NO GRADIENT for {untrained}" if untrained else "every trained tensor gets a gradient"),
            ),
        ]


def estimate(
    source: str,
    model: Any,
    settings: Any,
    length: int,
    visual: int,
    generated: int,
    what: str,
    engine: Engine,
    stored: int,
    packed: int = 0,
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
        packed: how many of them are held in four bits instead.
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
        weights=round((weight_bytes(frozen, stored, packed) + count * size) / spread),
        gradients=count * size // (share if engine.name != "zero1" else 1),
        optimiser=(8 * count + master) // share,
        activations=traced.checkpointed if settings.checkpoints_gradients else traced.kept,
        activations_plain=traced.kept,
        activations_checkpointed=traced.checkpointed,
        cache=cache_bytes(backbone, settings.rollouts, whole, stored) if generated else 0,
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
        on_gpu=runs_on_gpu(settings),
    )


def weight_bytes(frozen: int, stored: int, packed: int) -> int:
    """Bytes of so many frozen weights, `stored` bytes each but for those that are packed in four bits."""
    return (frozen - packed) * stored + round(packed * BYTES_PER_WEIGHT)


def cache_bytes(backbone: Backbone, rows: int, length: int, size: int) -> int:
    """Bytes of the keys and values of `rows` rows of `length` positions, in numbers of `size` bytes."""
    text = backbone.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = sum(map(Backbone.has_softmax_attention, backbone.layers))
    return 2 * rows * length * layers * text.num_key_value_heads * head_dim * size
