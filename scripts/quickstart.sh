#!/usr/bin/env bash
# From a fresh clone to a comparison on the embedded model: DPO on noisy preferences with AdamW, with the gate
# and with judged labels at the same settings, the control that every gate has to beat (AdamW at a third of the
# learning rate), and the leap, which trains nothing. Run again, it reuses every part that is finished.
source "$(dirname "$0")/environment.sh"
export HF_HUB_OFFLINE=1

echo "==> The embedded model and data (outputs/tiny)"
python scripts/prepare_tiny.py

# Results belong to the exact data, recipes and code that made them.
key=$(cat outputs/tiny/metadata.json recipes/tiny/dpo.yaml recipes/*.py $(find hf_poprisk -name "*.py" | sort) |
    python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:10])')
runs=outputs/quickstart/$key

train() { # name, options
    local name=$1
    shift
    if python -m json.tool "$runs/$name/results.json" /dev/null 2>/dev/null &&
        python -m json.tool "$runs/$name/trainer_state.json" /dev/null 2>/dev/null; then
        echo "==> $name: already trained"
        return
    fi
    echo "==> $name: accelerate launch recipes/dpo.py --config recipes/tiny/dpo.yaml $*"
    rm -rf "$runs/$name" # an interrupted run starts over
    accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml recipes/dpo.py \
        --config recipes/tiny/dpo.yaml --output_dir "$runs/$name" --save_strategy no \
        --dataset_validation_split "" --eval_steps 32 "$@"
}
judged="--poprisk_gate none --poprisk_label_noise weight"
train adamw --optim adamw_torch
train adamw-lr-third --optim adamw_torch --learning_rate 1e-4
train hard-gate
train weights $judged
train leap $judged --poprisk_leap 1 --num_train_epochs 0

hf-poprisk audit "$runs/leap" --dataset "$runs/leap/_training_data" --page outputs/quickstart/labels.html | sed -n 1,5p
echo "page: outputs/quickstart/labels.html"
python scripts/compare.py "$runs"/{adamw,adamw-lr-third,hard-gate,weights,leap} --plot outputs/quickstart/comparison.png
