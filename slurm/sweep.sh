#!/bin/bash
#SBATCH --job-name=sweep
#SBATCH --array=0-3
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
#SBATCH --output=%x-%A_%a.out
##SBATCH --account=YOUR_ACCOUNT
##SBATCH --partition=YOUR_PARTITION
# Learning rates side by side: an array job, one node of 8 GPUs for each rate; each run is converted and scored.
#
#     sbatch slurm/sweep.sh
#     ABBA_RATES="1e-3 2e-3" sbatch --array=0-1 slurm/sweep.sh train.num_train_epochs=2    # overrides of the recipe
#     ABBA_RECIPE=gsm8k_lora ABBA_RATES="1e-4 2e-4 5e-4" sbatch --array=0-2 slurm/sweep.sh    # another recipe
#     sbatch --array=2 slurm/sweep.sh                                                         # one of them again
#     grep exact_match runs/sweep/*/*/score/scores.json                                       # compares them
#
# Edit: account and partition above, where your cluster asks for them; nodes, GPUs (a task for each) and CPUs; the
# two lines below. sbatch's options and the environment win:
#     ABBA_SCRATCH=/local sbatch --account=me slurm/sweep.sh
: "${ABBA_ENV:=venv:.venv}"    # what python runs in: venv:DIRECTORY, module:NAME, apptainer:IMAGE, pyxis:IMAGE
: "${ABBA_SCRATCH:=/tmp}"      # a node-local directory for what is temporary
: "${ABBA_RATES:=3e-4 5e-4 1e-3 2e-3}"    # element 0 of the array trains at the first, and so on
: "${ABBA_RECIPE:=gsm8k}"
: "${ABBA_SWEEP:=runs/sweep/$(basename "$ABBA_RECIPE" .yaml)}"    # holds the runs, each under its rate

SELF=$(realpath "$0") && cd "${SLURM_SUBMIT_DIR:-$(dirname "$SELF")/..}" || exit
[ -f slurm/common.sh ] || { echo "slurm: $PWD is not the repository's top directory; sbatch from there" >&2; exit 64; }
. slurm/common.sh
begin "$@"
read -ra rates <<< "$ABBA_RATES"
element=${SLURM_ARRAY_TASK_ID:-${#rates[@]}}    # not of an array: one too many
rate=${rates[element]:-}
[ -n "$rate" ] || refuse 64 "ABBA_RATES has ${#rates[@]} rates, from 0, and none for element $element:" \
    "sbatch --array=0-$((${#rates[@]} - 1)) slurm/sweep.sh"
train "$ABBA_RECIPE" "train.learning_rate=$rate" "output_dir=$ABBA_SWEEP/$rate" "$@"
