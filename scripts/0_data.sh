#!/usr/bin/env bash
# Stage 0: fetch data. All arguments go to `diffclip data`.
#   ./scripts/0_data.sh cc3m pope --output_dir data [--dry_run]
#   ./scripts/0_data.sh pairs URLS.tsv --output_dir data/mine     # img2dataset, in an environment of its own
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/setup_env.sh"
for argument in "$@"; do
    case $argument in
        --dry-run | --dry_run | -h | --help) # only says what would come: any Python will do, nothing is installed
            python=$(find_python)
            exec "$python" -m diffclip data "$@"
            ;;
    esac
done
use_environment
if [ "${1:-}" = pairs ] && ! command -v img2dataset >/dev/null; then
    tool=${DIFFCLIP_IMG2DATASET:-$root/.venv-img2dataset}
    if [ ! -x "$tool/bin/img2dataset" ]; then
        echo "installing img2dataset into $tool"
        python -m venv "$tool"
        "$tool/bin/python" -m pip install --quiet 'img2dataset>=1.47,<2'
    fi
    export PATH="$PATH:$tool/bin"
fi
exec python -m diffclip data "$@"
