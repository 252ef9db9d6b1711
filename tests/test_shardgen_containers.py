"""Frames come at the time at which a player shows them, from the stream that it takes, and good
footage that looks odd is not refused.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from loader.shape import Bucket
from shardgen.media.decode import decode_window
from shardgen.media.errors import MediaError
from shardgen.media.probe import probe
from tools.fake.clips import counting_clip, grey, keyframes, levels, remux, write_clip

BUCKET = Bucket(160, 96, 9)
FPS = 25.0
TIMES = [Fraction(i, 25) for i in range(40)]
OPEN_GOP = "scenecut=0:open-gop=1:repeat-headers=1"


def shown(path: Path, start_ms: int = 0) -> list[int]:
    """Which source frame each of nine frames of a counting clip is, 40 ms apart."""
    return levels(decode_window(path, start_ms, FPS, BUCKET))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """40 grey frames at 25 fps in groups of ten, with B-frames."""
    options = {"g": "10", "bf": "2", "x264-params": "scenecut=0"}
    frames = [grey(16 + 4 * i) for i in range(40)]
    return write_clip(tmp_path / "clip.mp4", frames, TIMES, options=options)


def refused(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        probe(path)
    return caught.value.reason


# -- good footage that looks odd


@pytest.mark.parametrize("cut", [10, 13])
def test_an_edit_list_hides_its_frames_and_no_more(clip: Path, tmp_path: Path, cut: int) -> None:
    trimmed = remux(clip, tmp_path / "trimmed.mp4", shift_s=-Fraction(cut, 25))
    found = probe(trimmed)
    assert (found.num_frames, found.start_s) == (40 - cut, 0)
    assert found.duration_s == pytest.approx((40 - cut) / 25, abs=1e-3)
    assert shown(trimmed) == list(range(cut, cut + 9))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts", ".mov"])
def test_a_clock_that_starts_late_starts_at_0(clip: Path, tmp_path: Path, suffix: str) -> None:
    late = remux(clip, tmp_path / f"late{suffix}", shift_s=Fraction(10))
    found = probe(late)
    assert (found.num_frames, found.start_s) == (40, 0)
    assert found.duration_s == pytest.approx(1.6, abs=2e-3)
    assert shown(late) == list(range(9))


@pytest.mark.parametrize("before_s", [Fraction(1, 2), Fraction(1), Fraction(90)])
def test_a_transport_stream_may_pass_the_end_of_its_33_bit_clock(
    clip: Path, tmp_path: Path, before_s: Fraction
) -> None:
    wrapped = remux(clip, tmp_path / "w.ts", shift_s=Fraction(2**33, 90_000) - before_s)
    found = probe(wrapped)
    assert (found.num_frames, found.start_s) == (40, 0)
    assert found.duration_s == pytest.approx(1.6, abs=1e-3)
    assert shown(wrapped, 400) == list(range(10, 19))


def test_of_two_frames_with_one_timestamp_the_later_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    times = [Fraction(i - (i > 5), 25) for i in range(20)]
    intra = {"g": "1", "bf": "0"}
    frames = [grey(16 + 4 * i) for i in range(20)]
    write_clip(path, frames, TIMES[:20], options=intra)
    with av.open(str(path)) as old, av.open(str(tmp_path / "b.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet, time in zip(old.demux(video=0), times, strict=False):
            packet.pts = packet.dts = round(time / packet.time_base)
            packet.stream = stream
            new.mux(packet)
    found = probe(tmp_path / "b.mkv")
    assert found.num_frames == 19 and found.fps == 25
    assert shown(tmp_path / "b.mkv") == [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_b_frames_in_avi_come_in_the_order_of_the_screen(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12", "bf": "2", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for i in range(40):
            y, u, v = grey(16 + 4 * i)
            planes = np.concatenate([y.ravel(), u[::2, ::2].ravel(), v[::2, ::2].ravel()])
            frame = av.VideoFrame.from_ndarray(planes.reshape(144, 160), format="yuv420p")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = probe(path)
    assert (found.num_frames, found.fps, found.start_s) == (40, 25, 0)
    assert found.duration_s == pytest.approx(1.6)
    assert shown(path, 200) == list(range(5, 14))


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
@pytest.mark.parametrize("lead", [0, 3])
def test_a_cut_in_an_open_group_loses_what_leans_on_nothing_and_no_more(
    tmp_path: Path, codec: str, lead: int
) -> None:
    options = {"g": "12", "bf": "2"}
    if codec == "libx264":
        options["x264-params"] = OPEN_GOP + ":b-adapt=0"
    if codec == "libx265":
        options["x265-params"] = "scenecut=0:open-gop=1:keyint=12:min-keyint=12:log-level=0"
    whole = tmp_path / "whole.ts"
    frames = [grey(16 + 4 * i) for i in range(40)]
    write_clip(whole, frames, TIMES, options=options, codec=codec, rate=Fraction(25))
    first = next(number for number in keyframes(whole) if number >= 8)
    cut = remux(whole, tmp_path / "cut.ts", keep=lambda number: number >= first - lead)
    found = probe(cut)
    assert 20 <= found.num_frames < 40
    start = 40 - found.num_frames
    length_s = found.duration_s - found.start_s
    assert length_s == pytest.approx(found.num_frames / 25, abs=0.01)
    shown_frames = shown(cut, round(found.start_s * 1000))
    assert np.abs(np.array(shown_frames) - np.arange(start, start + 9)).max() <= (
        1 if codec == "mpeg2video" else 0
    )


def test_a_cut_that_leaves_every_frame_whole_loses_none(tmp_path: Path) -> None:
    # x264 has the frame after the cut forget one from before it, which is no damage
    options = {"g": "10", "bf": "2", "x264-params": "scenecut=0:open-gop=1"}
    frames = [grey(16 + 4 * i) for i in range(40)]
    whole = write_clip(tmp_path / "whole.mp4", frames, TIMES, options=options)
    first = keyframes(whole)[1]
    for suffix in (".mp4", ".mkv"):
        cut = remux(whole, tmp_path / f"cut{suffix}", keep=lambda number: number >= first)
        found = probe(cut)
        assert (found.num_frames, found.start_s) == (40 - first, 0)
        assert shown(cut) == list(range(first, first + 9))
        damaged = bytearray(cut.read_bytes())
        place = damaged.index(b"mdat") + 110 if suffix == ".mp4" else len(damaged) // 2
        damaged[place : place + 40] = bytes(40)
        cut.write_bytes(damaged)
        assert refused(cut) in ("media_undecodable", "media_truncated")


def test_a_fragmented_mp4_is_whole(clip: Path, tmp_path: Path) -> None:
    flags = {"movflags": "frag_keyframe+empty_moov"}
    fragmented = remux(clip, tmp_path / "f.mp4", options=flags)
    assert probe(fragmented).num_frames == 40 and shown(fragmented) == list(range(9))


# -- the clock


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".mp4"])
def test_sound_that_is_less_than_a_frame_early_moves_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"bf": "0", "crf": "1"})
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        # AAC begins 21 ms before what it was given
        sound = container.add_stream("aac", rate=48_000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 76_800), np.float32), "fltp", "mono")
        silence.sample_rate = 48_000
        silence.pts, silence.time_base = 0, Fraction(1, 48_000)
        container.mux(sound.encode(silence) + sound.encode(None))
        for i in range(40):
            y, u, v = grey(16 + 4 * i)
            planes = np.concatenate([y.ravel(), u[::2, ::2].ravel(), v[::2, ::2].ravel()])
            frame = av.VideoFrame.from_ndarray(planes.reshape(144, 160), format="yuv420p")
            frame.pts = i
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    assert probe(path).start_s == 0 and shown(path, 400) == list(range(10, 19))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_label_time_counts_from_the_container_s_start_not_from_the_first_frame(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"late{suffix}"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=40, options={"bf": "0", "crf": "1"})
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        sound = container.add_stream("mp2", rate=48_000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 115_200), np.int16), "s16", "mono")
        silence.sample_rate = 48_000
        container.mux(sound.encode(silence) + sound.encode(None))
        for i in range(40):
            y, u, v = grey(16 + 4 * i)
            planes = np.concatenate([y.ravel(), u[::2, ::2].ravel(), v[::2, ::2].ravel()])
            frame = av.VideoFrame.from_ndarray(planes.reshape(144, 160), format="yuv420p")
            frame.pts, frame.time_base = 20 + i, Fraction(1, 40)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    found = probe(path)
    late_s = found.start_s
    assert late_s == pytest.approx(0.5, abs=0.05)
    # the frame on the screen at 1.0 s of the display is the one 1.0 - late_s into the picture
    at_1_s = int((1.0 - late_s + 1e-3) * 40)
    assert shown(path, 1000)[0] == at_1_s
    with pytest.raises(MediaError, match=r"media_starts_late: the picture begins at 0\.[45]"):
        decode_window(path, 300, FPS, BUCKET)


# -- the stream


def with_two_tracks(path: Path, marks: tuple[int, int], rates: tuple[int, int]) -> Path:
    """Two films, the first of level 40, the second of level 160; `rates` in bits per second."""
    with av.open(str(path), "w") as container:
        tracks = []
        for mark, rate in zip(marks, rates, strict=True):
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
            stream.codec_context.bit_rate = rate
            stream.disposition = mark
            tracks.append(stream)
        for i in range(30):
            for stream, level in zip(tracks, (40, 160), strict=True):
                y = np.full((144, 160), 128, np.uint8)
                y[:96] = level
                frame = av.VideoFrame.from_ndarray(y, format="yuv420p")
                frame.pts = i
                container.mux(stream.encode(frame))
        for stream in tracks:
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("marks", "level"), [((1, 0), 40), ((0, 1), 160)])
def test_of_two_films_the_default_one_is_taken(
    tmp_path: Path, marks: tuple[int, int], level: int
) -> None:
    path = with_two_tracks(tmp_path / "two.mkv", marks, (400_000, 400_000))
    expected = (level - 16) * 255 / 219
    assert abs(decode_window(path, 0, FPS, BUCKET).mean() - expected) < 3


@pytest.mark.parametrize(
    ("suffix", "marks"),
    [
        *((".mp4", marks) for marks in ((0x400, 0), (0x400, 1), (0, 0), (1, 0))),
        (".mkv", (1, 0)),
        (".mov", (0, 0)),
    ],
)
def test_a_cover_is_not_the_film(tmp_path: Path, suffix: str, marks: tuple[int, int]) -> None:
    path = tmp_path / f"cover{suffix}"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 320, "yuvj420p"
        cover.disposition = marks[0]
        film = container.add_stream("libx264", rate=25)
        film.width, film.height, film.pix_fmt = 160, 96, "yuv420p"
        film.disposition = marks[1]
        container.mux(cover.encode(av.VideoFrame(320, 320, "yuvj420p")))
        for i in range(30):
            frame = av.VideoFrame(160, 96, "yuv420p")
            frame.pts = i
            container.mux(film.encode(frame))
        container.mux(film.encode(None))
    found = probe(path)
    assert (found.width_px, found.height_px, found.num_frames) == (160, 96, 30)


# -- the pixel aspect ratio


def two_aspects(path: Path, first: Fraction, second: Fraction) -> Path:
    """20 frames of 192x96 of each pixel aspect ratio, in one stream."""
    parts = []
    for number, sar in enumerate((first, second)):
        times = [Fraction(i + 20 * number, 25) for i in range(20)]
        part = path.with_name(f"part{number}.ts")
        parts.append(
            write_clip(part, [grey(200, 192, 96)] * 20, times, sar=sar, options={"bf": "0"})
        )
    with av.open(str(path), "w") as new:
        stream = None
        for part in parts:
            with av.open(str(part)) as old:
                stream = stream or new.add_stream_from_template(old.streams.video[0])
                for packet in old.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        new.mux(packet)
    return path


@pytest.mark.parametrize("start_ms", [0, 700, 1200])
def test_each_frame_has_the_aspect_of_its_own_time(tmp_path: Path, start_ms: int) -> None:
    path = two_aspects(tmp_path / "a.ts", Fraction(1, 2), Fraction(1))
    bucket = Bucket(192, 96, 9)
    for i, frame in enumerate(decode_window(path, start_ms, FPS, bucket)):
        number = start_ms // 40 + i
        bars = bool(frame[:, :40].max() == 0)
        assert bars == (number < 20), number


def test_where_the_container_states_one_aspect_for_a_stream_of_two_it_is_refused(
    tmp_path: Path,
) -> None:
    assert refused(two_aspects(tmp_path / "a.mkv", Fraction(1, 2), Fraction(1))) == "media_aspect"


def test_a_clip_of_counting_frames_is_what_the_tests_take_it_for(tmp_path: Path) -> None:
    assert shown(counting_clip(tmp_path / "a.mp4", TIMES)) == list(range(9))
