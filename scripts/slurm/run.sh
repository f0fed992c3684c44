# Sourced by the .sbatch files: runs a stage on all tasks of the job, which meet through Slurm's variables.
# Two minutes before its time is over (--signal=B:USR1@120) the job writes a checkpoint and queues itself again; the same
# command goes on. SIGTERM, of scancel or of a preemption, writes one too; whether the job comes again is Slurm's to say.

run_stage() {
    local step code=0 told=""
    source "$root/scripts/setup_env.sh"
    use_environment
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    srun --kill-on-bad-exit=1 --export=ALL python -m diffclip "$@" &
    step=$!
    trap 'told=1; kill -USR1 $step' USR1
    trap 'kill -USR1 $step' TERM
    while wait $step || code=$?; kill -0 $step 2>/dev/null; do :; done # a trapped signal ends a wait early
    if [ -n "$told" ] && [ "$code" != 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
