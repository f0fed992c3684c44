# Sourced by the other scripts: makes or uses a virtual environment and installs this package with the named extras.
#   install_into_venv EXTRA[,EXTRA]
# An active virtual environment is used as it is; otherwise .venv is made beside this repository
# (or where DIFFCLIP_VENV says). Installed again only when pyproject.toml changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 or newer is needed: apt-get install python3 python3-venv" >&2
    return 2
}

install_into_venv() {
    local extras=$1 python venv stamp wanted
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        venv=$VIRTUAL_ENV
    else
        venv=${DIFFCLIP_VENV:-$root/.venv}
        if [ ! -x "$venv/bin/python" ]; then
            python=$(find_python) || return
            echo "making a virtual environment in $venv with $("$python" --version)"
            "$python" -m venv "$venv" || {
                echo "error: no virtual environment could be made: apt-get install python3-venv" >&2
                return 2
            }
        fi
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
    stamp=$venv/.diffclip-$extras
    wanted=$(cat "$root/pyproject.toml" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing diffclip-stack[$extras] (several minutes the first time, about 7 GB)"
        "$venv/bin/python" -m pip install --quiet --editable "$root[$extras]" || return
        echo "$wanted" >"$stamp"
    fi
}
