#!/usr/bin/env bash
# Stage 1 on the GPUs of this machine: all arguments go to `diffclip pretrain`.
#   ./scripts/1_pretrain.sh --config paper/pretrain_cc3m --model DiffCLIP-B-16 \
#       --train_data 'data/cc3m/cc3m-train-*.tar' --output_dir runs/diffclip/pretrain
# DEVICES sets the number of processes (default: every visible GPU, or 1 without one); on several machines NNODES,
# MASTER_ADDR and NODE_RANK: docs/cluster.md.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
use_environment
start_stage pretrain "$@"
