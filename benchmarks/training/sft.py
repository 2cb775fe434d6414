"""The `sft` half of train.py: PVM against PEFT LoRA and the parallel MLP, all with as many parameters."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import get_peft_model
from shared.shapes import build_config
from trl.trainer.utils import add_fused_lm_head

import keepsight
from keepsight.backbone import Backbone
from keepsight.compat import enable_checkpointing
from keepsight.train.run.learner import matched_lora
from keepsight.train.run.trainer import stop_below_learners
from training.stepping import peak_bytes, time_in_turn

REFERENCE = "lora"
SHAPES = {"tiny": "tiny-qwen3-vl", "4b": "Qwen/Qwen3-VL-4B-Instruct", "8b": "Qwen/Qwen3-VL-8B-Instruct"}


def build_base(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A Qwen3-VL with random weights and TRL's loss head."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            base = transformers.AutoModelForImageTextToText.from_config(build_config(SHAPES[shape]))
    finally:
        torch.set_default_dtype(before)
    return base


def build_variants(base: Any, checkpointing: bool) -> dict[str, Any]:
    """name -> the base (shared by all) with an adapter as training makes it: float32, everything else frozen."""
    found: dict[str, Any] = {}
    shared = {id(p): p for p in base.parameters()}
    for name in ("pvm", "lora", "mlp"):
        model = copy.deepcopy(base, dict(shared))
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as TRL's SFTTrainer does
        if name == "lora":
            config, _ = matched_lora(Backbone.of(model), trained(found["pvm"]))
        else:
            config = keepsight.PvmConfig(branch="memory" if name == "pvm" else "mlp")
        found[name] = get_peft_model(model, config).train()
        with torch.no_grad():
            for key, parameter in found[name].named_parameters():
                if key.endswith(".gate"):
                    parameter.fill_(0.1)  # at 0 all but the gate would have gradients of zero
        if checkpointing:
            enable_checkpointing(found[name])
            stop_below_learners(found[name])  # for all alike, as keepsight's trainer does
    return found


def trained(model: Any) -> int:
    """Parameters that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_batch(config: Any, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Rows of one square image, a question and an answer of the same length; the loss is on the answer."""
    side = round(args.visual_tokens**0.5)
    if side * side != args.visual_tokens:
        raise SystemExit(f"--visual-tokens {args.visual_tokens}: a square number is needed, such as 256 or 1024.")
    marks = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(100, 4000, (args.batch, args.text_tokens), generator=generator)
    image = torch.tensor([marks[0], *[marks[1]] * args.visual_tokens, marks[2]]).expand(args.batch, -1)
    ids = torch.cat([image, words], 1)
    labels = ids.clone()
    labels[:, : -args.text_tokens // 2] = -100
    vision = config.vision_config
    patches = 4 * args.visual_tokens * args.batch
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == marks[1]).int(),
        "pixel_values": torch.randn(
            patches, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=generator
        ).to(dtype),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * args.batch),
        "labels": labels,
    }
    return {name: value.to(device) for name, value in batch.items()}


def make_step(model: Any, batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """One optimiser step, as TRL takes it: fused loss, clipping, AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    autocast = dtype == torch.bfloat16

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = model(**batch, use_cache=False, fused_lm_head=True)
            loss = -out.log_probs.sum() / out.label_mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, Any]]:
    """(seconds by variant, peak bytes by variant, facts)."""
    base = build_base(args.shape, dtype, device)
    models = build_variants(base, args.checkpointing)
    batch = make_batch(base.config, args, device, dtype)
    steps = {name: make_step(model, batch, device, dtype) for name, model in models.items()}
    samples = time_in_turn(steps, device, args.repeats, args.warmup)
    peaks = {}
    for name, step in steps.items():
        with peak_bytes(device) as read:
            step()
            peaks[name] = read()
    facts = {
        "trained": {name: trained(model) for name, model in models.items()},
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "pvm_layers": models["pvm"].peft_config["default"].layers,
        "attention": base.config.text_config._attn_implementation,
    }
    return samples, peaks, facts
