#!/usr/bin/env bash
# Installs what the tests need and runs them, offline; further arguments go to pytest.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
install_into_venv eval,app,export,dev
cd "$root"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
# Two processes with a file of tests each: most of the time goes into starting commands, which keeps one core busy.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
