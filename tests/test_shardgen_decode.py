"""Frames by timestamp, geometry and colour as the file states them, and damage that is
named, not hidden.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loader.shape import Bucket
from shardgen.media.decode import decode_window, decode_windows
from shardgen.media.errors import MediaError
from shardgen.media.probe import probe
from tools.fake.clips import counting_clip, grey, levels, ntsc, write_clip

BUCKET = Bucket(160, 96, 9)
YELLOW_601, YELLOW_709 = (210, 16, 146), (219, 16, 138)  # RGB 255,255,0 in narrow range


@pytest.mark.parametrize(
    "times",
    [
        ntsc(40),
        [Fraction(i, 25) for i in range(40)],
        [Fraction(i, 50) for i in range(45)],
        [Fraction(i, 30) if i < 10 else Fraction(1, 3) + Fraction(i - 10, 15) for i in range(30)],
    ],
    ids=["29.97", "25", "50", "variable"],
)
@pytest.mark.parametrize("start_ms", [0, 367])
def test_each_output_frame_is_the_one_on_screen_at_its_time(
    tmp_path: Path, times: list[Fraction], start_ms: int
) -> None:
    path = counting_clip(tmp_path / "a.mp4", times)
    # a millisecond of tolerance
    wanted = [Fraction(start_ms + 1, 1000) + Fraction(i, 24) for i in range(9)]
    expected = [max(j for j, time in enumerate(times) if time <= at) for at in wanted]
    assert levels(decode_window(path, start_ms, 24.0, BUCKET)) == expected


def test_all_windows_of_a_clip_come_from_one_pass_and_equal_single_decodes(tmp_path: Path) -> None:
    path = counting_clip(tmp_path / "a.mp4", ntsc(50))
    starts = [900, 0, 200]  # the last two overlap
    windows = dict(decode_windows(path, starts, 24.0, BUCKET))
    for index, start_ms in enumerate(starts):
        assert np.array_equal(windows[index], decode_window(path, start_ms, 24.0, BUCKET))


@pytest.mark.parametrize(
    ("matrix", "width", "yuv"),
    [(1, 160, YELLOW_709), (6, 160, YELLOW_601), (2, 160, YELLOW_601), (2, 1280, YELLOW_709)],
)
def test_colour_follows_the_matrix_and_unstated_means_601_for_sd(
    tmp_path: Path, matrix: int, width: int, yuv: tuple[int, int, int]
) -> None:
    picture = np.stack([np.full((96, width), v, np.uint8) for v in yuv])
    path = write_clip(tmp_path / "a.mp4", [picture] * 10, ntsc(10), matrix=matrix)
    middle = decode_window(path, 0, 24.0, Bucket(160, 96, 5))[:, 48, 80].astype(int)
    assert np.abs(middle - [255, 255, 0]).max() <= 3


def test_full_range_is_not_stretched_again(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", [grey(8)] * 10, ntsc(10), full_range=True)
    assert probe(path).color_range == "pc"
    assert abs(decode_window(path, 0, 24.0, Bucket(160, 96, 5)).astype(int) - 8).max() <= 1


def test_letterbox_crop_and_rotation_land_where_fit_says(tmp_path: Path) -> None:
    frames = []
    for _ in range(10):  # left half dark, right half light
        frame = grey(40, 192, 96)
        frame[0, :, 96:] = 200
        frames.append(frame)
    path = write_clip(tmp_path / "a.mp4", frames, ntsc(10))
    boxed = decode_window(path, 0, 24.0, Bucket(96, 96, 1))[0]
    assert (
        boxed[:23].max() == 0
        and boxed[73:].max() == 0
        and boxed[30:60, :40].mean() < 60 < boxed[30:60, 56:].mean()
    )
    filled = decode_window(path, 0, 24.0, Bucket(96, 96, 1), "crop")[0]
    assert filled[0, 5].mean() < 60 and filled[-1, -5].mean() > 150
    turned = write_clip(tmp_path / "r.mp4", frames, ntsc(10), rotation=90)
    assert probe(turned).rotation_deg == 90
    # anticlockwise: the right half goes up
    upright = decode_window(turned, 0, 24.0, Bucket(96, 192, 1))[0]
    assert upright[:90].mean() > 150 and upright[102:].mean() < 60


def test_images_are_one_frame_and_follow_exif(tmp_path: Path) -> None:
    picture = np.zeros((96, 160, 3), np.uint8)
    picture[:, 80:] = (250, 10, 10)
    Image.fromarray(picture).save(tmp_path / "a.png")
    found = probe(tmp_path / "a.png")
    assert (found.media_type, found.num_frames, found.width_px, found.height_px) == (
        "image",
        1,
        160,
        96,
    )
    frames = decode_window(tmp_path / "a.png", 0, 24.0, Bucket(160, 96, 1))
    assert np.array_equal(frames[0], picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert probe(tmp_path / "a.jpg").rotation_deg == -90
    upright = decode_window(tmp_path / "a.jpg", 0, 24.0, Bucket(96, 160, 1))[0]
    assert upright[100:, :, 0].mean() > 200 and upright[:60].mean() < 20


def test_interlaced_frames_are_woven_no_more(tmp_path: Path) -> None:
    frames = []
    # a bar moves 8 px a frame, 4 px a field: the fields of one frame disagree at its edges
    for i in range(20):
        frame = grey(40)
        frame[0, 0::2, 8 * i % 120 : 8 * i % 120 + 20] = 220
        frame[0, 1::2, 8 * i % 120 + 4 : 8 * i % 120 + 24] = 220
        frames.append(frame)
    times = [Fraction(i, 25) for i in range(20)]
    woven = write_clip(tmp_path / "p.mp4", frames, times)
    fields = write_clip(
        tmp_path / "i.mp4", frames, times, options={"flags": "+ildct+ilme", "x264-params": "tff=1"}
    )
    assert probe(fields).interlaced and not probe(woven).interlaced
    assert probe(fields).num_frames == 20 and probe(fields).fps == 25.0
    combs = [
        np.abs(
            np.diff(decode_window(path, 200, 24.0, BUCKET)[:, :, :, 0].astype(int), axis=1)
        ).mean()
        for path in (woven, fields)
    ]
    assert combs[1] < 0.35 * combs[0]


def test_a_window_past_the_end_is_an_error_not_a_short_clip(tmp_path: Path) -> None:
    path = counting_clip(tmp_path / "a.mp4", ntsc(30))
    # its last frame is on screen at 993 ms, the end is at 1001
    assert len(decode_window(path, 660, 24.0, BUCKET)) == 9
    with pytest.raises(MediaError, match="media_truncated"):
        decode_window(path, 670, 24.0, BUCKET)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 40_000)])
def test_a_sliver_that_can_not_fill_the_canvas_is_refused_not_an_error_of_the_shard(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "sliver.png"
    Image.new("RGB", size, "white").save(path)
    bucket = Bucket(1280, 704, 1)
    assert decode_window(path, 0, 24.0, bucket, "letterbox").shape == (1, 704, 1280, 3)
    with pytest.raises(MediaError, match="at most 178956970 pixels are scaled") as caught:
        decode_window(path, 0, 24.0, bucket, "crop")
    assert caught.value.reason == "media_too_large"
    # few pixels, but more rows than swscale takes
    Image.new("RGB", (1, 200_000), "white").save(path)
    with pytest.raises(MediaError, match="rgb24 of 1x200000 to 16x3200000 can't be scaled"):
        decode_window(path, 0, 24.0, Bucket(16, 16, 1), "crop")


def test_interlaced_pictures_of_two_lines_are_refused_not_an_error_of_the_shard(
    tmp_path: Path,
) -> None:
    lines = [np.full((3, 2, 64), 120, np.uint8)] * 12
    path = write_clip(
        tmp_path / "a.mov",
        lines,
        [Fraction(i, 25) for i in range(12)],
        codec="mpeg2video",
        rate=Fraction(25),
        options={"flags": "+ildct+ilme"},
    )
    assert probe(path).interlaced
    with pytest.raises(MediaError, match="can't be deinterlaced"):
        decode_window(path, 0, 24.0, BUCKET)
