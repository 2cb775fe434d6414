"""The `grpo` half of train.py: a step of VisMem's stage I against one of TRL's stock GRPOTrainer.

Both write the same prompts' completions by transformers' own generation, score them with the same reward and take one
AdamW step on everything that was written. Rows never end early, so every step has the same tokens. VisMem's own work on
top: two memories per trajectory are formed twice (while writing, and with gradients), and, where dS is wanted, every
trajectory is written once more without memory from its first invocation on.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from shared.shapes import build_config

from keepsight.compat import checkpointing_arguments
from keepsight.errors import KeepsightWarning
from keepsight.lab.narration import VOCABULARY
from keepsight.lab.reference import build_tokenizer
from keepsight.train.rewards.rewards import Reward
from keepsight.train.vismem.settings import FormationSettings
from keepsight.train.vismem.stages import FormationStage
from keepsight.train.vismem.trainer import VisMemTrainer
from keepsight.vismem import MemoryPolicy, VisMemConfig, add_memory_tokens
from training.stepping import peak_bytes, time_in_turn

REFERENCE = "trl"
SHAPES = {"tiny": "tiny-qwen2.5-vl", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
TEMPLATE = (
    "{%- for message in messages -%}{%- if message['content'] is string -%}{{ ' ' + message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else -%}{{ ' ' + part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ ' :' }}{%- endif -%}"
)


def build_processor(vocabulary: int, visual_tokens: int) -> Any:
    """A Qwen2.5-VL processor with as many words as the model's embedding has rows; every image becomes one size."""
    words = [*VOCABULARY, *(f"w{index}" for index in range(len(VOCABULARY), vocabulary - 4))]
    pixels = visual_tokens * 28 * 28
    geometry: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    geometry |= {"size": {"shortest_edge": pixels, "longest_edge": pixels}}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**geometry),
        tokenizer=build_tokenizer(words),
        video_processor=transformers.Qwen2VLVideoProcessor(**geometry),
        chat_template=TEMPLATE,
    )


def build_base(shape: str, processor: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A Qwen2.5-VL with random weights that knows the processor's special tokens and never ends a text."""
    config = build_config(SHAPES[shape])
    ids = processor.tokenizer.convert_tokens_to_ids
    for name, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        setattr(config, name, ids(token))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(processor.tokenizer, name))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = transformers.AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval()


def any_score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A number from 0 to 1 that depends on every word and means nothing."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [int.from_bytes(hashlib.blake2b(str(t).encode(), digest_size=2).digest(), "big") / 65535 for t in texts]


class TwoMemories(FormationStage):
    """Stage I with a short-term memory after a third of the words, and a long-term one after two thirds."""

    def policy(self, progress: float) -> MemoryPolicy:
        words = self.settings.max_new_tokens
        return MemoryPolicy("forced", at={words // 3: "short", 2 * words // 3: "long"})


def vismem_trainer(
    base: Any, processor: Any, samples: list[dict[str, Any]], args: argparse.Namespace, gain: str
) -> VisMemTrainer:
    """A trainer of stage I whose steps are `step(0)`, `step(1)`, ..."""
    own = VisMemConfig(max_invocations=2)
    add_memory_tokens(processor, own)
    model = get_peft_model(base, own)
    rows = args.batch * args.group
    settings = FormationSettings(
        batch_size=args.batch,
        group_size=args.group,
        gain=gain,  # type: ignore[arg-type]
        max_new_tokens=args.text_tokens,
        rows_per_rollout=rows,
        rows_per_forward=rows,
        gradient_checkpointing=args.checkpointing,
        device=args.device,
        max_steps=10**6,
        warmup_ratio=0,
        scheduler="constant",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KeepsightWarning)
        return VisMemTrainer(model, processor, samples, [Reward("any", 1.0, any_score)], TwoMemories(model, settings))


def trl_trainer(base: Any, processor: Any, samples: list[dict[str, Any]], args: argparse.Namespace, words: int) -> Any:
    """TRL's GRPOTrainer on a LoRA, that writes `words` tokens per completion."""
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, rows = processor.tokenizer, args.batch * args.group
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    never = [tokenizer.convert_tokens_to_ids(name) for name in names]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="keepsight-benchmark-"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=args.group,
        max_completion_length=words,
        beta=0.015,
        temperature=1.0,
        generation_kwargs={"suppress_tokens": [*never, tokenizer.eos_token_id], "min_new_tokens": words},
        **checkpointing_arguments(GRPOConfig, args.checkpointing),
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        report_to="none",
        max_steps=10**6,
        lr_scheduler_type="constant",
        disable_tqdm=True,
    )
    path = r".*language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
    trainer = GRPOTrainer(
        model=base,
        args=config,
        reward_funcs=any_score,
        train_dataset=datasets.Dataset.from_list([{"prompt": s["messages"]} for s in samples]),
        processing_class=processor,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=path),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_step(trainer: Any, samples: list[dict[str, Any]], group: int) -> Callable[[], None]:
    """One optimiser step of TRL's trainer, rollout included."""
    rows = [{"prompt": sample["trl"]} for sample in samples for _ in range(group)]
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def step() -> None:
        trainer.training_step(trainer.model, list(rows), None)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    return step


def vismem_step(trainer: VisMemTrainer) -> Callable[[], None]:
    """One step of stage I."""

    def step() -> None:
        trainer.step(trainer.state.global_step)
        trainer.state.global_step += 1

    return step


def make_samples(args: argparse.Namespace) -> list[dict[str, Any]]:
    """`batch` prompts of one image and a question; for TRL the image stands in the message."""
    generator = np.random.default_rng(0)
    side = round(28 * args.visual_tokens**0.5)
    found = []
    for _ in range(args.batch):
        image = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        text = {"type": "text", "text": "read and describe"}
        found.append(
            {
                "messages": [{"role": "user", "content": [{"type": "image"}, text]}],
                "images": [image],
                "trl": [{"role": "user", "content": [{"type": "image", "image": image}, text]}],
            }
        )
    return found


def measure(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, Any]]:
    """(seconds by variant, peak bytes by variant, facts)."""
    words, rows, samples = args.text_tokens, args.batch * args.group, make_samples(args)
    processor = build_processor(build_config(SHAPES[args.shape]).text_config.vocab_size, args.visual_tokens)
    base = build_base(args.shape, processor, dtype, device)
    shared = {id(p): p for p in base.parameters()}

    def again() -> Any:
        return copy.deepcopy(base, dict(shared))

    own = {f"vismem-{gain}": vismem_trainer(again(), processor, samples, args, gain) for gain in ("replay", "score")}
    steps = {name: vismem_step(trainer) for name, trainer in own.items()}
    written = {}
    for name, trainer in own.items():
        steps[name]()
        written[name] = trainer.state.tokens_generated / rows
    lengths = {"trl": words, "trl-equal": round(written["vismem-replay"])}
    stock = {name: trl_trainer(again(), processor, samples, args, length) for name, length in lengths.items()}
    steps = {name: trl_step(trainer, samples, args.group) for name, trainer in stock.items()} | steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples_seconds = time_in_turn(steps, device, args.repeats, args.warmup)
        peaks = {}
        for name, step in steps.items():
            with peak_bytes(device) as read:
                step()
                peaks[name] = read()
    facts = {
        "trained": {
            name: sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            for name, trainer in (*stock.items(), *own.items())
        },
        "group": args.group,
        "positions_written_per_trajectory": lengths | written,
        "memories_per_trajectory": 2,
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "attention": base.config.text_config._attn_implementation,
    }
    return samples_seconds, peaks, facts
