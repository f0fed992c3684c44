#!/usr/bin/env bash
# From image-text pairs to a POPE table on the built-in scenes, for CLIP and DiffCLIP, on a laptop CPU.
#   ./scripts/quickstart.sh [--variants CLIP DiffCLIP ...] [--seed 0] [--output-dir runs/quickstart] [--config FILE]
# Called again it skips what is finished and goes on where it was interrupted.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
install_into_venv eval
cd "$root"

config=stages/configs/quickstart/pipeline.yaml
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --config) config=${2:?--config needs a file}; shift 2 ;;
        --config=*) config=${1#*=}; shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done
export DIFFCLIP_ACTIVATE="$activate" # so that its last lines say how to go on
exec python -m stages.pipeline --config "$config" ${arguments[@]+"${arguments[@]}"}
