#!/usr/bin/env bash
# PVM, stage 1, on one 80 GB GPU: a memory on a frozen Qwen3-VL-8B.
# Base: Qwen/Qwen3-VL-8B-Instruct
# The set-up of qwen3-vl-8b-sft.sh, with its 64 samples per step made of 8 x 8 accumulation: the paper's, with our blindfold
# warm-up (--recipe paper leaves it out) and the causal rule, so that vLLM can serve the memory.
#
# - the base in bfloat16, the memory in float32; gradient checkpointing; samples of at most 8,192 tokens
# - it fits without packing the base; --load-in-4bit leaves room for longer samples
# NOT TESTED on a GPU; what it needs is estimated in recipes/README.md.
#
#   recipes/pvm/qwen3-vl-8b-sft-80gb.sh train.jsonl my-memory
set -euo pipefail
DATA=${1:?a data file, a dataset folder or a hub id}
OUT=${2:?a folder for the result}
keepsight train pvm Qwen/Qwen3-VL-8B-Instruct \
  --data "$DATA" --output-dir "$OUT" \
  --layers 8,16,24 --width 512 --causal \
  --lr 1e-4 --scheduler cosine --warmup-ratio 0.1 --epochs 1 \
  --batch-size 8 --grad-accum 8 --max-length 8192 --over-long skip \
  --dtype bfloat16 --bf16 --gradient-checkpointing \
  --save-steps 200 --keep-checkpoints 3 --workers 4
