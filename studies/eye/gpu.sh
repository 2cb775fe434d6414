#!/usr/bin/env bash
# The eye's GPU size on one 80 GB card, without network: studies/eye/gpu.sh [MINUTES] [WORK]
# WORK holds packages/ as `python -m studies eye fetch` left it. Run it again until it says that it is done; every run goes
# on from WORK's checkpoints, then measures the gate with what there is.
set -euo pipefail
export HF_HUB_OFFLINE=1
minutes=${1:-8} work=${2:-keepsight-eye}
python -m studies eye make --size gpu --device cuda --workers 12 --minutes "$minutes" --work "$work"
if [ -f "$work/gpu/eye.safetensors" ]; then python -m studies eye gate --size gpu --device cuda --work "$work"; fi
