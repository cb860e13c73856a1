#!/bin/bash
#SBATCH --job-name=llama70b_abba
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
##SBATCH --account=YOUR_ACCOUNT
##SBATCH --partition=YOUR_PARTITION
# Llama-3.1-70B on GSM8K with ABBA: two nodes of 8 GPUs of 80 GB; then a job of its own that converts and scores.
#
#     sbatch slurm/llama70b_abba.sh
#     sbatch slurm/llama70b_abba.sh train.learning_rate=5e-4 output_dir="runs/my run"    # overrides of the recipe
#
# Edit: account and partition above, where your cluster asks for them; nodes, GPUs (a task for each) and CPUs; the
# two lines below. sbatch's options and the environment win:
#     ABBA_SCRATCH=/local sbatch --account=me slurm/llama70b_abba.sh
: "${ABBA_ENV:=venv:.venv}"    # what python runs in: venv:DIRECTORY, module:NAME, apptainer:IMAGE, pyxis:IMAGE
: "${ABBA_SCRATCH:=/tmp}"      # a node-local directory for what is temporary

SELF=$(realpath "$0") && cd "${SLURM_SUBMIT_DIR:-$(dirname "$SELF")/..}" || exit
[ -f slurm/common.sh ] || { echo "slurm: $PWD is not the repository's top directory; sbatch from there" >&2; exit 64; }
. slurm/common.sh
begin "$@"
# On several nodes each holds a copy of the base, so that no weight crosses the network (the recipe says more).
if [ -z "${ABBA_RECIPE:-}" ] && [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    set -- "deepspeed.zero_optimization.zero_hpz_partition_size=${SLURM_TASKS_PER_NODE%%[!0-9]*}" "$@"
fi
train "${ABBA_RECIPE:-llama70b_gsm8k}" "$@"
