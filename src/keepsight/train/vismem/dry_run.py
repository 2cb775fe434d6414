"""What a run of VisMem's training would need, found without reading a weight.

As for PVM (`estimate/dry_run.py`), with what is VisMem's own: the backward runs through the frozen decoder to the
latents, every memory of a forward is formed in that forward, and most tokens are written, not trained on. The traced
step is the decoder's, from the loss to its input embeddings; forming is estimated from it, in proportion to length.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import get_peft_model

from keepsight.backbone import Backbone
from keepsight.checkpoints.adapters import find_adapter
from keepsight.checkpoints.bases import base_config
from keepsight.checkpoints.sources import check_sources
from keepsight.errors import KeepsightError
from keepsight.train.estimate.dry_run import DEFAULT_TOKENS
from keepsight.train.estimate.needs import DryRun, Need, cache_bytes, runs_on_gpu, weight_bytes
from keepsight.train.estimate.tracing import meta_model, trace
from keepsight.train.run.engines import current_engine
from keepsight.train.run.flops import ModelShape
from keepsight.train.run.four_bit import packed_weights
from keepsight.train.run.learner import lora_targets
from keepsight.train.vismem.settings import InvocationSettings, RlSettings, uses_checkpointing
from keepsight.vismem import VisMemBranch, VisMemConfig

MEMORIES = 2
"""Expected per trajectory."""


class VisMemDryRun(DryRun):
    """What a run would need; its traced step is the decoder's, down to the latents."""

    def rows_of_table(self) -> list[tuple[str, str]]:
        """What to print."""
        step = (
            f"decoder forward and backward to the latents, on shapes ({self.rows} x {self.length:,}): "
            f"{self.traced.flops / 1e12:.4g} TFLOP as torch counts; forming memories is estimated from it"
        )
        return [*super().rows_of_table()[:-1], ("traced step", step)]


def dry_run_vismem(
    source: str | Path,
    settings: RlSettings,
    vismem: VisMemConfig | None = None,
    *,
    length: int = DEFAULT_TOKENS,
    visual: int | None = None,
) -> VisMemDryRun:
    """What a run of `train_vismem_formation` or `train_vismem_invocation` would need.

    Args:
        source: a base (its config.json will do), or a VisMem adapter on it.
        settings: of the stage. The run is one on a GPU, wherever this is called, unless they ask for a CPU.
        vismem: the memory; default: the adapter's, or `VisMemConfig()`.
        length: positions of a prompt.
        visual: how many of them are visual; default: half, at most 1,024.

    Raises:
        UnsupportedModelError, FileNotFoundError: if `source` is no base.
    """
    name, config = _base_and_memory(source, vismem)
    visual = min(1024, length // 2) if visual is None else visual
    if not 0 <= visual < length:
        raise KeepsightError(f"{visual} visual tokens do not fit into {length} positions with text beside them.")
    recorded = str(getattr(base_config(name), "dtype", None)).removeprefix("torch.")
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and recorded in ("bfloat16", "float16"))
    dtype, stored = (torch.bfloat16, 2) if half else (torch.float32, 4)
    base = meta_model(name, dtype, settings.attention == "eager")
    packed = packed_weights(Backbone.of(base)) if settings.load_in_4bit else 0
    with torch.device("meta"):
        model = get_peft_model(base, config)
    backbone, memory = Backbone.of(model), VisMemBranch.of(model).active
    is_second = isinstance(settings, InvocationSettings)
    trained = sum(p.numel() for n, p in memory.named_parameters() if n.startswith("rows.") == is_second)
    what = "the special tokens' rows" if is_second else "the memory (query builder, both formers, M_init, gains)"
    if isinstance(settings, InvocationSettings) and settings.train == "lora":
        what += " and a LoRA on the policy"
        trained += settings.lora_rank * sum(lora_targets(backbone, ("q_proj", "v_proj")).values())
    memory_size = sum(p.numel() for p in memory.parameters())
    frozen = sum(p.numel() for p in model.parameters()) - memory_size

    rows, latents = settings.rows_per_forward, MEMORIES * (2 + max(config.num_short, config.num_long))
    whole = length + settings.max_new_tokens + latents
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    table = backbone.model.get_input_embeddings().weight
    table.requires_grad_(True)  # stands for the latents: the backward goes down to the inputs
    traced = trace(model, rows, whole, visual)
    seen = visual + min(config.max_text_states or settings.max_new_tokens // MEMORIES, settings.max_new_tokens)
    forming = 0.0 if is_second else rows * MEMORIES * (seen + config.num_queries + config.num_long) / (rows * whole)
    checkpoints = uses_checkpointing(settings, runs_on_gpu(settings))
    logits = rows * (settings.max_new_tokens + latents) * backbone.text_config.vocab_size * (stored + 3 * 4)
    plain, checkpointed = (round(kept * (1 + forming)) + logits for kept in (traced.kept, traced.checkpointed))
    shape = ModelShape.of(model)
    table.requires_grad_(False)
    trajectories = settings.batch_size * settings.group_size
    need = Need(
        weights=weight_bytes(frozen, stored, packed) + 4 * (memory_size + (trained if is_second else 0)),
        gradients=4 * trained,
        optimiser=8 * trained + (4 * trained if is_second and settings.kl else 0),  # and the reference's copy
        activations=checkpointed if checkpoints else plain,
        activations_plain=plain,
        activations_checkpointed=checkpointed,
        cache=cache_bytes(backbone, settings.rows_per_rollout, whole, stored),
    )
    patches = visual * backbone.merge_side**2
    forward = shape.forward(1, whole, patches)
    again = 1 + checkpoints
    counterfactuals = (settings.gain == "replay") + (is_second and settings.alpha > 0)  # type: ignore[attr-defined]
    flops = forward * (1 + counterfactuals)  # writing
    flops += forward * bool(settings.kl)  # the reference
    flops += shape.decoder(1, whole) * (1 + again) * settings.iterations + 2.0 * shape.vision * patches
    flops += forming * shape.decoder(1, whole) * (1 + again) * settings.iterations
    flops += MEMORIES * shape.decoder(1, seen) / 2 + MEMORIES * 2.0 * shape.vision * patches / 2  # forming, one of two
    return VisMemDryRun(
        source=str(source),
        learner=what,
        trained=trained,
        total=frozen + memory_size + (trained if is_second and settings.train == "lora" else 0),  # type: ignore[attr-defined]
        need=need,
        rows=rows,
        length=whole,
        visual=visual,
        generated=settings.max_new_tokens + latents,
        tokens_per_step=trajectories * whole,
        flops_per_step=flops * trajectories,
        traced=traced,
        engine=current_engine(),
        on_gpu=runs_on_gpu(settings),
    )


def _base_and_memory(source: str | Path, vismem: VisMemConfig | None) -> tuple[str, VisMemConfig]:
    if find_adapter(source) is None:
        return str(source), copy.deepcopy(vismem) if vismem is not None else VisMemConfig()
    base, infos = check_sources(source)
    if infos[0].method != "VISMEM":
        raise KeepsightError(f"{source} is a {infos[0].method} adapter; expected a VisMem adapter.")
    return base, VisMemConfig.from_pretrained(str(infos[0].path))
