"""A probe tells what a file really is, and names what is wrong with it."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from shardgen.media.errors import MediaError
from shardgen.media.probe import probe
from tools.fake.clips import counting_clip, grey, ntsc, write_clip
from tools.index_rules import examine_clip


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
    opened = av.open(str(path))

    class Late:
        """A container whose end PyAV trips over, as over that of an MPEG-TS with a new PMT."""

        def __enter__(self) -> "Late":
            return self

        def __exit__(self, *_: object) -> None:
            opened.close()

        def __getattr__(self, name: str) -> object:
            return getattr(opened, name)

        def demux(self) -> Iterator[av.Packet]:
            yield from opened.demux()
            raise IndexError

    monkeypatch.setattr(av, "open", lambda *_, **__: Late())
    assert probe(path).num_frames == 20
