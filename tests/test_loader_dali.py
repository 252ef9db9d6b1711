"""Raw frames through DALI on the CPU: the right pixels, and one bad file spoils no other."""

import io
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed: the extra dali-cuda12")

from bench.gpu_inputs import dali_frame, make_clips
from loader.dali import DecodeError, FirstFrames, FrameDecoder
from loader.mp4 import BT709, encode_mp4
from loader.shape import Bucket
from loader.vae.encoder import load_vae_encoder
from shardgen.media.colour import BT601
from tools.fake.batch import write_synthetic_dataset
from tools.fake.feed import make_feed

CPU = torch.device("cpu")


def jpeg(seed: int, width: int = 96, height: int = 64) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=95
    )
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
            assert (
                isinstance(frame, torch.Tensor)
                and frame.dtype == dtype
                and frame.shape == (3, 1, 64, 96)
            )
            # decoders may round differently
            assert (frame - pixels(jpeg(seed))).abs().max() <= 1 / 127.5 + 1e-3


def test_sizes_may_differ_within_a_batch() -> None:
    frames = FrameDecoder("jpg", CPU, torch.float32, max_batch=2).decode(
        [jpeg(1, 96, 64), jpeg(2, 32, 128)]
    )
    shapes = [tuple(frame.shape) for frame in frames if isinstance(frame, torch.Tensor)]
    assert shapes == [(3, 1, 64, 96), (3, 1, 128, 32)]


@pytest.mark.parametrize(
    "bad", [b"no image", jpeg(9)[:100], b"\xff\xd8\xff"], ids=["text", "truncated", "marker"]
)
def test_a_bad_file_fails_alone_and_the_pipeline_goes_on(bad: bytes) -> None:
    decoder = FrameDecoder("jpg", CPU, torch.float32, max_batch=3)
    first, broken, last = decoder.decode([jpeg(1), bad, jpeg(2)])
    assert isinstance(broken, DecodeError) and str(broken)
    for seed, frame in ((1, first), (2, last), (3, decoder.decode([jpeg(3)])[0])):
        assert isinstance(frame, torch.Tensor)
        assert (frame - pixels(jpeg(seed))).abs().max() <= 1 / 127.5 + 1e-6


def test_h264_without_a_gpu_is_refused_with_the_way_out() -> None:
    h264 = encode_mp4(np.zeros((5, 64, 96, 3), np.uint8), 24.0)
    (error,) = FrameDecoder("mp4", CPU, torch.float32, max_batch=1).decode([h264])
    assert (
        isinstance(error, DecodeError)
        and "H.264 on a GPU only" in str(error)
        and "KEY.jpg" in str(error)
    )


def motion_jpeg(frames: list[PIL.Image.Image], matrix: int) -> bytes:
    """Stands in for H.264, which DALI decodes on a GPU only."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuvj420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        for t, picture in enumerate(frames):
            frame = av.VideoFrame.from_image(picture).reformat(
                format="yuvj420p", dst_colorspace=matrix
            )
            frame.pts = t
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(("matrix", "bt709"), [(BT709, True), (BT601, False)])
def test_the_colours_of_a_video_are_those_of_its_matrix(matrix: int, bt709: bool) -> None:
    clip = motion_jpeg([PIL.Image.open(io.BytesIO(jpeg(seed))) for seed in range(3)], matrix)
    errors = []
    for assumed in (bt709, not bt709):
        decoder = FrameDecoder("mp4", CPU, torch.float32, max_batch=1, num_frames=3, bt709=assumed)
        (frames,) = decoder.decode([clip])
        assert isinstance(frames, torch.Tensor)
        wanted = torch.cat([pixels(jpeg(seed)) for seed in range(3)], 1)
        errors.append((frames - wanted).abs().mean().item() * 127.5)
    assert errors[0] < 2 < 3 < errors[1], errors


def test_dalis_arithmetic_gives_ffmpegs_frame_but_for_colours_that_bt601_clips(
    tmp_path: Path,
) -> None:
    make_clips(tmp_path, Bucket(640, 352, 5))
    frame, held = dali_frame(tmp_path / "0-planes.png")
    errors = (frame - pixels((tmp_path / "0-709.png").read_bytes())).movedim(0, -1) * 127.5
    assert errors.abs().max() > 20 and held.double().mean() > 0.9
    assert errors[held].mean(0).abs().max() < 0.1  # no tint, though DALI's kernel has one
    # H.264's and DALI's chroma lie a quarter of a chroma pixel apart
    assert errors[held].abs().max() < 8


def test_the_raw_feed_takes_the_first_frame_of_a_clip(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    clip = motion_jpeg([PIL.Image.open(io.BytesIO(jpeg(seed))) for seed in range(5)], BT709)
    write_synthetic_dataset(tmp_path, {"96x64x5": 4}, clips=[clip])
    vae = load_vae_encoder(tiny_checkpoint, CPU, torch.float32)
    expected = [vae.encode(pixels(jpeg(seed)).unsqueeze(0))[0] for seed in range(5)]
    with make_feed(
        tmp_path,
        global_batch=4,
        micro_batch=4,
        i2v_share=1.0,
        caption_dropout=0.0,
        condition="raw",
        vae=vae,
    ) as feed:
        batch, _ = next(feed)
        assert batch.condition_BC1HW is not None and feed.damages == []
    for latent in batch.condition_BC1HW.float():
        errors = [((latent - one).norm() / one.norm()).item() for one in expected]
        assert errors[0] < 0.1 < min(errors[1:])


def test_first_frames_become_latents_and_wrong_sizes_errors(tiny_checkpoint: Path) -> None:
    vae = load_vae_encoder(tiny_checkpoint, CPU, torch.float32)
    frames = FirstFrames(vae, CPU)
    latent = frames.encode("jpg", jpeg(1), Bucket(96, 64, 9))
    assert isinstance(latent, torch.Tensor) and latent.shape == (48, 1, 4, 6)
    assert (latent - vae.encode(pixels(jpeg(1)).unsqueeze(0))[0]).abs().max() < 0.05
    error = frames.encode("jpg", jpeg(1), Bucket(64, 64, 9))
    assert isinstance(error, DecodeError) and "to 96x64x1, not to 64x64x1" in str(error)
