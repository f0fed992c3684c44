#!/usr/bin/env bash
# Installs what the tests need and runs them, offline; further arguments go to pytest.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
install_into_venv eval,app,export,dev
cd "$root"

# transformers' own tests, which only its sources hold; without them those of ours that build on them skip.
version=$(python -c 'from importlib.metadata import version; print(version("transformers"))')
sources=${XDG_CACHE_HOME:-$HOME/.cache}/diffclip/transformers-$version
if [ ! -d "$sources" ]; then
    mkdir -p "$sources.part"
    if python -m pip download --quiet --no-binary :all: --no-deps --dest "$sources.part" "transformers==$version" &&
        tar -xzf "$sources.part/transformers-$version.tar.gz" -C "$sources.part"; then
        mv "$sources.part/transformers-$version" "$sources"
    else
        echo "transformers' own tests could not be fetched: they will skip"
    fi
    rm -rf "$sources.part"
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # containers set it, and each of some hundred processes would compile the package anew
ruff check .
ruff format --check .
mypy
# Two processes with a file of tests each: most of the time goes into starting commands, which keeps one core busy.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
