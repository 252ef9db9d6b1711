"""Raw frames through DALI on the CPU: the right pixels, and one bad file spoils no other."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from loader.dali import DecodeError, FirstFrames, FrameDecoder
from loader.sample import Bucket
from loader.vae import load_vae_encoder

CPU = torch.device("cpu")


def jpeg(seed: int, width: int = 96, height: int = 64) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def pixels(file: bytes) -> torch.Tensor:
    """[3, 1, H, W] in [-1, 1], decoded by Pillow."""
    array = np.array(PIL.Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(1) / 127.5 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decodes_to_normalised_pixels(dtype: torch.dtype) -> None:
    decoder = FrameDecoder("jpg", CPU, dtype, max_batch=4)
    for seeds in ([1, 2, 3], [4], [5, 6, 7, 8]):
        for seed, frame in zip(seeds, decoder.decode([jpeg(seed) for seed in seeds]), strict=True):
            assert isinstance(frame, torch.Tensor) and frame.dtype == dtype and frame.shape == (3, 1, 64, 96)
            assert (frame - pixels(jpeg(seed))).abs().max() <= 1 / 127.5 + 1e-3  # decoders may round differently


def test_sizes_may_differ_within_a_batch() -> None:
    frames = FrameDecoder("jpg", CPU, torch.float32, max_batch=2).decode([jpeg(1, 96, 64), jpeg(2, 32, 128)])
    shapes = [tuple(frame.shape) for frame in frames if isinstance(frame, torch.Tensor)]
    assert shapes == [(3, 1, 64, 96), (3, 1, 128, 32)]


@pytest.mark.parametrize("bad", [b"no image", jpeg(9)[:100], b"\xff\xd8\xff"], ids=["text", "truncated", "marker"])
def test_a_bad_file_fails_alone_and_the_pipeline_goes_on(bad: bytes) -> None:
    decoder = FrameDecoder("jpg", CPU, torch.float32, max_batch=3)
    first, broken, last = decoder.decode([jpeg(1), bad, jpeg(2)])
    assert isinstance(broken, DecodeError) and str(broken)
    for seed, frame in ((1, first), (2, last), (3, decoder.decode([jpeg(3)])[0])):
        assert isinstance(frame, torch.Tensor)
        assert (frame - pixels(jpeg(seed))).abs().max() <= 1 / 127.5 + 1e-6


def test_mp4_without_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"H\.264 on a GPU only.*KEY\.jpg"):
        FrameDecoder("mp4", CPU, torch.float32, max_batch=1)


def test_first_frames_become_latents_and_wrong_sizes_errors(tiny_checkpoint: Path) -> None:
    vae = load_vae_encoder(tiny_checkpoint, CPU, torch.float32)
    frames = FirstFrames(vae, CPU)
    latent = frames.encode("jpg", jpeg(1), Bucket(96, 64, 9))
    assert isinstance(latent, torch.Tensor) and latent.shape == (48, 1, 4, 6)
    assert (latent - vae.encode(pixels(jpeg(1)).unsqueeze(0))[0]).abs().max() < 0.05
    error = frames.encode("jpg", jpeg(1), Bucket(64, 64, 9))
    assert isinstance(error, DecodeError) and "96x64x1, not the first frame of a 64x64x9" in str(error)
