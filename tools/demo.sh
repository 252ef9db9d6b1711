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
begin "train a LoRA with two processes"
torchrun --standalone --nproc-per-node 2 train/main.py configs/train/demo.toml
begin "what validation said"
tail -n 1 $demo/train/validation.jsonl
begin "sample: base against LoRA, text to video"
python -m tools.generate --model $demo/model --lora $demo/train/lora.safetensors --output $demo/samples \
    --shape 160x96x9 --steps 10 \
    --prompt "커다란 토끼가 풀밭에 서서 기지개를 켠다." "헬멧을 쓴 남자가 자전거를 타고 거리를 지나간다."
begin "sample: image to video"
python -m tools.generate --model $demo/model --lora $demo/train/lora_comfyui.safetensors --output $demo/samples-i2v \
    --shape 160x96x9 --steps 10 --image $demo/corpus/image/batch_0001/2500101.png \
    --prompt "토끼가 두 팔을 높이 들고 하품을 한다."
begin "plot"
python -m tools.plot $demo/train

cat <<END

[$(printf %3d $SECONDS) s] done. The model's weights are random, so its pictures are noise; what the demo shows is the way.
  shards         $demo/dataset/manifest.json
  what became of each label file
                 $demo/dataset/report.html, clean_dataset.csv and defective_samples.csv
  LoRA           $demo/train/lora.safetensors (diffusers), lora_comfyui.safetensors (ComfyUI)
  contact sheet  $demo/samples/contact_sheet.png, base above LoRA
                 $demo/samples-i2v/contact_sheet.png, from an image
  loss plot      $demo/train/metrics.png
  validation     $demo/train/validation.jsonl, and samples in training: $demo/train/samples
  dashboard      python -m tools.dashboard --dataset $demo/dataset --runs $demo
  TensorBoard    .venv/bin/tensorboard --logdir $demo/train/tensorboard
END
