"""Training a memory and its controls on the reference VLM: the same data, steps and number of parameters.

The language model is frozen (but for `sft`) and adapters go on by PEFT's public route, so the model that trains is the
model that answers. Every method sees the same batches in the same order; what differs is what its parameters can reach:

    pvm         a branch that attends to the image alone, trained with keepsight's blindfold (not in the paper)
    pvm_plain   the same branch and learning rates without the blindfold (the paper's rates are lower)
    lora        low-rank changes of the language model's own linear maps
    mlp         a parallel feed-forward branch of PVM's size at PVM's layers, which sees no image (the paper's control)
    lora_long   LoRA trained at the length it is asked at
    sft         full fine-tuning: every weight of the language model and no adapter, thus several times the parameters
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from peft import get_peft_model

from keepsight.backbone import Backbone
from keepsight.lab.narration import FACT_LENGTH, Narrations, TrainingText, make_narrations
from keepsight.lab.pretraining import narration_loss
from keepsight.pvm import PvmConfig
from keepsight.pvm.branch import MEMORY
from keepsight.pvm.memory import VisualMemory
from keepsight.pvm.module import PvmBlock
from keepsight.train.pvm.blindfold import BlindfoldSchedule, blindfold
from keepsight.train.run.learner import matched_lora

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)` after every optimiser step."""

METHODS = ("pvm", "pvm_plain", "lora", "mlp", "lora_long")
"""Adapters of equal size."""


@dataclass(frozen=True)
class TrainPlan:
    """The data and the steps that all methods share, and what each needs to learn well. Chosen on validation glyphs.

    Attributes:
        warmup_steps: first steps, on short dense narrations; blindfolded for `pvm` and nothing special for the others.
        steps: further steps, on narrations of up to `train_length` generated tokens.
        blindfold_share: of these further steps, how many are blindfolded for `pvm`. 0: sight comes back at once and for
            good, as in the studies, which were run before it was found that some seeds then lose their look-up again.
        batch: narrations per step.
        facts: facts per narration.
        max_gap: each gap is drawn from 0..max_gap filler words.
        layers, width: PVM's and the parallel MLP's.
        causal: PVM's rule; False is the published one.
        source: what PVM retrieves from: the raw visual "embeddings", or the "hidden" states that the visual positions
            have reached at its layer (the paper's control).
        pvm_lr, mlp_lr, lora_lr: peak learning rates, chosen on validation glyphs (`benchmarks/lab/sweep.py`).
        long_lr: peak learning rate of `lora_long`.
        sft_lr: peak learning rate of `sft`.
        gate_factor: a gate's learning rate is this times that of its branch; it starts at 0 and has far to go.
        lora_targets: the linear maps that LoRA changes, in every decoder layer.
    """

    warmup_steps: int = 120
    steps: int = 200
    blindfold_share: float = 0.0
    batch: int = 16
    facts: int = 12
    max_gap: int = 18
    layers: tuple[int, ...] = (1, 3)
    width: int = 64
    causal: bool = True
    source: Literal["embeddings", "hidden"] = "embeddings"
    pvm_lr: float = 1.2e-2
    mlp_lr: float = 1.5e-3
    lora_lr: float = 1e-4
    long_lr: float = 1e-3
    sft_lr: float = 1e-4
    gate_factor: float = 10.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def train_length(self) -> int:
        """Generated tokens of the longest narration that training can show."""
        return self.facts * (self.max_gap + FACT_LENGTH)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "train_length": self.train_length}


@dataclass(frozen=True)
class TrainStep:
    """What one optimiser step was like.

    Attributes:
        done: steps so far, this one included.
        blindfolded: whether text could not see the image.
        loss: on the batch, before the step.
        accuracy: of the batch's answers, before the step.
        gates: after the step, for the methods that have them.
    """

    done: int
    blindfolded: bool
    loss: float
    accuracy: float
    gates: list[float]


Watch = Callable[[TrainStep], None]
"""Called after every optimiser step."""


@dataclass(frozen=True)
class Trained:
    """An adapter after training.

    Attributes:
        model: the PEFT model (for `sft` the model itself), in eval mode.
        parameters: number of trainable parameters.
        seconds: wall-clock seconds of the training loop, data included.
        final_accuracy: mean accuracy of the answers over the last 20 training steps.
        gates: the gates at the end, for the methods that have them.
    """

    model: Any
    parameters: int
    seconds: float
    final_accuracy: float
    gates: list[float]


def attach(model: Any, method: str, plan: TrainPlan, seed: int) -> Any:
    """Put an untrained adapter on a frozen base, through `peft.get_peft_model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        if method in ("pvm", "pvm_plain", "mlp"):
            branch: Any = "mlp" if method == "mlp" else "memory"
            config = PvmConfig(layers=list(plan.layers), width=plan.width, branch=branch, causal=plan.causal)
            wrapped = get_peft_model(model, config)
            if plan.source == "hidden":
                retrieve_hidden_states(wrapped, plan.layers)
            return wrapped
        if method in ("lora", "lora_long"):
            lora, _ = matched_lora(Backbone.of(model), pvm_size(model, plan), plan.lora_targets)
            return get_peft_model(model, lora)
    if method == "sft":
        model.requires_grad_(False)
        model.model.language_model.requires_grad_(True)
        return model
    raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}, sft.")


def retrieve_hidden_states(model: Any, layers: tuple[int, ...]) -> None:
    """The paper's control for the retrieval source: blocks look at processed states instead of raw embeddings.

    From now on, the block of each layer reads the hidden states that enter its layer at the visual positions. For whole
    sequences only (training, teacher forcing); a cache would remember the wrong thing.
    """
    for index in layers:
        Backbone.of(model).layers[index].register_forward_pre_hook(_hidden_states_as_memory, with_kwargs=True)


def _hidden_states_as_memory(layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    memory = kwargs.get(MEMORY)
    if memory is None or memory.visual_mask is None:
        return None
    states = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, MEMORY: VisualMemory(states, memory.visual_mask)}


def pvm_size(model: Any, plan: TrainPlan) -> int:
    """Parameters of the plan's PVM on this model, counted without building it in memory."""
    config = PvmConfig(layers=list(plan.layers), width=plan.width)
    config.resolve(Backbone.of(model))
    with torch.device("meta"):
        return len(plan.layers) * sum(p.numel() for p in PvmBlock(config.block_shape).parameters())


def training_batch(processor: Any, plan: TrainPlan, step: int, rng: np.random.Generator) -> Narrations:
    """The batch of one step: short and dense during the warm-up, up to `train_length` after it."""
    highest = 4 if step < plan.warmup_steps else plan.max_gap
    gaps = rng.integers(0, highest + 1, plan.facts).tolist()
    return make_narrations(processor, gaps, plan.batch, "train", rng)


def train(
    model: Any,
    processor: Any,
    method: str,
    plan: TrainPlan,
    seed: int,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train one adapter on a base whose own parameters stay frozen.

    Args:
        model: a reference VLM; it is wrapped in place, so give each method its own copy.
        processor: its processor.
        method: one of `METHODS`, or "sft".
        plan: data and steps.
        seed: of initial weights and data; methods with the same plan and seed see the same batches.
        progress, watch: called after every step.
    """
    attached = attach(model, method, plan, seed)

    def batch(step: int, rng: np.random.Generator) -> TrainingText:
        return training_batch(processor, plan, step, rng)

    return fit(attached, method, plan, seed, batch, progress, watch)


def fit(
    model: Any,
    method: str,
    plan: TrainPlan,
    seed: int,
    make_batch: Callable[[int, np.random.Generator], TrainingText],
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train what is trainable of `model` (see `attach`) on the batches that `make_batch(step, rng)` makes.

    `watch` is told about every step and may read with the model in between (see benchmarks/lab/curves.py).
    """
    model.train()
    gates = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith(".gate")]
    others = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".gate")]
    peaks = {"pvm": plan.pvm_lr, "mlp": plan.mlp_lr, "lora": plan.lora_lr, "sft": plan.sft_lr}
    peak = peaks[method.partition("_")[0]]
    groups = [{"params": others, "peak": peak}, {"params": gates, "peak": plan.gate_factor * peak}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=peak, weight_decay=0.0, betas=(0.9, 0.99))
    rng = np.random.default_rng([seed, 5000])
    total = plan.warmup_steps + plan.steps
    schedule = BlindfoldSchedule(plan.warmup_steps, plan.blindfold_share) if method == "pvm" else BlindfoldSchedule()
    recent: list[float] = []
    begin = time.perf_counter()
    for step in range(total):
        pace = min(1.0, (step + 1) / 10) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / total)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * pace
        batch = make_batch(step, rng)
        covered = schedule.covers(step)
        with blindfold(model) if covered else nullcontext():
            logits = model(**batch.model_inputs(), use_cache=False).logits
            loss, right = narration_loss(logits, batch, text_weight=0.1)
            loss.backward()
        torch.nn.utils.clip_grad_norm_([*others, *gates], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(right)
        if progress is not None:
            progress(step + 1, total)
        if watch is not None:
            watch(TrainStep(step + 1, covered, loss.item(), right, [float(p.detach()) for p in gates]))
            model.train()
    return Trained(
        model=model.eval(),
        parameters=sum(p.numel() for p in [*others, *gates]),
        seconds=time.perf_counter() - begin,
        final_accuracy=float(np.mean(recent[-20:])),
        gates=[round(float(p.detach()), 4) for p in gates],
    )


def at_length(plan: TrainPlan, length: int, steps: int, batch: int) -> TrainPlan:
    """The plan of `lora_long`: no warm-up, narrations of up to `length` generated tokens."""
    gap = length // plan.facts - FACT_LENGTH
    return replace(plan, warmup_steps=0, steps=steps, batch=batch, max_gap=gap, lora_lr=plan.long_lr)
