#!/bin/bash
#SBATCH --job-name=convert_evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
##SBATCH --account=YOUR_ACCOUNT
##SBATCH --partition=YOUR_PARTITION
# A finished run as a LoRA that vLLM serves (of hira, loha and dora the adapter in its own form), in RUN-lora, and its
# score, in RUN/score: one process on one node.
#
#     sbatch slurm/convert_evaluate.sh runs/gsm8k
#     sbatch slurm/convert_evaluate.sh runs/gsm8k --limit 200        # arguments of launch/evaluate.py
#     sbatch slurm/convert_evaluate.sh runs/commonsense --task commonsense --data DIRECTORY
#
# Without --task, what was trained on openai/gsm8k is scored on its test split, and anything else only converted.
#
# Edit: account and partition above, where your cluster asks for them; as many GPUs as the model needs; the two lines
# below. sbatch's options and the environment win:
#     ABBA_SCRATCH=/local sbatch --account=me slurm/convert_evaluate.sh
: "${ABBA_ENV:=venv:.venv}"    # what python runs in: venv:DIRECTORY, module:NAME, apptainer:IMAGE, pyxis:IMAGE
: "${ABBA_SCRATCH:=/tmp}"      # a node-local directory for what is temporary

SELF=$(realpath "$0") && cd "${SLURM_SUBMIT_DIR:-$(dirname "$SELF")/..}" || exit
[ -f slurm/common.sh ] || { echo "slurm: $PWD is not the repository's top directory; sbatch from there" >&2; exit 64; }
. slurm/common.sh
begin "$@"
[ $# -gt 0 ] || refuse 64 "say which run: sbatch slurm/convert_evaluate.sh runs/NAME"
run=${1%/}
check_nodes "$run/recipe.yaml"
[ "$METHOD" != full ] || leave 64 "$run was trained whole: score it with evaluate.py --model $run/model"
read -ra evaluate <<< "$ABBA_EVALUATE"

again="the message above says why; the same sbatch command tries again"

form=() what=adapter    # what another method has trained has one form, its own
case $METHOD in abba) form=(--format lora) what=LoRA ;; lora | rslora) what=LoRA ;; esac
on_first_node python launch/convert.py "$run" "$run-lora" "${form[@]}" --verify --force ||
    requeue_or_leave $? "$again"
will_score "${evaluate[@]}" "${@:2}" || leave 0 "the $what is $run-lora"
on_first_node python launch/evaluate.py --model "$BASE" ${REVISION:+--revision "$REVISION"} --dtype "$DTYPE" \
    --adapter "$run/adapter" ${TASK:+--task "$TASK"} --output "$run/score" "${evaluate[@]}" "${@:2}" ||
    requeue_or_leave $? "$again"    # evaluate.py goes on with the rows that are missing
leave 0 "the $what is $run-lora, the score $run/score/scores.json"
