#!/usr/bin/env bash
# PVM, stage 1, as the paper ran it: supervised alignment of a memory on a frozen Qwen3-VL-4B, 8 GPUs.
# Base: Qwen/Qwen3-VL-4B-Instruct
# Source: arXiv 2605.00814, section 5 (training details).
#
# - memory: layers 5,11,17, latent width 512 (22,728,963 parameters); base, vision encoder and projector frozen
# - data: the paper filtered 526k visually centred samples from OpenMMReasoner-SFT-874K; bring yours as chats with
#   images (docs/train.md), and look at them first: keepsight data check DATA --model MODEL
# - AdamW, lr 1e-4, cosine, warm-up 0.1, one epoch, 64 samples per step = 1 x 8 accumulation x 8 GPUs
# - bf16 and gradient checkpointing (both are the default on a GPU), DeepSpeed ZeRO-2
# - ours, not the paper's: the gates learn 10 x faster (--gate-lr-multiplier 1 gives the plain recipe)
# In our lab this recipe alone did not form the look-up in 200 steps; --blindfold-steps 200 did (docs/lab.md).
#
#   recipes/pvm/qwen3-vl-4b-sft.sh train.jsonl my-memory
set -euo pipefail
DATA=${1:?a data file, a dataset folder or a hub id}
OUT=${2:?a folder for the result}
accelerate launch --config_file "$(dirname "$0")/../accelerate/deepspeed_zero2.yaml" -m keepsight.cli train pvm Qwen/Qwen3-VL-4B-Instruct \
  --data "$DATA" --output-dir "$OUT" \
  --layers 5,11,17 --width 512 --published-rule \
  --lr 1e-4 --scheduler cosine --warmup-ratio 0.1 --epochs 1 \
  --batch-size 1 --grad-accum 8 \
  --bf16 --gradient-checkpointing \
  --save-steps 500 --keep-checkpoints 3 --workers 4
