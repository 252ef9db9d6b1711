"""A small Wan2.2 that has learned something, on one GPU:

    python -m bench.learn prepare --output runs/learn      on a CPU: footage.npz, tokenizer, ...
    python -m bench.learn train --output runs/learn        on a GPU, about eight minutes
    python -m bench.learn controls --output runs/controls  on a CPU, after the demo: two LoRAs that
                                                           an evaluation must call worse
    python -m bench.learn verdicts --output EVALUATION     does all that must hold? (exit code)

`train` writes OUTPUT/vae and OUTPUT/transformer in diffusers' layout and float16,
OUTPUT/metrics.json, sheet.png (every caption by the base, then by a LoRA on the held-out subject,
then excluded windows beside what the VAE keeps of them) and lora.safetensors. It memorises its
windows: useless for quality. A GPU gives other bits each time, so the weights are kept, with
their hashes, under tools/fake/learned. `--part vae` or `--part transformer` does one half;
`--vae-steps 1 --vae-batch 1 --transformer-steps 2 --transformer-batch 2 --lora-passes 8 --every 12
--sample-steps 1` tries the logic on a CPU.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging

from bench.learn.controls import train_controls
from bench.learn.dit import train_transformer
from bench.learn.footage import Footage, load, prepare
from bench.learn.lora import open_run, retrieval, sample, train_lora
from bench.learn.vae import measure_latents, measure_psnr, rounded_to_half, save_half, train_vae
from bench.learn.verdicts import say
from loader.files import file_xxh3
from tools.fake.learned_clips import FOLDER, HELD_OUT
from train.contact_sheet import contact_sheet
from train.denoise import Decoder, Frames
from train.lora import files as lora_files

MAX_MIB = 12.0
WEIGHTS = "diffusion_pytorch_model.safetensors"


def learn_vae(arguments: argparse.Namespace, footage: Footage) -> dict[str, Any]:
    vae, measured = train_vae(
        footage,
        seconds=arguments.vae_s,
        max_steps=arguments.vae_steps,
        batch=arguments.vae_batch,
        graphed=not arguments.eager,
        seed=arguments.seed,
    )
    rounded_to_half(vae)
    measure_latents(vae, footage)
    measured["psnr_db_excluded_half"] = measure_psnr(vae, footage)
    save_half(vae, arguments.output / "vae")
    return measured


def learn_transformer(
    arguments: argparse.Namespace, footage: Footage
) -> tuple[dict[str, Any], torch.Tensor]:
    device = footage.pixels_NCFHW.device
    vae = AutoencoderKLWan.from_pretrained(arguments.output / "vae", dtype=torch.float32)
    # the same statistics as in the configuration, which they come from
    latent_NCThw = measure_latents(vae.to(device), footage)
    transformer, measured = train_transformer(
        footage,
        latent_NCThw,
        seconds=arguments.transformer_s,
        max_steps=arguments.transformer_steps,
        batch=arguments.transformer_batch,
        graphed=not arguments.eager,
        seed=arguments.seed,
    )
    save_half(transformer, arguments.output / "transformer")
    return measured, latent_NCThw


def show(
    arguments: argparse.Namespace, footage: Footage, latent_NCThw: torch.Tensor
) -> dict[str, Any]:
    """Samples of every caption by the base, then by a LoRA; the sheet; how many are recognised."""
    device = latent_NCThw.device
    steps = max(1, arguments.lora_passes // 4)
    run = open_run(arguments.output, device, steps, arguments.seed)
    decoder = Decoder(arguments.output, device)
    known = [subject for subject in footage.subjects if subject != HELD_OUT]
    rows: list[tuple[str, Frames]] = []
    measured: dict[str, Any] = {}

    def draw(name: str, captions: list[int]) -> None:
        latents = {
            k: sample(run, footage, k, arguments.seed, arguments.sample_steps) for k in captions
        }
        for k, latent_CThw in latents.items():
            label = f"{k + 1} {name}\n{footage.caption_subjects[k]}"
            rows.append((label.replace("cameraman", "camera"), decoder.decode(latent_CThw)))
        measured[f"{name}_retrieval_known"] = retrieval(latents, footage, latent_NCThw, known)
        measured[f"{name}_retrieval_held_out"] = retrieval(
            latents, footage, latent_NCThw, [HELD_OUT]
        )

    everything = list(range(0, len(footage.captions), arguments.every))
    draw("base", everything)
    measured["lora"] = train_lora(run, footage, latent_NCThw)
    draw("LoRA", everything)
    lora_files.save_diffusers(run.adapters, arguments.output / lora_files.DIFFUSERS_FILE)

    for subject in footage.subjects:
        number = footage.subjects.index(subject)
        windows = (footage.excluded_N & (footage.subject_N == number)).nonzero()[:, 0]
        if not len(windows):
            continue
        real_CFHW = footage.pixels_NCFHW[windows[0]]
        rows.append((f"real\n{subject[:8]}", real_CFHW.permute(1, 2, 3, 0).cpu().numpy()))
        rows.append((f"VAE\n{subject[:8]}", decoder.decode(latent_NCThw[windows[0]])))
    contact_sheet(rows).save(arguments.output / "sheet.png")
    return measured


def train(arguments: argparse.Namespace) -> None:
    output, start_s = arguments.output, time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    diffusers_logging.disable_progress_bar()
    footage = load(arguments.footage or output, device, arguments.every)
    metrics_file = output / "metrics.json"
    metrics: dict[str, Any] = json.loads(metrics_file.read_text()) if metrics_file.exists() else {}
    print(
        f"{len(footage.caption_N)} windows, {int(footage.excluded_N.sum())} of them excluded, "
        f"{len(footage.captions)} captions, loaded in {time.perf_counter() - start_s:.0f} s",
        flush=True,
    )
    metrics["seed"] = arguments.seed
    metrics["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    metrics["versions"] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    if arguments.part in ("vae", "all"):
        metrics["vae"] = learn_vae(arguments, footage)
        metrics_file.write_text(json.dumps(metrics, indent=1) + "\n")
    if arguments.part in ("transformer", "all"):
        metrics["transformer"], latent_NCThw = learn_transformer(arguments, footage)
        metrics_file.write_text(json.dumps(metrics, indent=1) + "\n")
        metrics["samples"] = show(arguments, footage, latent_NCThw)
        files = [output / part / WEIGHTS for part in ("vae", "transformer")]
        total_mib = sum(file.stat().st_size for file in files) / 2**20
        metrics["weights_mib"] = round(total_mib, 2)
        metrics["xxh3_128"] = {file.parent.name: file_xxh3(file) for file in files}
        if total_mib > MAX_MIB:
            print(f"learn: the weights are {total_mib:.2f} MiB, over {MAX_MIB}", file=sys.stderr)
    metrics[f"seconds_{arguments.part}"] = round(time.perf_counter() - start_s, 1)
    metrics_file.write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["prepare", "train", "controls", "verdicts"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--footage", type=Path, help="folder of footage.npz, default OUTPUT")
    parser.add_argument("--part", choices=["vae", "transformer", "all"], default="all")
    parser.add_argument("--vae-s", type=float, default=240.0, help="seconds of its training")
    parser.add_argument("--transformer-s", type=float, default=150.0)
    parser.add_argument("--vae-steps", type=int, default=0, help="instead of seconds")
    parser.add_argument("--transformer-steps", type=int, default=0)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--transformer-batch", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, help="one window of so many, for a try")
    parser.add_argument("--lora-passes", type=int, default=5000)
    parser.add_argument("--control-steps", type=int, default=200, help="of each wrong LoRA")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command != "verdicts":
        arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.command == "prepare":
            prepare(arguments.output, FOLDER, arguments.seed)
        elif arguments.command == "controls":
            train_controls(arguments.output, arguments.control_steps, arguments.seed)
        elif arguments.command == "verdicts":
            sys.exit(not say(arguments.output))
        else:
            train(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"learn: {error}")


if __name__ == "__main__":
    main()
