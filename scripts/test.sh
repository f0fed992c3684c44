#!/usr/bin/env bash
# Installs what the tests need and runs them, offline; further arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"
install_into_venv eval,app,dev
cd "$root"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
exec python -m pytest "$@"
