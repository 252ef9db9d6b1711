#!/usr/bin/env bash
# Does the learned model's evaluation say what it must? bash bench/learn/must_hold.sh [SEED ...], after tools/demo.sh has
# made runs/demo/taught; on a GPU or a CPU. Per seed, which is that of the LoRA's training and of the evaluation's noise:
# a LoRA as the demo trains it, two that are wrong on purpose, and three evaluations: 65 clips of the taught subject, 65 of
# each photograph that the base knows, and all captions three times. Everything goes on where it was interrupted. Fails if a
# bar is missed.
set -euo pipefail
cd "$(dirname "$0")/../.."
# as in tools/demo.sh: two threads beside other work trained thirty times slower
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-.venv/bin/python}" config=configs/evaluate/learned.toml missed=0
# the demo's val split has 65 real windows of the taught subject, and ten of a known one: too few for a verdict
corpus=runs/must_hold/corpus shards=runs/must_hold/shards
[ -e "$shards/manifest.json" ] || "$python" -m tools.fake.learned_corpus "$corpus" --num-val-known 13
"$python" -m shardgen.cli build configs/shardgen/learned.toml --set "labels.root=$corpus" --set "output=$shards"
for seed in "${@:-0}"; do
    output="runs/must_hold/$seed"
    "$python" -m torch.distributed.run --standalone train/main.py configs/train/learned.toml --set "seed=$seed" \
        --set "output=$output/lora" --set samples.every=0
    [ -e "$output/sign.safetensors" ] || "$python" -m bench.learn controls --output "$output" --seed "$seed" --control-steps 100
    taught=(--set "output=$output/taught" --set 'set.categories=["음식"]' --set set.num_seeds=13 --set set.num_decoded=1)
    known=(--set "output=$output/known" --set "datasets=[\"$shards\"]" --set 'set.categories=["과학", "동물", "우주", "인물"]'
           --set set.num_seeds=13 --set set.num_decoded=1)
    all=(--set "output=$output/all" --set "candidates.shuffled=$output/shuffled.safetensors"
         --set "candidates.sign=$output/sign.safetensors")
    for set in taught known all; do
        declare -n overrides="$set"
        for command in generate score compare; do
            "$python" -m tools.evaluate "$command" "$config" --set "set.seed=$seed" \
                --set "candidates.lora=$output/lora/lora.safetensors" "${overrides[@]}"
        done
        echo "seed $seed, $set:"
        "$python" -m bench.learn verdicts --output "$output/$set" || missed=1
    done
done
exit $missed
