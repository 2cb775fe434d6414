#!/usr/bin/env bash
# VisMem, stage II (invocation), on 8 GPUs, with the settings that the paper gives.
# Base: Qwen/Qwen2.5-VL-7B-Instruct
# Source: arXiv 2511.11007, the section on training and its table of hyper-parameters.
#
# - trains the rows of the special tokens; the memory that stage I has made is frozen
# - alpha, the strength of the penalties, is not in the paper; --invocation-cost is ours (0 = the paper)
# - 8 questions per step, groups of 16, 2 epochs, AdamW, lr 5e-5, cosine, warm-up 0.2, clip 0.2, KL 0.015
# - data parallel over 8 GPUs; FSDP and ZeRO-3 cannot be used (docs/scale.md)
# - sdpa; another kernel: --attention flash_attention_2, with pip install flash-attn
# NOT TESTED on GPUs.
#
#   recipes/vismem/qwen2.5-vl-7b-invocation.sh stage1 questions.jsonl stage2
set -euo pipefail
MEMORY=${1:?the folder of stage I}
DATA=${2:?questions with answers and images}
OUT=${3:?a folder for the result}
accelerate launch --config_file "$(dirname "$0")/../accelerate/ddp.yaml" -m keepsight.cli train vismem-invocation "$MEMORY" \
  --data "$DATA" --output-dir "$OUT" \
  --train tokens --alpha 0.3 --invocation-cost 0 \
  --batch-size 8 --group-size 16 --epochs 2 --max-new-tokens 512 \
  --lr 5e-5 --scheduler cosine --warmup-ratio 0.2 --clip 0.2 --kl 0.015 --target-kl 0.03 \
  --reward format=0.1 --reward answer=0.9 \
  --rows-per-rollout 32 --rows-per-forward 4 --gradient-checkpointing --dtype bfloat16 \
  --save-steps 20 --keep-checkpoints 2
