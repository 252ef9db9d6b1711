"""Base model against LoRA, same prompts, same seed, in diffusers' own pipeline, as a user of the
LoRA would run it:

    python -m tools.generate --model MODEL --lora RUN/lora.safetensors --output OUT \
        --shape 832x480x49 --prompt "..."

A14B has a LoRA for each of its transformers: --lora-high and --lora-low, or one of them.

A LoRA that did not load gives pictures too: the base model's. So nothing is written before the
proofs: the file's tensors are finite and not all zero, each of them sits in its transformer, of
A14B each changes what its transformer answers and that one has run, and the pictures are finite and
differ. OUT gets an MP4 of each clip, contact_sheet.png with base above LoRA, and samples.json with
what was measured. With --image every clip starts from that picture (I2V).

For other programs: `load_pipeline`, `generate`, and tools/applied.py.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageOps

from loader.files import naming, told
from loader.models import ModelKind, read_kind
from loader.mp4 import encode_mp4
from loader.shape import Bucket
from shardgen.media.errors import MediaError
from shardgen.media.images import load_image
from tools.applied import (
    apply_lora,
    check_experts,
    check_lora,
    counting_passes,
    mean_difference,
)
from tools.device import add_device
from tools.prompts import check_lengths
from train.contact_sheet import Frames, contact_sheet
from train.lora.formats import expert_of

# of a model folder, beside its transformers
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Options:
    """How to generate; equal for base and LoRA. shift: of the noise schedule, 5 at 720p and 3 at
    480p; None: what the model folder's scheduler says. guidance_low: of A14B's low-noise expert.
    """

    shape: Bucket
    num_steps: int
    guidance: float
    seed: int
    negative_prompt: str
    image: Image.Image | None
    shift: float | None = None
    guidance_low: float | None = None


def load_pipeline(
    model: Path, device: str, dtype: torch.dtype, image_to_video: bool, shift: float | None = None
) -> Any:
    """WanPipeline or WanImageToVideoPipeline; the VAE in float32. On a GPU each part is there
    only while it works. `shift` replaces that of the folder's scheduler.
    """
    check_parts(model)
    kind = WanImageToVideoPipeline if image_to_video else WanPipeline
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32)
    pipeline = kind.from_pretrained(model, vae=vae, dtype=dtype)
    if shift is not None:
        pipeline.scheduler = UniPCMultistepScheduler.from_config(
            pipeline.scheduler.config, flow_shift=shift
        )
    pipeline.set_progress_bar_config(leave=False)
    if device == "cuda":
        pipeline.enable_model_cpu_offload()
    return pipeline


def generate(pipeline: Any, prompt: str, options: Options, subject: str) -> Frames:
    """One clip, uint8 [F, H, W, 3]; an image is letterboxed, as for training. The seed is of the
    CPU's generator, so devices agree on the noise.

    Raises ValueError, naming `subject`, where the pictures hold NaN: cast to bytes they would
    look like a black clip.
    """
    shape = options.shape
    more: dict[str, Any] = {}
    if options.image is not None:
        more["image"] = ImageOps.pad(options.image, (shape.width_px, shape.height_px))
    if options.guidance_low is not None:
        more["guidance_scale_2"] = options.guidance_low
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
        **more,
    ).frames[0]
    if not np.isfinite(frames).all():
        raise ValueError(
            f"the pictures of {subject} hold NaN or infinity: in float16 activations may overflow, "
            f"so try --dtype bfloat16 or float32; if that changes nothing, its weights are damaged"
        )
    return np.asarray(np.clip(np.rint(frames * 255), 0, 255), np.uint8)


def files_by_transformer(
    kind: ModelKind, lora: Path | None, high: Path | None, low: Path | None
) -> dict[str, Path]:
    """The pipeline's attribute -> the LoRA for it: `lora` of a model of one transformer, `high` and
    `low`, or one of them, of A14B. Raises ValueError for options that don't fit the model, and for
    a file that says to be of the other expert.
    """
    if kind.boundary is None:
        if lora is None or high is not None or low is not None:
            raise ValueError(f"{kind.name} is one transformer: give its LoRA as --lora")
        return {"transformer": lora}
    if lora is not None or (high is None and low is None):
        raise ValueError(
            f"{kind.name} is two transformers with a LoRA each: give --lora-high and --lora-low, "
            f"or one of them"
        )
    files = {}
    for expert, path in (("high", high), ("low", low)):
        if path is None:
            continue
        found = expert_of(path)
        if found not in (None, expert):
            raise ValueError(
                f"--lora-{expert} {path}: is a LoRA of the {found}-noise expert by its metadata; "
                f"give it as --lora-{found}"
            )
        files["transformer" if expert == "high" else "transformer_2"] = path
    return files


def compare(
    model: Path,
    loras: Mapping[str, Path],
    output: Path,
    prompts: list[str],
    options: Options,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Generate every prompt with the base and with the LoRA, prove the difference, then write all
    files. loras: see `files_by_transformer`.
    """
    num_tensors = {name: check_lora(path) for name, path in loras.items()}
    check_parts(model)
    # the pipeline would cut them without a word
    check_lengths([*prompts, options.negative_prompt], model)
    kind = read_kind(model)
    pipeline = load_pipeline(model, device, dtype, options.image is not None, options.shift)
    with counting_passes(pipeline) as passes:
        base = [generate(pipeline, prompt, options, "the base model") for prompt in prompts]
    scales = {
        name: apply_lora(pipeline, path, num_tensors[name], name) for name, path in loras.items()
    }
    experts = check_experts(pipeline, loras, passes) if kind.boundary is not None else {}
    subject = " and ".join(map(str, loras.values()))
    tuned = [generate(pipeline, prompt, options, subject) for prompt in prompts]
    differences = [mean_difference(*pair) for pair in zip(base, tuned, strict=True)]

    output.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, Frames]] = []
    for number, pair in enumerate(zip(base, tuned, strict=True), start=1):
        for name, frames in zip(("base", "LoRA"), pair, strict=True):
            path = output / f"{number:02d}-{name.lower()}.mp4"
            path.write_bytes(encode_mp4(frames, kind.fps))
            rows.append((f"{number}\n{name}", frames))
    contact_sheet(rows).save(output / "contact_sheet.png")
    report = {
        "model": str(model),
        "lora": subject,
        "num_lora_tensors": sum(num_tensors.values()),
        "scales": sorted({scale for found in scales.values() for scale in found}),
        "shape": str(options.shape),
        "num_steps": options.num_steps,
        "guidance": options.guidance,
        "shift": pipeline.scheduler.config.flow_shift,
        "seed": options.seed,
        "image_to_video": options.image is not None,
        "clips": [
            {"prompt": prompt, "mean_difference_levels": round(difference, 3)}
            for prompt, difference in zip(prompts, differences, strict=True)
        ],
    }
    if experts:
        report |= {"guidance_low": options.guidance_low, "experts": experts}
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (output / "samples.json").write_text(text + "\n", encoding="utf-8")
    for name, path in loras.items():
        print(
            f"{path}: all {num_tensors[name]} tensors are in the {name}, scale {scales[name]} "
            f"(alpha / rank; in a ComfyUI file it is part of the tensors)"
        )
    for expert, found in experts.items():
        print(
            f"{expert}-noise expert: ran {found['num_passes']} times, its LoRA changes its answer "
            f"by {found['output_change']:.1%}"
        )
    for number, (prompt, difference) in enumerate(zip(prompts, differences, strict=True), start=1):
        print(f"{number}: differs from base by {difference:.2f} of 255 levels on average: {prompt}")
    print(f"{output / 'contact_sheet.png'}: base above LoRA, seed {options.seed}")


def options_of(arguments: argparse.Namespace, kind: ModelKind) -> Options:
    """What the model takes, where an option is not given, is its official configuration's. Raises
    ValueError for a shape, or a first frame, that it does not take.
    """
    if arguments.image is None and kind.i2v_share == 1.0:
        raise ValueError(f"{kind.name} starts each clip from a picture: give one, --image FILE")
    if arguments.image is not None and kind.i2v_share == 0.0:
        raise ValueError(f"{kind.name} does text to video alone: leave --image out")
    has_experts = kind.boundary is not None
    if arguments.guidance_low is not None and not has_experts:
        raise ValueError(
            f"--guidance-low {arguments.guidance_low:g}: {kind.name} is one transformer, which "
            f"takes --guidance; leave it out"
        )
    num_steps = (40 if has_experts else 50) if arguments.steps is None else arguments.steps
    if num_steps < 1:
        raise ValueError(f"--steps {num_steps}: give at least 1")
    guidance = _given(arguments.guidance, kind.guidance.high)
    guidance_low = _given(arguments.guidance_low, kind.guidance.low)
    for option, value in (("--guidance", guidance), ("--guidance-low", guidance_low)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{option} {value}: give a number from 0 on; 1 is no guidance")
    shift = _given(arguments.shift, kind.shift)
    if not 0 < shift < math.inf:
        raise ValueError(f"--shift {shift}: give a number above 0; 1 is no shift")
    shape = kind.layout.parse(arguments.shape)
    return Options(
        shape=shape,
        num_steps=num_steps,
        guidance=guidance,
        seed=arguments.seed,
        negative_prompt=arguments.negative_prompt,
        image=_first_frame(arguments.image) if arguments.image else None,
        shift=shift,
        guidance_low=guidance_low if has_experts else None,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _first_frame(path: Path) -> Image.Image:
    try:
        return Image.fromarray(load_image(path).upright)
    except MediaError as error:
        raise ValueError(f"{path}: {error}") from error


def check_parts(model: Path) -> None:
    """Are all parts of the pipeline in the folder? Raises ValueError. A tokenizer that is missing
    would be made up by transformers, without a vocabulary.
    """
    for part in PARTS:
        if not any((model / part).glob("*")):
            raise ValueError(
                f"{model / part}: nothing is there, and clips can't be made without it; download "
                f"the whole of the model again"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder in diffusers layout")
    parser.add_argument("--lora", type=Path, help="a LoRA file, diffusers or ComfyUI keys")
    parser.add_argument("--lora-high", type=Path, help="of A14B: for the high-noise transformer")
    parser.add_argument("--lora-low", type=Path, help="of A14B: for the low-noise transformer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT")
    parser.add_argument("--shape", default="832x480x49", metavar="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--image", type=Path, help="first frame: image-to-video")
    parser.add_argument("--steps", type=int, help="default: 50, of A14B 40")
    parser.add_argument("--guidance", type=float, help="default: the model's official one")
    parser.add_argument("--guidance-low", type=float, help="of A14B's low-noise transformer")
    parser.add_argument(
        "--shift",
        type=float,
        help="of the noise schedule: that of training (default: the model's official one)",
    )
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
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
        kind = read_kind(arguments.model)
        options = options_of(arguments, kind)
        loras = files_by_transformer(kind, arguments.lora, arguments.lora_high, arguments.lora_low)
        arguments.output.mkdir(parents=True, exist_ok=True)  # before minutes are spent
        with naming(arguments.output):
            compare(
                arguments.model,
                loras,
                arguments.output,
                arguments.prompt,
                options,
                arguments.device,
                getattr(torch, dtype),
            )
    except (ValueError, OSError) as error:
        sys.exit(f"generate: {told(error)}")


if __name__ == "__main__":
    main()
