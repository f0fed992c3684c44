#!/usr/bin/env bash
# Stage 1 on the GPUs of this machine: all arguments go to `diffclip pretrain`.
#   ./scripts/1_pretrain.sh --config paper/pretrain_cc3m --model DiffCLIP-B-16 \
#       --train_data 'data/cc3m/cc3m-train-*.tar' --output_dir runs/diffclip/pretrain
# DEVICES sets the number of processes (default: every visible GPU, or 1 without one).
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
use_environment
devices=${DEVICES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [ "$devices" = 1 ]; then
    exec python -m diffclip pretrain "$@"
fi
exec torchrun --standalone --nproc_per_node "$devices" -m diffclip pretrain "$@"
