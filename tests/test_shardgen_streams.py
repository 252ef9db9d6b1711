"""What is in a file besides the film, films that begin in odd places, and damage within one."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from loader.shape import Bucket
from shardgen.media.containers import Decoder, Video
from shardgen.media.decode import decode_window
from shardgen.media.errors import MediaError
from shardgen.media.probe import probe
from shardgen.media.structure import has_gap
from tools.fake.clips import grey, keyframes, remux, write_clip

BUCKET = Bucket(160, 96, 9)
TIMES = [Fraction(i, 25) for i in range(40)]
COVER, DEFAULT = 0x400, 1
NO_CUTS = {"sc_threshold": "1000000000", "qmax": "2"}  # of MPEG's encoders, at a change of scene


def refused(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        probe(path)
    return caught.value.reason


def textured(number: int) -> np.ndarray:
    """Picture `number` of a texture that moves: each leans on the one before."""
    texture = np.random.default_rng(0).integers(40, 160, (96, 160), dtype=np.uint8)
    grey_plane = np.full((96, 160), 128, np.uint8)
    return np.stack([np.roll(texture, 2 * number, axis=1), grey_plane, grey_plane])


def moving(path: Path, codec: str, options: dict[str, str]) -> Path:
    pictures = [textured(i) for i in range(40)]
    return write_clip(path, pictures, TIMES, options=options, codec=codec, rate=Fraction(25))


# -- tracks


def with_tracks(path: Path, tracks: Sequence[tuple[int, int]], sound: bool = False) -> Path:
    """Tracks of (level, disposition): a cover of one picture, or 30 frames of a film."""
    with av.open(str(path), "w") as container:
        streams = []
        for _, mark in tracks:
            stream = container.add_stream("mjpeg" if mark & COVER else "mpeg4", rate=25)
            stream.width, stream.height = 160, 96
            stream.pix_fmt = "yuvj420p" if mark & COVER else "yuv420p"
            stream.disposition = mark
            streams.append(stream)
        if sound:
            track = container.add_stream("aac", rate=48_000, layout="mono")
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 48_000, 0
            container.mux(track.encode(silence) + track.encode(None))
        for stream, (level, mark) in zip(streams, tracks, strict=True):
            for number in range(1 if mark & COVER else 30):
                picture = np.full((144, 160), 128, np.uint8)
                picture[:96] = level
                frame = av.VideoFrame.from_ndarray(picture, format=stream.pix_fmt)
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def test_sound_with_a_cover_is_no_film(tmp_path: Path) -> None:
    path = with_tracks(tmp_path / "a.mp4", [(40, COVER)], sound=True)
    with pytest.raises(MediaError, match="only a cover picture") as caught:
        probe(path)
    assert caught.value.reason == "media_no_video"


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize(("default", "level"), [(1, 80), (2, 160)])
def test_of_two_films_behind_a_cover_the_default_one_is_taken(
    tmp_path: Path, suffix: str, default: int, level: int
) -> None:
    marks = [COVER | DEFAULT, *(DEFAULT if number == default else 0 for number in (1, 2))]
    path = tmp_path / f"a{suffix}"
    with_tracks(path, list(zip((40, 80, 160), marks, strict=True)))
    shown = decode_window(path, 0, 25.0, BUCKET)
    assert abs(shown.mean() - (level - 16) * 255 / 219) < 3


# -- where a film begins


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
def test_frames_before_the_first_keyframe_are_left_out(tmp_path: Path, codec: str) -> None:
    whole = moving(tmp_path / "whole.ts", codec, {"g": "12", "bf": "0", **NO_CUTS})
    assert keyframes(whole)[:2] == [0, 12]
    cut = remux(whole, tmp_path / "cut.ts", keep=lambda number: number >= 9)
    found = probe(cut)
    assert found.num_frames == 28 and found.start_s == pytest.approx(0.12)
    shown = decode_window(cut, 120, 25.0, BUCKET)
    assert np.array_equal(shown, decode_window(whole, 480, 25.0, BUCKET))


@pytest.mark.parametrize("lead", [0, 3])
def test_a_cut_in_a_film_without_keyframes_is_used_once_all_parts_are_renewed(
    tmp_path: Path, lead: int
) -> None:
    options = {"g": "12", "bf": "0", "x264-params": "intra-refresh=1:repeat-headers=1:scenecut=0"}
    whole = moving(tmp_path / "whole.ts", "libx264", options)
    cut = remux(whole, tmp_path / "cut.ts", keep=lambda number: number >= 12 - lead)
    found = probe(cut)
    assert found.num_frames == 20
    shown = decode_window(cut, round(1000 * found.start_s), 25.0, BUCKET)
    assert np.array_equal(shown, decode_window(whole, 800, 25.0, BUCKET))


def test_silence_that_players_skip_is_before_0() -> None:
    stream = SimpleNamespace(average_rate=Fraction(25), sample_aspect_ratio=None)

    def origin_ms(start_ms: int, first_ms: int) -> float:
        container = SimpleNamespace(start_time=1000 * start_ms, format=SimpleNamespace(name="mov"))
        decoder = Decoder(Video(container, stream, b""))
        return float(1000 * decoder.origin(Fraction(first_ms, 1000)))

    assert origin_ms(-21, 0) == origin_ms(-21, 40) - 40 == origin_ms(-21, 500) == 0
    assert origin_ms(-500, 0) == -500  # that is no silence before the sound


# -- damage


def test_damage_in_the_first_group_is_no_cut(tmp_path: Path) -> None:
    options = {"g": "20", "bf": "0", "x264-params": "scenecut=0"}
    path = moving(tmp_path / "a.mkv", "libx264", options)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][4]
        place = path.read_bytes().index(bytes(packet)) + packet.size // 2
    data = bytearray(path.read_bytes())
    data[place : place + 40] = bytes(40)
    path.write_bytes(data)
    assert refused(path) == "media_undecodable"


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "libx265"])
@pytest.mark.parametrize("suffix", [".ts", ".m2ts"])
def test_a_transport_stream_that_lost_a_packet_is_refused(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    options = {"x265-params": "log-level=0"} if codec == "libx265" else {"g": "10", "bf": "0"}
    path = moving(tmp_path / f"a{suffix}", codec, options)
    data, size = path.read_bytes(), 188 if suffix == ".ts" else 192
    film = [
        start
        for start in range(0, len(data), size)
        if int.from_bytes(data[start + size - 187 : start + size - 185], "big") & 0x1FFF
        in (0x100, 0x1011)
    ]
    # in the first picture, where libavformat is silent, and in the middle
    for start in (film[20], film[len(film) // 2]):
        path.write_bytes(data[:start] + data[start + size :])
        number = 0x100 if suffix == ".ts" else 0x1011
        assert has_gap(path, number) == (start == film[20])
        assert refused(path) == "media_truncated"


def test_a_packet_that_comes_twice_and_a_count_that_is_announced_are_no_gap() -> None:
    def packet(count: int, field: bytes = b"", is_start: bool = False, number: int = 256) -> bytes:
        control = (0x30 if field else 0x10) | count % 16
        head = bytes([0x47, number >> 8 | (0x40 if is_start else 0), number & 255, control])
        start = b"\0\0\1\xe0" if is_start else b""
        return (head + field + start).ljust(188, b"\xff")

    def gap(packets: list[bytes]) -> bool:
        return has_gap(b"".join(packets), 256)

    first, plain = packet(14, is_start=True), [packet(15 + i) for i in range(6)]
    assert not gap([first, *plain])
    assert gap([first, *plain[:3], *plain[4:]])
    assert not gap([first, *plain[:3], *plain[2:]])
    anew = packet(3, field=b"\x01\x80")
    assert not gap([first, *plain, anew, packet(4), packet(5)])
    # another stream's, what precedes the first picture, and what follows it
    sound = [packet(count, number=257) for count in (0, 5, 1)]
    second = packet(5, is_start=True)
    assert not gap([packet(2), *sound, first, *plain, second, *plain[2:]])
    assert not gap([b"no transport stream"]) and not gap([])
    # a start that comes twice is not the next picture's; a gap in sound is none of the film's, and
    # sound that goes on does not end the search
    assert gap([first, first, *plain[:3], *plain[4:]])
    starts = [packet(count, is_start=True, number=257) for count in (0, 1)]
    assert not gap([starts[0], *sound, first, *plain])
    assert gap([starts[0], first, *plain[:2], starts[1], *plain[3:]])


def test_a_film_whose_clock_stands_still_is_refused(tmp_path: Path) -> None:
    pictures = [grey(16 + 4 * i) for i in range(20)]
    source = write_clip(tmp_path / "a.ts", pictures, TIMES[:20], options={"g": "1", "bf": "0"})
    path = tmp_path / "b.mkv"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            packet.pts = packet.dts = round(Fraction(number // 3, 25) / packet.time_base)
            packet.stream = stream
            new.mux(packet)
    assert refused(path) == "media_timestamps"


# -- the pixel aspect ratio


def test_an_aspect_that_changes_against_what_the_container_states_is_refused(
    tmp_path: Path,
) -> None:
    parts = []
    for number, sar in enumerate((Fraction(8, 9), Fraction(32, 27))):
        times = [Fraction(i + 10 * number, 25) for i in range(10)]
        pictures = [grey(200, 720, 480)] * 10
        part = tmp_path / f"{number}.ts"
        options = {"bf": "0", "g": "5"}
        parts.append(
            write_clip(
                part,
                pictures,
                times,
                sar=sar,
                codec="mpeg2video",
                rate=Fraction(25),
                options=options,
            )
        )
    path = tmp_path / "a.mxf"  # whose muxer states the last aspect for all
    with av.open(str(path), "w") as new:
        # a template has no frame rate in PyAV 18.0, which this muxer asks for
        stream = new.add_stream("mpeg2video", rate=25, width=720, height=480, pix_fmt="yuv420p")
        for part in parts:
            with av.open(str(part)) as old:
                for packet in old.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        new.mux(packet)
    assert refused(path) == "media_aspect"
