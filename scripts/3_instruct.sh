#!/usr/bin/env bash
# Stage 3 under the deepspeed launcher: all arguments go to `diffclip instruct`.
#   ./scripts/3_instruct.sh --config paper/instruct --model runs/diffclip/align --image_prefix coco/ \
#       --data data/llava-coco/llava_v1_5_mix665k.json --image_root data/llava-coco --output_dir runs/diffclip/instruct
# DEVICES sets the number of processes (default: every visible GPU, or 1 without one); on several machines NNODES,
# MASTER_ADDR and NODE_RANK: docs/cluster.md.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
use_environment
start_stage instruct "$@"
