#!/usr/bin/env bash
# From a fresh clone to a LoRA, on a CPU: bash tools/demo.sh. Everything it makes lies under runs/demo.
# Run again, shards and training go on from what is there, the rest is made anew: to start over, rm -r runs/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
demo=runs/demo step=start
trap 'echo "demo: failed in step \"$step\" (tools/demo.sh, line $LINENO); what is done stands, run it again" >&2' ERR
begin() { step="$1"; printf '\n[%3d s] %s\n' "$SECONDS" "$step"; }

begin "install into .venv"
bash tools/install.sh cpu
SECONDS=0  # downloads do not count
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1
export PYTHONDONTWRITEBYTECODE=  # as in check.sh: each step would compile its packages again

begin "a tiny Wan2.2-TI2V-5B with random weights"
python -m tools.fake.checkpoint $demo/model
begin "a corpus in the users' layout, a third of it defective"
python -m tools.fake.corpus $demo/corpus
begin "labels and footage to shards"
shardgen build configs/shardgen/demo.toml
begin "verify every hash, shape and count; report"
shardgen verify $demo/dataset
shardgen inspect "$(ls $demo/dataset/train/train-160x96x9-*.tar | head -n 1)"
shardgen report $demo/dataset
begin "clips of a subject that a small learned model has never seen (tools/fake/learned)"
python -m tools.fake.learned_corpus $demo/taught-corpus
begin "to shards"
shardgen build configs/shardgen/learned.toml
begin "teach it: a LoRA with two processes"
torchrun --standalone --nproc-per-node 2 train/main.py configs/train/learned.toml
begin "what validation said"
tail -n 1 $demo/taught-lora/validation.jsonl
begin "evaluate: base against LoRA, the same prompts and noise"
torchrun --standalone --nproc-per-node 2 -m tools.evaluate generate configs/evaluate/learned.toml
python -m tools.evaluate score configs/evaluate/learned.toml
python -m tools.evaluate compare configs/evaluate/learned.toml
begin "sample: image to video, with the ComfyUI file"
python -m tools.generate --model tools/fake/learned --lora $demo/taught-lora/lora_comfyui.safetensors \
    --output $demo/samples-i2v --shape 160x96x9 --steps 10 --guidance 2 --image tools/fake/learned/pictures/coffee.jpg \
    --prompt "나무 탁자 위 붉은 받침에 커피 한 잔이 놓여 있다. 점점 가까이 다가간다."
begin "plot"
python -m tools.plot $demo/taught-lora

cat <<END

[$(printf %3d $SECONDS) s] done. The learned model knows five subjects by heart and nothing else; the LoRA taught it a sixth.
  look           $demo/taught-lora/evaluations/demo/sheet.png: real, base and LoRA of each subject
                 $demo/samples-i2v/contact_sheet.png: from an image, base above LoRA
  does it help?  $demo/taught-lora/evaluations/demo/result.json
  shards         $demo/taught/manifest.json
  LoRA           $demo/taught-lora/lora.safetensors (diffusers), lora_comfyui.safetensors (ComfyUI)
  loss plot      $demo/taught-lora/metrics.png, validation.jsonl, and samples in training: $demo/taught-lora/samples
  what became of each defective label file
                 $demo/dataset/report.html, clean_dataset.csv and defective_samples.csv
  dashboard      python -m tools.dashboard --dataset $demo/dataset --runs $demo
  TensorBoard    .venv/bin/tensorboard --logdir $demo/taught-lora/tensorboard
END
