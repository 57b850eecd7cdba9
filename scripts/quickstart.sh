#!/usr/bin/env bash
# From a fresh clone to a comparison: DPO on noisy preferences with AdamW and with the gate, hard and soft,
# at the same settings on the embedded model, and the control that every gate has to beat: AdamW at a third
# of the learning rate. Run again, it reuses every part that is finished.
source "$(dirname "$0")/environment.sh"
export HF_HUB_OFFLINE=1

echo "==> The embedded model and data (outputs/tiny)"
python scripts/prepare_tiny.py

# Results belong to the exact data, recipes and code that made them.
key=$(cat outputs/tiny/metadata.json recipes/tiny/dpo/*.yaml recipes/*.py $(find hf_poprisk -name "*.py" | sort) |
    python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:10])')
runs=outputs/quickstart/$key

train() { # name, recipe, further options
    local name=$1 recipe=$2
    shift 2
    if python -m json.tool "$runs/$name/results.json" /dev/null 2>/dev/null &&
        python -m json.tool "$runs/$name/trainer_state.json" /dev/null 2>/dev/null; then
        echo "==> $name: already trained"
        return
    fi
    echo "==> $name: accelerate launch recipes/dpo.py --config $recipe $*"
    rm -rf "$runs/$name" # an interrupted run starts over
    accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml recipes/dpo.py --config "$recipe" \
        --output_dir "$runs/$name" --save_strategy no --dataset_validation_split "" --eval_steps 32 "$@"
}
train adamw recipes/tiny/dpo/adamw.yaml
train hard recipes/tiny/dpo/poprisk.yaml
train soft recipes/tiny/dpo/poprisk.yaml --poprisk_gate soft
train adamw-lr-third recipes/tiny/dpo/adamw.yaml --learning_rate 1e-4

python scripts/compare.py "$runs"/{adamw,hard,soft,adamw-lr-third} --plot outputs/quickstart/comparison.png
