#!/usr/bin/env bash
# PVM, stage 2, with the settings that the paper gives: GRPO on the language model and the memory of Qwen3-VL-8B, 8 GPUs.
# Base: Qwen/Qwen3-VL-8B-Instruct
# Source: arXiv 2605.00814, section 5 (training details).
#
# - starts from the memory that qwen3-vl-8b-sft.sh has made; the vision encoder stays frozen
# - data: 3.6k hard questions with answers in the paper (MMK12, ThinkLite-VL-hard, ViRL39K, We-Math2.0-Pro)
# - AdamW, lr 1e-6, constant; 64 completions per step, 8 per question, temperature 1, up to 16,384 tokens, no KL,
#   completions that were cut off masked; rewards 0.1 for the format and 0.9 for the answer
# - bf16, gradient checkpointing, DeepSpeed ZeRO-3. Every sample needs an image (ZeRO-3 spreads the vision encoder, so a
#   process without one would keep the others waiting)
# - sdpa; the paper has FlashAttention 2: add --attention flash_attention_2, with pip install flash-attn
# NOT TESTED: no GPU, and no step under DeepSpeed (docs/scale.md).
# Rollouts are transformers' own: most of a step's time. --max-new-tokens 4096 and --rows-per-rollout are the levers.
#
#   recipes/pvm/qwen3-vl-8b-grpo.sh my-memory questions.jsonl refined
set -euo pipefail
MEMORY=${1:?the folder of stage 1}
DATA=${2:?questions with answers and images}
OUT=${3:?a folder for the result}
accelerate launch --config_file "$(dirname "$0")/../accelerate/deepspeed_zero3.yaml" -m keepsight.cli train pvm-grpo "$MEMORY" \
  --data "$DATA" --output-dir "$OUT" \
  --policy full --lr 1e-6 --scheduler constant --epochs 1 \
  --group-size 8 --temperature 1.0 --top-p 1.0 --max-new-tokens 16384 --kl 0 --mask-truncated \
  --reward format=0.1 --reward answer=0.9 \
  --batch-size 1 --grad-accum 8 --text-only skip \
  --bf16 --gradient-checkpointing \
  --save-steps 20 --keep-checkpoints 2
