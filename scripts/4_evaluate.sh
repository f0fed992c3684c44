#!/usr/bin/env bash
# Stage 4: CLIP benchmarks and POPE through lmms-eval: all arguments go to `diffclip evaluate`.
#   ./scripts/4_evaluate.sh --clip runs/diffclip/pretrain --data_root data/benchmarks \
#       --mllm runs/diffclip/instruct --pope data/pope --image_root data/coco/val2014 --output_dir runs/diffclip/evaluate
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
use_environment
exec python -m diffclip evaluate "$@"
