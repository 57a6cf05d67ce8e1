#!/bin/bash
# Train one stage, or evaluate, on GPU nodes under SLURM: one task per GPU, restarted after a preemption or at the time
# limit.
#
#     sbatch --nodes=4 launch_slurm.sh --config=configs/finetune.py --config.init_from=/shared/crab/base \
#         --config.data.root=/shared/crab/data --config.steps=2000 --workdir=/shared/crab/runs/finetune
#     sbatch --nodes=4 launch_slurm.sh -- evaluate --checkpoint /shared/crab/runs/finetune --data /shared/crab/data \
#         --out /shared/crab/results
#
# An example: set partition, account and the numbers below to those of your cluster. PYTHON names another interpreter than
# .venv/bin/python. Submit from the top of the repository. The arguments are the flags of a run that all launchers share:
#
#   --config=FILE --config.key=value ... --workdir=DIR   as for `python -m crab_jax.train`
#   -- evaluate ...      last, in place of the line above: as for `python -m crab_jax.evaluate`; evaluate alone will do
#   --env=NAME           check that NAME is exported; the job has the environment of sbatch
#   --max-restarts=N     do not go back into the queue after N restarts (no bound)
#
# All folders must be on a disk shared by all nodes.
#
# Tokens and keys: `export NAME` in the shell that calls sbatch, which passes its environment to the job, also after a
# requeue. Do not give them as arguments or as `sbatch --export=NAME=VALUE`: ps, scontrol and squeue show these to every
# user. If your cluster passes no environment, give the name without its value: `sbatch --export=ALL` or `--export=NAME`.
#
#SBATCH --job-name=crab
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=crab-%j.log
# This shell (B:) gets USR1 ten minutes before the time limit; on preemption it gets TERM, by your cluster's GraceTime
# before the end.
#SBATCH --signal=B:USR1@600
set -u

# scancel sends TERM to the tasks only: train writes a checkpoint and ends. (srun itself would turn a TERM into KILL.)
# The job then goes back into the queue, and the same command resumes from the workdir.
asked=''
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM

# Every task sees all GPUs of its node (--gpu-bind=none) and JAX takes the one of its local rank; with --gpus-per-task
# each would see a single GPU, and all but the first would look for a missing one.
input_error() {
    printf 'error: %s: %s; %s\n' "$@" >&2
    exit 2
}

[ "${1:-}" != evaluate ] || set -- -- "$@"
verb=train
max_restarts=''
words=()
while [ $# -gt 0 ]; do
    case $1 in
        --)
            shift
            [ "${1:-}" = evaluate ] || input_error "command line" "'${1:-}' follows --" "write -- evaluate ..."
            verb=evaluate
            shift
            for word in "$@"; do
                case $word in
                    --env | --env=*) input_error --env "belongs before -- evaluate" "export the name instead" ;;
                esac
            done
            words+=("$@")
            break
            ;;
        --env | --env=*=*)
            input_error --env "ps and scontrol show the arguments of a job to every user" \
                "export the name instead in the shell that calls sbatch"
            ;;
        --env=*)
            name=${1#--env=}
            [ -n "${!name+set}" ] || input_error --env "names a variable that is not set" "export $name before sbatch"
            ;;
        --max-restarts=*)
            max_restarts=${1#*=}
            case $max_restarts in
                '' | *[!0-9]*) input_error --max-restarts "'$max_restarts' is not a whole number" "write --max-restarts=N" ;;
            esac
            ;;
        *) words+=("$1") ;;
    esac
    shift
done
srun --kill-on-bad-exit=1 --gpu-bind=none "${PYTHON:-.venv/bin/python}" -u -m "crab_jax.$verb" ${words[@]+"${words[@]}"} &
run=$!
wait "$run"
code=$?
if [ -n "$asked" ]; then  # a trap ends a wait early, with the signal's number instead of the run's exit code
    while kill -0 "$run" 2>/dev/null; do
        wait "$run"
    done
    wait "$run"
    code=$?
fi
if [ -n "$asked" ]; then
    if [ -n "$max_restarts" ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_restarts" ]; then
        echo "stopped on a signal with exit code $code; gave up after ${SLURM_RESTART_COUNT:-0} restarts" >&2
    else
        echo "stopped on a signal with exit code $code: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
