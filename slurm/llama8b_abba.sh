#!/bin/bash
#SBATCH --job-name=llama8b_abba
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
##SBATCH --account=YOUR_ACCOUNT
##SBATCH --partition=YOUR_PARTITION
# Llama-3.1-8B on GSM8K with ABBA: one node of 8 GPUs; then a job of its own that converts and scores.
#
#     sbatch slurm/llama8b_abba.sh
#     sbatch slurm/llama8b_abba.sh train.learning_rate=5e-4 output_dir="runs/my run"    # overrides of the recipe
#
# Edit: account and partition above, where your cluster asks for them; nodes, GPUs (a task for each) and CPUs; the
# two lines below. sbatch's options and the environment win:
#     ABBA_SCRATCH=/local sbatch --account=me slurm/llama8b_abba.sh
: "${ABBA_ENV:=venv:.venv}"    # what python runs in: venv:DIRECTORY, module:NAME, apptainer:IMAGE, pyxis:IMAGE
: "${ABBA_SCRATCH:=/tmp}"      # a node-local directory for what is temporary

SELF=$(realpath "$0") && cd "${SLURM_SUBMIT_DIR:-$(dirname "$SELF")/..}" || exit
[ -f slurm/common.sh ] || { echo "slurm: $PWD is not the repository's top directory; sbatch from there" >&2; exit 64; }
. slurm/common.sh
begin "$@"
train "${ABBA_RECIPE:-gsm8k}" "$@"
