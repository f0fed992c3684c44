#!/usr/bin/env bash
# Stage 2 under the deepspeed launcher: all arguments go to stages.align.
#   ./scripts/2_align.sh --config stages/configs/paper/align.yaml --output_dir runs/diffclip/align ... (see --help)
# DEVICES sets the number of processes (default: every visible GPU, or 1 without one).
set -euo pipefail
cd "$(dirname "$0")/.."
devices=${DEVICES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec deepspeed --num_gpus "$devices" --module stages.align "$@"
