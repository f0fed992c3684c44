# Sourced by the other scripts: finds or makes the Python environment they run in.
#   use_environment                   for the stages: whatever has the package's dependencies, else as below
#   start_stage STAGE …               a training on the GPUs of this machine, or of several
#   install_into_venv EXTRA[,EXTRA]   installs this package with the named extras
# An active virtual or conda environment is used as it is; otherwise .venv beside this repository
# (or where DIFFCLIP_VENV says), made if need be. Installed again only when pyproject.toml changed.
# With DIFFCLIP_CPU=1 PyTorch comes without CUDA, from its own index; DIFFCLIP_CPU=ADDRESS names a mirror of that.

root=$(CDPATH='' cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." >/dev/null && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # from whatever folder a script is called

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

# Sets `venv` to the environment's folder, and `activate` to what a user types to get into it ("" if already in).
find_venv() {
    activate=""
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        venv=$VIRTUAL_ENV
    elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        venv=$CONDA_PREFIX
    else
        venv=${DIFFCLIP_VENV:-$root/.venv}
        activate="source $(printf %q "$venv/bin/activate")"
    fi
}

enter_venv() {
    export PATH="$venv/bin:$PATH"
    [ "$venv" = "${CONDA_PREFIX:-}" ] || export VIRTUAL_ENV="$venv"
}

# Whether an earlier install_into_venv brought all of these extras, with the pyproject.toml of today.
has_extras() {
    local stamp extra had
    for stamp in "$venv"/.diffclip-*; do
        [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$2" ] || continue
        had=,${stamp##*/.diffclip-},
        for extra in ${1//,/ }; do
            [[ $had == *,$extra,* ]] || continue 2
        done
        return 0
    done
    return 1
}

install_into_venv() {
    local extras=$1 python wanted torch index size="7 GB, of which CUDA is 4.6: DIFFCLIP_CPU=1 leaves it out"
    find_venv
    if ! "$venv/bin/python" -c '' 2>/dev/null; then # missing, or of a Python that is gone
        # what is cleared must be a virtual environment: conda's may have no Python yet, DIFFCLIP_VENV may name a home
        if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
            echo "error: $venv holds other things than a virtual environment with Python: name an empty folder with" \
                "DIFFCLIP_VENV=FOLDER and deactivate the active environment, or, if it is conda's, conda install python pip" >&2
            return 2
        fi
        python=$(find_python) || return
        echo "making a virtual environment in $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || {
            echo "error: no virtual environment could be made: apt-get install python3-venv" >&2
            return 2
        }
    fi
    enter_venv
    wanted=$(sha256sum <"$root/pyproject.toml")
    has_extras "$extras" "$wanted" && return
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || # as uv makes them
        "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || {
        echo "error: $venv has no pip: install pip into it, or deactivate it" >&2
        return 2
    }
    if [ -n "${DIFFCLIP_CPU:-}" ]; then
        case $DIFFCLIP_CPU in
            *://*) index=$DIFFCLIP_CPU ;;
            1 | yes | true | on) index=https://download.pytorch.org/whl/cpu ;;
            *)
                echo "error: DIFFCLIP_CPU is 1, or the address of a mirror like https://HOST/whl/cpu" >&2
                return 2
                ;;
        esac
        echo "installing PyTorch without CUDA"
        # in versions that the package takes: others would be replaced below, by ones with CUDA
        mapfile -t torch < <(grep -oE '"torch(vision)?>=[^"]+' "$root/pyproject.toml" | tr -d '"')
        "$venv/bin/python" -m pip install --quiet "${torch[@]}" --index-url "$index" || {
            echo "error: ${index/\/\/*@/\/\/} did not give PyTorch without CUDA: take another network, name a mirror with" \
                "DIFFCLIP_CPU=ADDRESS, or leave DIFFCLIP_CPU out" >&2
            return 2
        }
        size="3 GB"
    fi
    echo "installing diffclip-stack[$extras] (several minutes the first time, about $size)"
    "$venv/bin/python" -m pip install --quiet --editable "$root[$extras]" || return
    echo "$wanted" >"$venv/.diffclip-$extras"
}

# A node of a cluster has no internet: what a user installed by hand, in whatever environment, is not installed again.
use_environment() {
    local ready='import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("deepspeed", "open_clip", "lmms_eval"))))'
    find_venv
    if [ -n "$activate" ] && python -c "$ready" 2>/dev/null; then
        return # a container whose own Python has all of it
    fi
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$ready" 2>/dev/null; then
        enter_venv
        return
    fi
    install_into_venv eval
}

# Replaces this shell by a training on every GPU (DEVICES says how many processes), and with NNODES on several machines:
# the same command on each, with MASTER_ADDR, and NODE_RANK or none. A Slurm step of several nodes says these itself.
start_stage() {
    local stage=$1 devices nodes
    shift
    devices=${DEVICES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    if [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ] && [ -z "${NNODES:-}" ]; then
        NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=$SLURM_NODEID
        MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
        MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    fi
    if [ "${NNODES:-1}" -gt 1 ]; then
        if [ -z "${MASTER_ADDR:-}" ]; then
            echo "error: NNODES=$NNODES needs MASTER_ADDR, a name or address of one machine that all others reach" >&2
            return 2
        fi
        if [ -n "${NODE_RANK:-}" ]; then
            nodes=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
        else
            nodes=(--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv_id "${RUN_ID:-diffclip}")
        fi
        exec torchrun --nnodes "$NNODES" "${nodes[@]}" --nproc_per_node "$devices" -m diffclip "$stage" "$@"
    fi
    if [ "$stage" != pretrain ]; then
        exec deepspeed --num_gpus "$devices" --log_level error --module diffclip "$stage" "$@"
    elif [ "$devices" = 1 ]; then
        exec python -m diffclip "$stage" "$@"
    fi
    exec torchrun --standalone --nproc_per_node "$devices" -m diffclip "$stage" "$@"
}
