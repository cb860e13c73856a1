#!/bin/sh
# The whole main job on the embedded default: train on two ranks, convert, score base and adapter, show one answer.
#     make quickstart           (or with the environment active: sh launch/quickstart.sh [OUTPUT_DIR])
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1                               # nothing is downloaded
[ -e /dev/nvidia0 ] || export DS_ACCELERATOR=cpu      # DeepSpeed would say at length that there is no GPU
run=${1:-runs/quickstart}
tiny=recipes/assets/tiny-llama
started=$(date +%s)

echo "== 1/4 train: deepspeed --num_gpus 2 launch/train.py --recipe quickstart.yaml"
# From scratch each time; without the last two words an interrupted run would be continued.
deepspeed --num_gpus 2 --master_port $((20000 + $$ % 20000)) --log_level error launch/train.py --recipe quickstart.yaml \
    output_dir="$run" checkpoint.resume=never overwrite_output_dir=true

echo "== 2/4 convert: python launch/convert.py $run $run-lora --format lora --verify --base $tiny"
python launch/convert.py "$run" "$run-lora" --format lora --verify --base "$tiny" --force

echo "== 3/4 score: python launch/evaluate.py --model $tiny [--adapter $run/adapter] --task gsm8k --data ...test.jsonl"
for name in base adapter; do
    if [ "$name" = adapter ]; then set -- --adapter "$run/adapter"; else set --; fi
    python launch/evaluate.py --model "$tiny" "$@" --task gsm8k --data recipes/assets/stories/test.jsonl \
        --batch-size 128 --max-new-tokens 40 --output "$run/scores-$name"
done

echo "== 4/4 ask: python launch/generate.py --model $tiny --adapter $run/adapter --prompt ..."
python launch/generate.py --model "$tiny" --adapter "$run/adapter" --max-new-tokens 40 \
    --prompt "Tom had some pens. Then Tom bought 6 more. Now Tom has 15 pens. How many pens did Tom have at first?"

echo "== done in $(($(date +%s) - started)) s; the adapter is $run/adapter, its LoRA form $run-lora"
