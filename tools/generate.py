"""Base model against LoRA, same prompts, same seed, in diffusers' own pipeline, as a user of the
LoRA would run it:

    python -m tools.generate --model MODEL --lora RUN/lora.safetensors --output OUT --shape
    832x480x49 --prompt "..."

A LoRA that did not load gives pictures too: the base model's. So nothing is written before two
proofs: each tensor of the file sits in the transformer, and the pictures differ. OUT gets an MP4
of each clip, contact_sheet.png with base above LoRA, and samples.json with what was measured.
With --image every clip starts from that picture (I2V).
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open

from loader.shape import WAN22, Bucket
from shardgen.media.pictures import encode_mp4

FPS = 24.0
SHEET_COLUMNS = 5
LABEL_WIDTH_PX = 64
Frames = np.ndarray[Any, Any]  # uint8 RGB [F, H, W, 3]


class NotAppliedError(ValueError):
    """The LoRA is not in effect; the message says what is missing."""


@dataclass(frozen=True)
class Options:
    """How to generate; equal for base and LoRA."""

    shape: Bucket
    num_steps: int
    guidance: float
    seed: int
    negative_prompt: str
    image: Image.Image | None


def load_pipeline(model: Path, device: str, dtype: torch.dtype, image_to_video: bool) -> Any:
    """WanPipeline or WanImageToVideoPipeline; the VAE in float32. On a GPU each part is there
    only while it works.
    """
    kind = WanImageToVideoPipeline if image_to_video else WanPipeline
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32)
    pipeline = kind.from_pretrained(model, vae=vae, dtype=dtype)
    pipeline.set_progress_bar_config(leave=False)
    if device == "cuda":
        pipeline.enable_model_cpu_offload()
    return pipeline


def generate(pipeline: Any, prompt: str, options: Options) -> Frames:
    """One clip, uint8 [F, H, W, 3]; an image is letterboxed, as for training. The seed is of the
    CPU's generator, so devices agree on the noise.
    """
    shape = options.shape
    image = (
        {}
        if options.image is None
        else {"image": ImageOps.pad(options.image, (shape.width_px, shape.height_px))}
    )
    frames = pipeline(
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        width=shape.width_px,
        height=shape.height_px,
        num_frames=shape.num_frames,
        num_inference_steps=options.num_steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="np",
        **image,
    ).frames[0]
    return np.asarray(np.clip(np.rint(frames * 255), 0, 255), np.uint8)


def apply_lora(pipeline: Any, path: Path) -> tuple[int, list[float]]:
    """Load a LoRA file (diffusers or ComfyUI keys); returns its number of tensors and the scales
    alpha/r in effect.

    Raises NotAppliedError unless exactly the file's tensors are in the transformer.
    """
    with safe_open(path, framework="pt") as file:
        wanted = sum(not name.endswith(".alpha") for name in file.keys())
    pipeline.load_lora_weights(str(path))
    loaded = [
        name
        for name, _ in pipeline.transformer.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    ]
    if len(loaded) != wanted or not wanted:
        raise NotAppliedError(
            f"{path}: the file has {wanted} LoRA tensors, {len(loaded)} are in the transformer; its "
            f"keys do not fit this model"
        )
    scales = {
        scale
        for module in pipeline.transformer.modules()
        for scale in getattr(module, "scaling", {}).values()
    }
    return wanted, sorted(scales)


def mean_difference(base: Frames, lora: Frames) -> float:
    """Mean absolute difference in 8-bit levels. Raises NotAppliedError where it is 0."""
    difference = float(np.abs(base.astype(np.int16) - lora.astype(np.int16)).mean())
    if difference == 0.0:
        raise NotAppliedError(
            "the LoRA's tensors are loaded, but its pictures equal the base model's: all of its "
            "lora_B are zero (an untrained LoRA), or its effect is below one 8-bit level"
        )
    return difference


def contact_sheet(rows: list[tuple[str, Frames]]) -> Image.Image:
    """One row of evenly spaced frames per clip, labelled on the left."""
    num_frames, height_px, width_px = rows[0][1].shape[:3]
    columns = np.unique(
        np.linspace(0, num_frames - 1, min(SHEET_COLUMNS, num_frames)).round().astype(int)
    )
    gap_px = 4
    sheet = Image.new(
        "RGB",
        (LABEL_WIDTH_PX + len(columns) * (width_px + gap_px), len(rows) * (height_px + gap_px)),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for row, (label, frames) in enumerate(rows):
        top_px = row * (height_px + gap_px)
        draw.multiline_text((6, top_px + 6), label, fill="black", font=font)
        for column, number in enumerate(columns):
            sheet.paste(
                Image.fromarray(frames[number]),
                (LABEL_WIDTH_PX + column * (width_px + gap_px), top_px),
            )
    return sheet


def sample(
    model: Path,
    lora: Path,
    output: Path,
    prompts: list[str],
    options: Options,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Generate every prompt with the base and with the LoRA, prove the difference, then write all
    files.
    """
    pipeline = load_pipeline(model, device, dtype, options.image is not None)
    base = [generate(pipeline, prompt, options) for prompt in prompts]
    num_tensors, scales = apply_lora(pipeline, lora)
    tuned = [generate(pipeline, prompt, options) for prompt in prompts]
    differences = [mean_difference(*pair) for pair in zip(base, tuned, strict=True)]

    output.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, Frames]] = []
    for number, pair in enumerate(zip(base, tuned, strict=True), start=1):
        for name, frames in zip(("base", "LoRA"), pair, strict=True):
            (output / f"{number:02d}-{name.lower()}.mp4").write_bytes(encode_mp4(frames, FPS))
            rows.append((f"{number}\n{name}", frames))
    contact_sheet(rows).save(output / "contact_sheet.png")
    (output / "samples.json").write_text(
        json.dumps(
            {
                "model": str(model),
                "lora": str(lora),
                "num_lora_tensors": num_tensors,
                "scales": scales,
                "shape": str(options.shape),
                "num_steps": options.num_steps,
                "guidance": options.guidance,
                "seed": options.seed,
                "image_to_video": options.image is not None,
                "clips": [
                    {"prompt": prompt, "mean_difference_levels": round(difference, 3)}
                    for prompt, difference in zip(prompts, differences, strict=True)
                ],
            },
            ensure_ascii=False,
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    print(
        f"{lora}: all {num_tensors} tensors are in the transformer, scale {scales} (alpha / rank; in a "
        f"ComfyUI file it is part of the tensors)"
    )
    for number, (prompt, difference) in enumerate(zip(prompts, differences, strict=True), start=1):
        print(
            f"{number}: LoRA differs from base by {difference:.2f} of 255 levels on average: {prompt}"
        )
    print(f"{output / 'contact_sheet.png'}: base above LoRA, seed {options.seed}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder in diffusers layout")
    parser.add_argument(
        "--lora", type=Path, required=True, help="a LoRA file, diffusers or ComfyUI keys"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT")
    parser.add_argument("--shape", default="832x480x49", metavar="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--image", type=Path, help="first frame: image-to-video")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="default: float32 on the CPU, float16 on a GPU",
    )
    arguments = parser.parse_args()
    diffusers_logging.disable_progress_bar()  # of loading; the denoising keeps its own
    transformers.logging.disable_progress_bar()
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "float16")
    try:
        image = Image.open(arguments.image).convert("RGB") if arguments.image else None
        options = Options(
            WAN22.parse(arguments.shape),
            arguments.steps,
            arguments.guidance,
            arguments.seed,
            arguments.negative_prompt,
            image,
        )
        sample(
            arguments.model,
            arguments.lora,
            arguments.output,
            arguments.prompt,
            options,
            arguments.device,
            getattr(torch, dtype),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"sample: {error}")


if __name__ == "__main__":
    main()
