"""pictures.py: JPEG and MP4 as the format asks, one encoder for a whole build, and faults a
viewer would see.
"""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from loader.mp4 import Mp4Error, encode_mp4
from loader.shape import Bucket
from shardgen.media.decode import decode_window
from shardgen.media.pictures import (
    choose_mp4_encoder,
    encode_jpeg,
    window_faults,
)
from shardgen.media.probe import probe


def test_jpeg_is_close_and_mp4_is_constant_rate_with_closed_short_gops(tmp_path: Path) -> None:
    y, x = np.mgrid[0:96, 0:160].astype(np.uint8)
    frames = np.stack(
        [np.stack([x + np.uint8(3 * i), y * 2, np.full_like(x, 40)], -1) for i in range(29)]
    )
    (tmp_path / "a.jpg").write_bytes(encode_jpeg(frames[0]))
    assert np.abs(np.asarray(Image.open(tmp_path / "a.jpg")).astype(int) - frames[0]).mean() < 1.5
    data = encode_mp4(frames, 24.0)
    for size in (1_000, 30_000, 1_000_000, 3_000_000):  # whatever memory held before
        used = [np.full(size, value, np.uint8) for value in (255, 17)]
        del used
        assert data == encode_mp4(frames, 24.0)
    (tmp_path / "a.mp4").write_bytes(data)
    found = probe(tmp_path / "a.mp4")
    assert (found.codec, found.pix_fmt, found.num_frames, found.fps) == (
        "h264",
        "yuv420p",
        29,
        24.0,
    )
    assert (found.color_matrix, found.color_range, found.variable_frame_rate) == (
        "bt709",
        "tv",
        False,
    )
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.profile == "High"
        keyframes = [i for i, frame in enumerate(container.decode(stream)) if frame.key_frame]
    assert keyframes[0] == 0 and max(np.diff(keyframes)) <= 12
    again = decode_window(tmp_path / "a.mp4", 0, 24.0, Bucket(160, 96, 29))
    assert np.abs(again.astype(int) - frames).mean() < 4


def test_an_encoder_that_was_asked_for_by_name_is_never_replaced() -> None:
    """There is no NVENC on a machine without a GPU: "auto" may say libx264, the name may not."""
    assert choose_mp4_encoder("libx264") == "libx264"
    frames = np.zeros((2, 256, 256, 3), np.uint8)
    try:
        encode_mp4(frames, 24.0, "h264_nvenc")
    except Mp4Error:
        assert choose_mp4_encoder("auto") == "libx264"
        with pytest.raises(Mp4Error, match="h264_nvenc does not work here"):
            choose_mp4_encoder("h264_nvenc")
    else:
        assert choose_mp4_encoder("auto") == choose_mp4_encoder("h264_nvenc") == "h264_nvenc"


def test_each_file_names_its_encoder(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encode_mp4(np.zeros((5, 96, 160, 3), np.uint8), 24.0))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == "libx264"


@pytest.mark.parametrize(
    ("level", "noise", "moving", "expected"),
    [
        (4, 2, True, ["black"]),
        (4, 2, False, ["black", "frozen"]),
        (28, 6, True, ["dark"]),
        (120, 20, True, []),
        (120, 20, False, ["frozen"]),
    ],
)
def test_faults_of_a_letterboxed_window(
    level: int, noise: int, moving: bool, expected: list[str]
) -> None:
    rng = np.random.default_rng(0)
    frames = np.zeros((9, 96, 160, 3), np.uint8)
    for i in range(9):
        if i == 0 or moving:
            picture = rng.normal(level, noise, (60, 160, 3)).clip(0, 255)
        frames[i, 18:78] = picture
    assert window_faults(frames) == expected
    assert "frozen" not in window_faults(frames[:1])
