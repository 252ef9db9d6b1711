"""media.py: frames by timestamp, geometry and colour as the file states them, and damage that is
named, not hidden.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from loader.shape import Bucket
from shardgen.media import footage as media
from shardgen.media.footage import MediaError, decode_window, decode_windows, fit, probe
from tools.index import examine_clip

BUCKET = Bucket(160, 96, 9)
YELLOW_601, YELLOW_709 = (210, 16, 146), (219, 16, 138)  # RGB 255,255,0 in narrow range


def write_clip(
    path: Path,
    frames: list[np.ndarray],
    times: list[Fraction],
    *,
    sar: Fraction = Fraction(1),
    matrix: int = 2,
    full_range: bool = False,
    rotation: int = 0,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """Write planar 8-bit YUV frames [3, H, W] (chroma at full size, subsampled here) with exact
    timestamps.
    """
    base = Fraction(1, 30000)
    with av.open(
        str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    ) as container:
        stream = container.add_stream(
            codec, rate=Fraction(30000, 1001), options={"crf": "1", **(options or {})}
        )
        _, stream.height, stream.width = frames[0].shape
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = stream.time_base = base
        stream.codec_context.sample_aspect_ratio = sar
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full_range else 1
        if rotation:
            stream.set_display_rotation(rotation)
        for picture, time in zip(frames, times, strict=True):
            y, u, v = picture
            planar = np.concatenate(
                [y.reshape(-1), u[::2, ::2].reshape(-1), v[::2, ::2].reshape(-1)]
            )
            frame = av.VideoFrame.from_ndarray(
                planar.reshape(y.shape[0] * 3 // 2, y.shape[1]), format="yuv420p"
            )
            frame.pts, frame.time_base = int(time / base), base
            frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def grey(level: int, width: int = 160, height: int = 96) -> np.ndarray:
    return np.stack([np.full((height, width), v, np.uint8) for v in (level, 128, 128)])


def ntsc(count: int) -> list[Fraction]:
    return [Fraction(1001, 30000) * i for i in range(count)]


def counting_clip(path: Path, times: list[Fraction]) -> Path:
    """A clip whose frame i is grey of level 16 + 4 i."""
    return write_clip(path, [grey(16 + 4 * i) for i in range(len(times))], times)


def levels(frames: np.ndarray) -> list[int]:
    """Which source frame each decoded frame of a counting clip is."""
    return [round(float(f[40:50, 70:90].mean()) * 219 / 255 / 4) for f in frames]


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


def test_probe_tells_what_the_file_is(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "a.mp4", [grey(100, 720, 480)] * 30, ntsc(30), sar=Fraction(32, 27), matrix=6
    )
    found = probe(path)
    assert (found.width_px, found.height_px, found.sar_num, found.sar_den) == (720, 480, 32, 27)
    assert (found.fps, found.num_frames, found.variable_frame_rate) == (29.97, 30, False)
    assert found.duration_s == pytest.approx(1.001, abs=1e-3)
    assert (found.codec, found.pix_fmt, found.bit_depth) == ("h264", "yuv420p", 8)
    assert (found.color_range, found.color_matrix) == ("tv", "bt601")
    uneven = [Fraction(0), Fraction(1, 30), Fraction(1, 10), Fraction(1, 8)]
    assert probe(counting_clip(tmp_path / "v.mp4", uneven)).variable_frame_rate
    deep = write_clip(tmp_path / "d.mp4", [grey(100)] * 3, ntsc(3), pix_fmt="yuv420p10le")
    assert probe(deep).bit_depth == 10


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


def test_geometry() -> None:
    bucket = Bucket(832, 480, 9)
    wide = fit(720, 480, Fraction(32, 27), 0, bucket, "letterbox")
    assert (wide.width_px, wide.height_px, wide.x_px, wide.y_px) == (832, 468, 0, 6)
    assert wide.factor == pytest.approx(832 / 720)
    filled = fit(720, 480, Fraction(32, 27), 0, bucket, "crop")
    assert (filled.width_px, filled.height_px, filled.x_px, filled.y_px) == (853, 480, -11, 0)
    turned = fit(1920, 1080, Fraction(1), 90, bucket, "letterbox")
    assert (turned.width_px, turned.height_px) == (270, 480)
    assert turned.factor == pytest.approx(270 / 1080)


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


def test_damage_is_named(tmp_path: Path) -> None:
    whole = write_clip(
        tmp_path / "a.mp4",
        [np.random.default_rng(i).integers(16, 235, (3, 96, 160), np.uint8) for i in range(60)],
        ntsc(60),
    ).read_bytes()
    rotten = bytearray(whole)
    middle = len(whole) // 2
    rotten[middle : middle + 4000] = bytes(4000)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 160, 3), np.uint8)).save(
        tmp_path / "whole.png"
    )
    png = (tmp_path / "whole.png").read_bytes()
    cases = {
        "empty.mp4": (b"", "media_empty"),
        "cut.mp4": (whole[:middle], "media_truncated"),
        "rotten.mp4": (bytes(rotten), "media_undecodable"),
        "codec.mp4": (whole.replace(b"avc1", b"zzzz"), "media_undecodable"),
        "picture.mp4": (
            b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'></svg>",
            "media_undecodable",
        ),
        "playlist.mp4": (b"ffconcat version 1.0\nfile a.mp4\n", "media_undecodable"),
        "garbage.mp4": (b"<html>not found</html>" * 50, "media_undecodable"),
        "cut.png": (png[: len(png) // 2], "media_truncated"),
        "head.png": (png[:20], "media_undecodable"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError) as error:
            probe(tmp_path / name)
        assert error.value.reason == reason, (name, str(error.value))
    mkv = _as_mkv(tmp_path)
    (tmp_path / "cut.mkv").write_bytes(mkv[: len(mkv) // 2])
    with pytest.raises(MediaError) as error:
        probe(tmp_path / "cut.mkv")
    assert error.value.reason == "media_truncated"


def _as_mkv(folder: Path) -> bytes:
    noise = [np.random.default_rng(i).integers(16, 235, (3, 96, 160), np.uint8) for i in range(60)]
    return write_clip(folder / "whole.mkv", noise, ntsc(60)).read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_title_in_the_korean_of_windows_is_no_damage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLETITLE"
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(64, 32, "yuv420p")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"TITLETITLE", "뉴스데스크".encode("cp949")))
    assert path.read_bytes() != data and probe(path).num_frames == 1
    if suffix == ".mp4":
        assert examine_clip(path.read_bytes(), 1)[:2] == (64, 32)


def test_a_stream_that_comes_in_mid_file_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = counting_clip(tmp_path / "clip.mp4", ntsc(20))
    opened = media._open

    class Late:
        """A container whose end PyAV trips over, as over that of an MPEG-TS with a new PMT."""

        def __init__(self, path: Path) -> None:
            self.container = opened(path)

        def __enter__(self) -> "Late":
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.container, name)

        def demux(self) -> Iterator[av.Packet]:
            yield from self.container.demux()
            raise IndexError

    monkeypatch.setattr(media, "_open", Late)
    assert probe(path).num_frames == 20


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
