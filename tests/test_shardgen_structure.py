"""A file that was cut is found, however little is missing; one that is whole is not refused."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shardgen.media.errors import MediaError
from shardgen.media.probe import probe
from shardgen.media.structure import missing_bytes
from tools.fake.clips import grey, remux, write_clip


def refused(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        probe(path)
    return caught.value.reason


def noisy(path: Path, options: dict[str, str] | None = None) -> bytes:
    """60 frames of noise at 60 fps: a frame is well below half a second, and some kB."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(16, 235, (3, 96, 160), np.uint8) for _ in range(60)]
    times = [Fraction(i, 60) for i in range(60)]
    codec = "msmpeg4" if path.suffix == ".asf" else "libx264"
    return write_clip(path, frames, times, options=options, codec=codec).read_bytes()


@pytest.mark.parametrize(
    ("suffix", "lost"),
    [
        *((suffix, 1) for suffix in (".mp4", ".mov", ".mkv")),
        *((suffix, 2000) for suffix in (".mp4", ".mov", ".mkv", ".avi", ".asf", ".ts")),
        *((suffix, 20_000) for suffix in (".mp4", ".mov", ".mkv", ".avi", ".asf", ".ts")),
    ],
)
def test_a_file_that_was_cut_is_truncated_however_little_is_missing(
    tmp_path: Path, suffix: str, lost: int
) -> None:
    path = tmp_path / f"a{suffix}"
    whole = noisy(path, {"bf": "0"})
    assert probe(path).num_frames == 60
    path.write_bytes(whole[:-lost])
    assert refused(path) in ("media_truncated", "media_undecodable")


@pytest.mark.parametrize(
    ("size", "rate", "kind", "frame_bytes"),
    [
        ((720, 576), Fraction(25), "yuv420p", 144_000),
        ((720, 480), Fraction(30000, 1001), "yuv411p", 120_000),
        ((720, 480), Fraction(30000, 1001), "yuv422p", 240_000),
        ((960, 720), Fraction(50), "yuv422p", 288_000),
        ((1440, 1080), Fraction(25), "yuv422p", 576_000),
    ],
)
def test_a_dv_stream_that_ends_within_a_frame_is_truncated(
    tmp_path: Path, size: tuple[int, int], rate: Fraction, kind: str, frame_bytes: int
) -> None:
    path = tmp_path / "a.dv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("dvvideo", rate=rate)
        (stream.width, stream.height), stream.pix_fmt = size, kind
        for number in range(2):
            frame = av.VideoFrame(*size, kind)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    assert len(whole) == 2 * frame_bytes and probe(path).num_frames == 2
    path.write_bytes(whole[:frame_bytes])
    assert probe(path).num_frames == 1
    for length in (frame_bytes + 1, 2 * frame_bytes - 1):
        path.write_bytes(whole[:length])
        assert refused(path) == "media_truncated"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_file_cut_between_two_frames_is_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    whole = noisy(path, {"bf": "0"})
    with av.open(str(path)) as container:
        last = max(packet.pos or 0 for packet in container.demux() if packet.size)
    path.write_bytes(whole[: last - (7 if suffix == ".mkv" else 0)])
    assert refused(path) == "media_truncated"


def test_what_was_appended_to_a_whole_file_is_no_truncation(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(noisy(path) + b"\x7f\xff\xff\xffSEFT" + bytes(40))
    assert probe(path).num_frames == 60


def test_an_mp4_without_its_header_is_truncated_not_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    whole = noisy(path)
    path.write_bytes(whole[: whole.index(b"moov") - 5000])
    assert refused(path) == "media_truncated"


def test_a_live_matroska_says_nothing_of_its_length_but_its_clusters_do(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    noisy(path)
    live = remux(path, tmp_path / "live.mkv", options={"live": "1"})
    assert probe(live).num_frames == 60
    live.write_bytes(live.read_bytes()[:-900])
    assert refused(live) == "media_truncated"


@pytest.mark.parametrize("suffix", [".ts", ".m2ts", ".mxf", ".flv", ".ogg"])
def test_what_is_cut_within_a_packet_is_truncated_and_padding_is_not(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    frames = [grey(16 + 4 * i) for i in range(20)]
    codec = {".mxf": "mpeg2video", ".ogg": "libvpx"}.get(suffix, "libx264")
    write_clip(path, frames, [Fraction(i, 25) for i in range(20)], codec=codec, rate=Fraction(25))
    whole = path.read_bytes()
    assert missing_bytes(whole) == 0 and probe(path).num_frames == 20
    for lost in (1, 50, 99, 571):  # between two packets of 188 or 192 bytes none of them is
        path.write_bytes(whole[:-lost])
        assert refused(path) == "media_truncated", lost
    if suffix != ".flv":
        path.write_bytes(whole + bytes(100))
        assert probe(path).num_frames == 20


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".asf"])
def test_the_missing_bytes_are_counted_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    whole = noisy(path, {"bf": "0"})
    assert missing_bytes(whole) == missing_bytes(path) == 0
    for lost in (5000, 20_000):
        # a RIFF's padding and an ASF's index may go without a loss
        assert abs(missing_bytes(whole[:-lost]) - lost) <= (
            0 if suffix in (".mp4", ".mkv") else 4000
        )
    assert missing_bytes(b"") == missing_bytes(b"short") == missing_bytes(bytes(4000)) == 0
