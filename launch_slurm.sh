#!/bin/bash
# Train one stage, or evaluate, on GPU nodes under SLURM: one task per GPU, restarted after a preemption or at the time
# limit.
#
#     sbatch --nodes=4 launch_slurm.sh --config=configs/finetune.py --config.init_from=/shared/crab/base \
#         --config.data.root=/shared/crab/data --config.steps=2000 --workdir=/shared/crab/runs/finetune
#     sbatch --nodes=4 launch_slurm.sh evaluate --checkpoint /shared/crab/runs/finetune --data /shared/crab/data \
#         --out /shared/crab/results
#
# An example: set partition, account and the numbers below to those of your cluster. The arguments are those of
# `python -m crab_jax.train`, or the word evaluate and those of `python -m crab_jax.evaluate`; all folders must be on a
# disk shared by all nodes. PYTHON names another interpreter than .venv/bin/python. Submit from the top of the repository.
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
verb=train
if [ "${1:-}" = evaluate ]; then
    verb=$1
    shift
fi
for word in "$@"; do
    case $word in
        --env | --env=*)
            echo "error: --env: ps and scontrol show the arguments of a job to every user; export the name instead in the" \
                "shell that calls sbatch" >&2
            exit 2
            ;;
    esac
done
srun --kill-on-bad-exit=1 --gpu-bind=none "${PYTHON:-.venv/bin/python}" -u -m "crab_jax.$verb" "$@" &
run=$!
wait "$run"
code=$?
while [ -n "$asked" ] && kill -0 "$run" 2>/dev/null; do  # a trap ends a wait early
    wait "$run"
    code=$?
done
if [ -n "$asked" ]; then
    echo "stopped on a signal with exit code $code: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
