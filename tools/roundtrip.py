"""What the VAE loses: `python -m tools.roundtrip CLIP --model DIR --output DIR`.

Encodes one window of a clip as a build does, decodes it with diffusers' AutoencoderKLWan (whole,
not in tiles, which would give another picture), and writes DIR/roundtrip.json with PSNR and SSIM
of every frame, and DIR/roundtrip.jpg, frames of the clip beside their reconstructions.

PSNR is that of 8-bit RGB. SSIM is that of Wang et al. (2004) on luma: a Gaussian window of 11
pixels with a standard deviation of 1.5, k1 = 0.01, k2 = 0.03, mean over all whole windows.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from loader.files import told
from loader.shape import Bucket
from loader.vae.encoder import VAEError, load_vae_encoder
from shardgen.media.decode import Frames, decode_window
from shardgen.media.errors import MediaError
from tools.device import add_device

SHEET_ROWS, SHEET_WIDTH_PX = 4, 480


class Similarity(NamedTuple):
    """Of one frame and its reconstruction; `psnr_db` is infinite where they are equal."""

    psnr_db: float
    ssim: float


def reconstruct(frames: Frames, model: Path, device: str, dtype: torch.dtype) -> Frames:
    """uint8 [F, H, W, 3] through our encoder and diffusers' decoder. Raises VAEError."""
    video_BCFHW = torch.from_numpy(frames).movedim(-1, 0).unsqueeze(0)
    latent_BCTHW = load_vae_encoder(model, device, dtype).encode(video_BCFHW.to(device))
    vae = AutoencoderKLWan.from_pretrained(model / "vae", torch_dtype=dtype, local_files_only=True)
    vae = vae.to(device).eval()
    mean, std = (
        torch.tensor(vae.config[name], device=device).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    with torch.inference_mode():
        decoded_BCFHW = vae.decode((latent_BCTHW.float() * std + mean).to(dtype)).sample
    pixels_FHWC = ((decoded_BCFHW[0].float().clamp(-1, 1) + 1) * 127.5).round().movedim(0, -1)
    return pixels_FHWC.to(torch.uint8).cpu().numpy()


def similarity(frame: Frames, other: Frames) -> Similarity:
    """PSNR and SSIM of two pictures uint8 [H, W, 3]."""
    a_HWC, b_HWC = (torch.from_numpy(each).float() for each in (frame, other))
    error = float((a_HWC - b_HWC).square().mean())
    psnr_db = 10 * math.log10(255**2 / error) if error else math.inf
    luma = torch.tensor([0.299, 0.587, 0.114])
    return Similarity(psnr_db, ssim(a_HWC @ luma, b_HWC @ luma))


def ssim(a_HW: Tensor, b_HW: Tensor) -> float:
    """The mean structural similarity of two pictures with values from 0 to 255."""
    distance = torch.arange(11) - 5.0
    weights = torch.exp(-distance.square() / (2 * 1.5**2))
    weights = weights / weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def smoothed(x_HW: Tensor) -> Tensor:
        rows = F.conv2d(x_HW[None, None], weights.view(1, 1, -1, 1))
        return F.conv2d(rows, weights.view(1, 1, 1, -1))

    mean_a, mean_b = smoothed(a_HW), smoothed(b_HW)
    variance_a = smoothed(a_HW * a_HW) - mean_a.square()
    variance_b = smoothed(b_HW * b_HW) - mean_b.square()
    covariance = smoothed(a_HW * b_HW) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float((luminance * structure).mean())


def sheet(frames: Frames, decoded: Frames) -> Image.Image:
    """Frames evenly spread over the window, each beside its reconstruction."""
    rows = min(SHEET_ROWS, len(frames))
    numbers = [round(i * (len(frames) - 1) / max(rows - 1, 1)) for i in range(rows)]
    picture = np.concatenate(
        [np.concatenate([frames[number], decoded[number]], 1) for number in numbers]
    )
    image = Image.fromarray(picture)
    scale = min(1.0, 2 * SHEET_WIDTH_PX / image.width)
    return image.resize((round(image.width * scale), round(image.height * scale)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the VAE loses of a clip.")
    parser.add_argument("clip", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="a Wan model, diffusers layout")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", default="1280x704x49", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--start-ms", type=int, default=0)
    parser.add_argument("--fps", type=float, default=24.0)
    add_device(parser)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float32")
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.fps < math.inf:
            raise ValueError(f"--fps {options.fps}: give frames a second, above 0")
        bucket = Bucket.parse(options.shape)
        options.output.mkdir(parents=True, exist_ok=True)
        frames = decode_window(options.clip, options.start_ms, options.fps, bucket, "crop")
        dtype = getattr(torch, options.dtype)
        decoded = reconstruct(frames, options.model, options.device, dtype)
    except (MediaError, VAEError, OSError, ValueError) as error:
        print(f"tools.roundtrip: {options.clip}: {told(error)}", file=sys.stderr)
        return 1
    by_frame = [similarity(*pair) for pair in zip(frames, decoded, strict=True)]
    result: dict[str, Any] = {
        "clip": str(options.clip),
        "shape": str(bucket),
        "dtype": options.dtype,
        "mean_psnr_db": float(np.mean([each.psnr_db for each in by_frame])),
        "mean_ssim": float(np.mean([each.ssim for each in by_frame])),
        "frames": [each._asdict() for each in by_frame],
    }
    (options.output / "roundtrip.json").write_text(json.dumps(result, indent=1) + "\n")
    sheet(frames, decoded).save(options.output / "roundtrip.jpg", quality=92)
    print(
        f"{options.clip}: {len(by_frame)} frames of {bucket.width_px}x{bucket.height_px}, PSNR "
        f"{result['mean_psnr_db']:.2f} dB, SSIM {result['mean_ssim']:.4f} (means over frames); "
        f"{options.output / 'roundtrip.jpg'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
