#!/usr/bin/env bash
# PVM, stage 2, on one 24 GB GPU: GRPO on the memory and a LoRA of Qwen3-VL-8B, whose base is held in four bits.
# Base: Qwen/Qwen3-VL-8B-Instruct
#
# - starts from the memory of qwen3-vl-8b-sft*.sh; a LoRA of rank 16 on the language model's linear maps
# - --load-in-4bit: the decoder's linear maps packed (NF4, double quantisation), vision encoder, embeddings and head in
#   bfloat16, memory and LoRA in float32. The paper trains all of a whole base; this is ours
# - 64 completions per step, 8 per question, of at most 1,024 tokens; 8 are written at a time
# - lr 1e-5 instead of 1e-6, as is usual for a LoRA (ours)
# Needs bitsandbytes: pip install -e ".[4bit]". Packed bases are tested on a CPU with tiny models.
# NOT TESTED on a GPU; what it needs is estimated in recipes/README.md.
#
#   recipes/pvm/qwen3-vl-8b-grpo-24gb.sh my-memory questions.jsonl refined
set -euo pipefail
MEMORY=${1:?the folder of stage 1}
DATA=${2:?questions with answers and images}
OUT=${3:?a folder for the result}
keepsight train pvm-grpo "$MEMORY" \
  --data "$DATA" --output-dir "$OUT" \
  --policy lora --lora-rank 16 --lr 1e-5 --scheduler constant --epochs 1 \
  --group-size 8 --temperature 1.0 --top-p 1.0 --max-new-tokens 1024 --kl 0 --mask-truncated \
  --reward format=0.1 --reward answer=0.9 \
  --batch-size 1 --grad-accum 64 --rows-per-rollout 8 --text-only skip \
  --load-in-4bit --dtype bfloat16 --bf16 --gradient-checkpointing \
  --save-steps 20 --keep-checkpoints 2
