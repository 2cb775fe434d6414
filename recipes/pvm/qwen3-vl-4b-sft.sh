#!/usr/bin/env bash
# PVM, stage 1, on 8 GPUs: supervised alignment of a memory on a frozen Qwen3-VL-4B, the paper's set-up with our warm-up.
# Base: Qwen/Qwen3-VL-4B-Instruct
# Source: arXiv 2605.00814, section 5 (training details), and docs/lab.md (the blindfold).
#
# - memory: layers 5,11,17, latent width 512 (22,728,963 parameters); base, vision encoder and projector frozen
# - data: the paper filtered 526k visually centred samples from OpenMMReasoner-SFT-874K; bring yours as chats with
#   images (docs/train.md), and look at them first: keepsight data check DATA --model MODEL
# - AdamW, lr 1e-4, cosine, warm-up 0.1, one epoch, 64 samples per step = 1 x 8 accumulation x 8 GPUs
# - bf16 and gradient checkpointing (both are the default on a GPU)
# - ours, not the paper's: blindfolded are the first three eighths of the steps and every second one after them; the gates
#   learn 10 x faster; the causal rule, so that vLLM can serve the memory; data parallel instead of DeepSpeed ZeRO-2 (a
#   memory's gradients and moments are small); sdpa instead of FlashAttention 2, which takes no blindfold
# As published, without the blindfold: --recipe paper (qwen3-vl-8b-sft-as-published.sh does it for the 8B model).
# NOT TESTED on GPUs; what it needs is estimated in recipes/README.md.
#
#   recipes/pvm/qwen3-vl-4b-sft.sh train.jsonl my-memory
set -euo pipefail
DATA=${1:?a data file, a dataset folder or a hub id}
OUT=${2:?a folder for the result}
accelerate launch --config_file "$(dirname "$0")/../accelerate/ddp.yaml" -m keepsight.cli train pvm Qwen/Qwen3-VL-4B-Instruct \
  --data "$DATA" --output-dir "$OUT" \
  --layers 5,11,17 --width 512 --causal \
  --lr 1e-4 --scheduler cosine --warmup-ratio 0.1 --epochs 1 \
  --batch-size 1 --grad-accum 8 \
  --bf16 --gradient-checkpointing \
  --save-steps 500 --keep-checkpoints 3 --workers 4
