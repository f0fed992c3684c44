#!/usr/bin/env bash
# Stage 2 under the deepspeed launcher: all arguments go to `diffclip align`.
#   ./scripts/2_align.sh --config paper/align --vision_tower runs/diffclip/pretrain --image_root data/llava-pretrain \
#       --data data/llava-pretrain/blip_laion_cc_sbu_558k.json --output_dir runs/diffclip/align
# DEVICES sets the number of processes (default: every visible GPU, or 1 without one); on several machines NNODES,
# MASTER_ADDR and NODE_RANK: docs/cluster.md.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
use_environment
start_stage align "$@"
