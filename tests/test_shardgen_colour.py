"""Colours that a YUV matrix alone does not make right are refused by name; what is transparent in
a video is black; a display matrix lays a picture as a player does.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from loader.mp4 import FULL, NARROW
from loader.shape import Bucket
from shardgen.media.decode import decode_window
from shardgen.media.errors import MediaError
from shardgen.media.geometry import Orientation, orientation_of_matrix
from shardgen.media.probe import probe
from tools.fake.clips import grey, ntsc, write_clip

UNSTATED = 2
UNSPECIFIED = 0


def coloured(
    path: Path, primaries: int = UNSTATED, transfer: int = UNSTATED, matrix: int = UNSTATED
) -> Path:
    """A small clip whose stream states these numbers of ITU-T H.273."""
    names = {"colorprim": primaries, "transfer": transfer, "colormatrix": matrix}
    words = {
        "colorprim": {1: "bt709", 9: "bt2020", 11: "smpte431", 12: "smpte432"},
        "transfer": {1: "bt709", 8: "linear", 13: "iec61966-2-1", 14: "bt2020-10"}
        | {16: "smpte2084", 18: "arib-std-b67"},
        "colormatrix": {1: "bt709", 8: "YCgCo", 9: "bt2020nc", 10: "bt2020c", 14: "ICtCp"},
    }
    stated = [f"{name}={words[name][n]}" for name, n in names.items() if n != UNSTATED]
    return write_clip(
        path, [grey(120)] * 6, ntsc(6), options={"x264-params": ":".join(stated)}, matrix=matrix
    )


@pytest.mark.parametrize(
    ("primaries", "transfer", "matrix", "reason"),
    [
        (9, 16, 9, "media_hdr"),
        (9, 18, 9, "media_hdr"),
        (UNSTATED, 18, UNSTATED, "media_hdr"),
        (1, 16, 1, "media_hdr"),
        (9, 14, 9, "media_colour"),
        (9, 1, UNSTATED, "media_colour"),
        (UNSTATED, UNSTATED, 9, "media_colour"),
        (UNSTATED, UNSTATED, 10, "media_colour"),
        (12, 13, 1, "media_colour"),
        (11, UNSTATED, UNSTATED, "media_colour"),
        (1, 8, 1, "media_colour"),
        (UNSTATED, UNSTATED, 8, "media_colour"),
        (UNSTATED, UNSTATED, 14, "media_colour"),
    ],
)
def test_colours_that_would_come_out_wrong_are_refused_by_probe_and_decoder(
    tmp_path: Path, primaries: int, transfer: int, matrix: int, reason: str
) -> None:
    path = coloured(tmp_path / "a.mp4", primaries, transfer, matrix)
    for use in (probe, lambda path: decode_window(path, 0, 24.0, Bucket(160, 96, 1))):
        with pytest.raises(MediaError) as caught:
            use(path)
        assert caught.value.reason == reason


@pytest.mark.parametrize("stated", [(1, 1, 1), (1, 13, 1), (UNSTATED,) * 3, (1, 14, 9)])
def test_colours_of_an_ordinary_display_pass(tmp_path: Path, stated: tuple[int, int, int]) -> None:
    path = coloured(tmp_path / "a.mp4", *stated)
    assert probe(path).num_frames == 6
    frame = decode_window(path, 0, 24.0, Bucket(160, 96, 1))[0].astype(int)
    assert np.abs(frame - 121).max() <= 1


def test_what_is_transparent_in_a_video_is_black_and_what_is_translucent_is_dark(
    tmp_path: Path,
) -> None:
    rgba = np.zeros((96, 160, 4), np.uint8)
    rgba[..., :3] = 200, 100, 50
    rgba[:, 40:80, 3], rgba[:, 80:, 3] = 128, 255
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("qtrle", rate=24)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "argb"
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="argb")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    shown = decode_window(path, 0, 24.0, Bucket(160, 96, 1))[0].astype(int)
    assert shown[:, :36].max() == 0
    assert np.abs(shown[:, 44:76] - np.array([100, 50, 25])).max() <= 1
    assert np.abs(shown[:, 84:] - np.array([200, 100, 50])).max() <= 1


# -- display matrices

CORNERS = {"red": (80, 90, 240), "light": (220, 128, 128)}  # YUV of the stored top corners


@pytest.mark.parametrize(("kind", "bits"), [("gray", 8), ("gray10le", 10), ("gray16le", 16)])
def test_grey_is_of_the_range_that_it_states(tmp_path: Path, kind: str, bits: int) -> None:
    levels = np.arange(0, 256, 4)
    shown = {}
    for stated in (UNSPECIFIED, NARROW, FULL):
        path = tmp_path / f"{stated}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=24)
            stream.width, stream.height, stream.pix_fmt = len(levels), 32, kind
            stream.codec_context.color_range = stated
            stored = (np.tile(levels, (32, 1)) << bits - 8).astype(f"u{1 + (bits > 8)}")
            frame = av.VideoFrame.from_ndarray(stored, format=kind)
            frame.pts, frame.time_base, frame.color_range = 0, Fraction(1, 24), stated
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert probe(path).pix_fmt == kind
        shown[stated] = decode_window(path, 0, 24.0, Bucket(64, 32, 1))[0, 16, :, 0]
    narrow = np.clip(np.round((levels - 16) * 255 / 219), 0, 255)
    assert np.array_equal(shown[NARROW], narrow)
    assert np.array_equal(shown[FULL], levels) and np.array_equal(shown[UNSPECIFIED], levels)


def matrix_of(orientation: Orientation) -> np.ndarray:
    """The display matrix, found by asking where a picture's axes go."""
    picture = np.arange(6).reshape(2, 3)
    laid = orientation.apply(picture)
    at = {int(value): np.array(np.argwhere(laid == value)[0][::-1]) for value in (0, 1, 3)}
    right, down = at[1] - at[0], at[3] - at[0]
    return np.array([*right, 0, *down, 0, 0, 0, 1]) * [
        65536,
        65536,
        1,
        65536,
        65536,
        1,
        1,
        1,
        2**30,
    ]


EIGHT = [Orientation(turns, mirrored) for turns in range(4) for mirrored in (False, True)]


@pytest.mark.parametrize("orientation", EIGHT)
def test_each_of_the_eight_display_matrices_lays_the_picture_as_it_says(
    tmp_path: Path, orientation: Orientation
) -> None:
    assert orientation_of_matrix(matrix_of(orientation)) == orientation
    stored = grey(20, 192, 96)
    for x, colour in ((slice(0, 48), CORNERS["red"]), (slice(144, 192), CORNERS["light"])):
        stored[:, :48, x] = np.array(colour)[:, None, None]
    plain = write_clip(tmp_path / "plain.mp4", [stored] * 6, ntsc(6))
    data = bytearray(plain.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = matrix_of(orientation).astype(">i4").tobytes()
    path = tmp_path / "laid.mp4"
    path.write_bytes(data)
    found = probe(path)
    assert found.orientation == orientation
    width, height = found.shown_size
    assert (width, height) == ((96, 192) if orientation.swaps_sides else (192, 96))
    upright = decode_window(plain, 0, 24.0, Bucket(192, 96, 1))[0]
    laid = decode_window(path, 0, 24.0, Bucket(width, height, 1))[0]
    assert np.array_equal(laid, orientation.apply(upright))


@pytest.mark.parametrize(
    "matrix",
    [[46341, 46341, 0, -46341, 46341], [65536, 20000, 0, 0, 65536], [0, 0, 0, 0, 65536]],
    ids=["45 degrees", "skewed", "flat"],
)
def test_any_other_display_matrix_is_refused(tmp_path: Path, matrix: list[int]) -> None:
    data = bytearray(write_clip(tmp_path / "a.mp4", [grey(99)] * 3, ntsc(3)).read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 20] = np.array(matrix, ">i4").tobytes()
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(MediaError) as caught:
        probe(tmp_path / "a.mp4")
    assert caught.value.reason == "media_rotation"


def test_the_scale_of_a_display_matrix_is_the_pixel_aspect_ratio_not_a_turn(
    tmp_path: Path,
) -> None:
    data = bytearray(write_clip(tmp_path / "a.mp4", [grey(99)] * 3, ntsc(3)).read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 20] = np.array([131072, 0, 0, 0, 65536], ">i4").tobytes()
    (tmp_path / "a.mp4").write_bytes(data)
    found = probe(tmp_path / "a.mp4")
    assert found.orientation == Orientation()
    assert Fraction(found.sar_num, found.sar_den) in (1, 2)
