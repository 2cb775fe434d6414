#!/usr/bin/env bash
# VisMem, stage I (formation), on 8 GPUs, with the settings that the paper gives.
# Base: Qwen/Qwen2.5-VL-7B-Instruct
# Source: arXiv 2511.11007, the section on training and its table of hyper-parameters.
#
# - trains query builder and both formers (LoRA of rank 16, alpha 32, on q and v); Qwen2.5-VL-7B is frozen
# - K = 8 queries, N_s = 8 and N_l = 16 latents, as in the paper's main text (a table of its appendix: 4 and 8)
# - 8 questions per step, groups of 16, 2 epochs, AdamW, lr 5e-5, cosine, warm-up 0.2, clip 0.2, KL 0.015
# - data parallel over 8 GPUs; FSDP and ZeRO-3 cannot be used (docs/scale.md)
# - sdpa; another kernel: --attention flash_attention_2, with pip install flash-attn
# NOT TESTED on GPUs.
# In our lab stage I needed --warm-start-steps 300 and --max-text-states 8 to learn anything of the image.
#
#   recipes/vismem/qwen2.5-vl-7b-formation.sh questions.jsonl stage1
set -euo pipefail
DATA=${1:?questions with answers and images}
OUT=${2:?a folder for the result}
accelerate launch --config_file "$(dirname "$0")/../accelerate/ddp.yaml" -m keepsight.cli train vismem-formation Qwen/Qwen2.5-VL-7B-Instruct \
  --data "$DATA" --output-dir "$OUT" \
  --num-queries 8 --num-short 8 --num-long 16 \
  --batch-size 8 --group-size 16 --epochs 2 --max-new-tokens 512 \
  --lr 5e-5 --scheduler cosine --warmup-ratio 0.2 --clip 0.2 --kl 0.015 --target-kl 0.03 \
  --reward format=0.1 --reward answer=0.9 \
  --rows-per-rollout 32 --rows-per-forward 4 --gradient-checkpointing --dtype bfloat16 \
  --save-steps 20 --keep-checkpoints 2
