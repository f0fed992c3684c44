#!/usr/bin/env bash
# From image-text pairs to a POPE table on the built-in scenes, for CLIP and DiffCLIP, on a laptop CPU.
#   ./scripts/quickstart.sh [--fast] [--variants CLIP DiffCLIP ...] [--seeds 0 1 2] [--output-dir runs/quickstart] [--config NAME]
# Called again it skips what is finished and goes on where it was interrupted.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
install_into_venv eval

export DIFFCLIP_ACTIVATE="$activate" # so that its last lines say how to go on
exec python -m diffclip pipeline "$@"
