#!/usr/bin/env bash
# PVM, stage 2, on one 80 GB GPU: GRPO on the memory and a LoRA of Qwen3-VL-8B (the paper trains all of it).
# Base: Qwen/Qwen3-VL-8B-Instruct
#
# - starts from the memory of qwen3-vl-8b-sft*.sh; a LoRA of rank 32 on the language model's linear maps
# - 64 completions per step, 8 per question, of at most 4,096 tokens; 32 are written at a time
# - lr 1e-5 instead of 1e-6, as is usual for a LoRA (ours)
# NOT TESTED on a GPU; what it needs is estimated in recipes/README.md.
#
#   recipes/pvm/qwen3-vl-8b-grpo-80gb.sh my-memory questions.jsonl refined
set -euo pipefail
MEMORY=${1:?the folder of stage 1}
DATA=${2:?questions with answers and images}
OUT=${3:?a folder for the result}
keepsight train pvm-grpo "$MEMORY" \
  --data "$DATA" --output-dir "$OUT" \
  --policy lora --lora-rank 32 --lr 1e-5 --scheduler constant --epochs 1 \
  --group-size 8 --temperature 1.0 --top-p 1.0 --max-new-tokens 4096 --kl 0 --mask-truncated \
  --reward format=0.1 --reward answer=0.9 \
  --batch-size 4 --grad-accum 16 --rows-per-rollout 32 --text-only skip \
  --dtype bfloat16 --bf16 --gradient-checkpointing \
  --save-steps 20 --keep-checkpoints 2
