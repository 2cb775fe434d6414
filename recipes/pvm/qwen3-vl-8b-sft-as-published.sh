#!/usr/bin/env bash
# PVM, stage 1, as published: supervised alignment of a memory on a frozen Qwen3-VL-8B, 8 GPUs.
# Base: Qwen/Qwen3-VL-8B-Instruct
# Source: arXiv 2605.00814, section 5 (training details).
#
# - memory: layers 8,16,24, latent width 512 (27,922,179 parameters); base, vision encoder and projector frozen
# - data: the paper filtered 526k visually centred samples from OpenMMReasoner-SFT-874K
# - AdamW, lr 1e-4, cosine, warm-up 0.1, one epoch, 64 samples per step = 1 x 8 accumulation x 8 GPUs
# - bf16, gradient checkpointing, FlashAttention 2 (pip install flash-attn), DeepSpeed ZeRO-2 (pip install deepspeed)
# - --recipe paper: no blindfold, gates at the common rate, the published rule
# In our laboratory the look-up did not form this way (docs/evidence/pvm-length.md), and vLLM cannot serve a memory of the
# published rule. qwen3-vl-8b-sft.sh is what we would run.
# NOT TESTED: no GPU, no step under DeepSpeed (docs/scale.md), no FlashAttention.
#
#   recipes/pvm/qwen3-vl-8b-sft-as-published.sh train.jsonl my-memory
set -euo pipefail
DATA=${1:?a data file, a dataset folder or a hub id}
OUT=${2:?a folder for the result}
accelerate launch --config_file "$(dirname "$0")/../accelerate/deepspeed_zero2.yaml" -m keepsight.cli train pvm Qwen/Qwen3-VL-8B-Instruct \
  --data "$DATA" --output-dir "$OUT" \
  --recipe paper --layers 8,16,24 --width 512 \
  --lr 1e-4 --scheduler cosine --warmup-ratio 0.1 --epochs 1 \
  --batch-size 1 --grad-accum 8 \
  --bf16 --gradient-checkpointing --attention flash_attention_2 \
  --save-steps 500 --keep-checkpoints 3 --workers 4
