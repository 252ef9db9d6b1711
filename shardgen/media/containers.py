"""A video file, opened: its frames in display order, each with its time on the screen, and damage
that is named.

The clock is the one that a player's display shows: the container's start is 0:00. So a picture
track that starts half a second after the sound begins at 0.5 s, and a transport stream whose
first timestamp is 10 s, or 26 hours, begins at 0. So does a picture that comes less than a frame
after the sound.

Decoders hide damage by default; here they are told to fail, and the file's own structure is held
against its length (structure.py). Not every codec can tell: HEVC and VP9 take many overwritten
bytes for valid ones, and so does Motion JPEG, whose frames are checked no closer than the decoder
does. What such a decoder makes of damage is used.
"""

import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av

from shardgen.media.deinterlace import deinterlaced
from shardgen.media.errors import MediaError
from shardgen.media.structure import has_gap, missing_bytes
from shardgen.media.tracks import film_of

# Formats that hold their own pictures: a playlist would take them from files that nobody hashed.
FORMATS = (
    "mov,mp4,matroska,webm,avi,mxf,mxf_opatom,mpegts,mpeg,mpegvideo,m4v,h264,hevc,mjpeg,asf,flv,"
    "ogg,gxf,dv,nut,ivf"
)
# Formats whose header says how long the file is. For the others libavformat guesses.
_STATE_A_DURATION = ("mov", "matroska", "avi", "mxf", "asf", "flv", "gxf", "nut", "ivf")
# A header's duration may be rounded or counted by another stream's clock.
_DURATION_TOLERANCE_S = Fraction(1, 2)
# Encoders put up to some 80 ms of silence before a track's sound; players skip it.
_PRIMING_S = Fraction(1, 10)
# The level of libavcodec's messages is one for the process.
_MESSAGES = threading.Lock()
# nobody else is to print what is listened to
logging.getLogger("libav").addHandler(logging.NullHandler())
_FORGETTING = ("mmco: unref short failure",)
# PyAV before 19 reads titles as strict UTF-8 unless told otherwise; many are in CP949.
_TITLES = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class Video(NamedTuple):
    """An open file, the stream that players take, and where to open it again."""

    container: Any
    stream: Any
    source: Path | bytes


class Shown(NamedTuple):
    """A frame, from when to when it is on the screen, and its pixel aspect ratio."""

    frame: Any
    begin_s: float
    end_s: float
    sar: Fraction


@contextmanager
def open_video(source: Path | bytes) -> Iterator[Video]:
    """Open a file, or a file's bytes; its decoder fails on damage and runs on one thread.

    Raises MediaError (media_empty, media_truncated, media_undecodable, media_no_video).
    """
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            raise MediaError("media_empty", "the file has 0 bytes")
        if missing := missing_bytes(source):
            raise MediaError("media_truncated", f"{missing} bytes are missing at the file's end")
        options = {"format_whitelist": FORMATS}
        container = av.open(file, "r", container_options=options, **_TITLES)
    except av.ArgumentError as error:
        raise MediaError(
            "media_undecodable", f"can't be opened, or its format is none of {FORMATS}"
        ) from error
    except (av.FFmpegError, OSError) as error:
        raise MediaError("media_undecodable", f"can't be opened: {error}") from error
    with container:
        stream = film_of(container)
        try:
            lost = container.format.name == "mpegts" and has_gap(source, stream.id)
        except OSError as error:
            raise MediaError("media_undecodable", f"can't be read: {error}") from error
        if lost:
            raise MediaError("media_truncated", "packets are missing in the first picture")
        if stream.codec_context is None:
            raise MediaError("media_undecodable", "there is no decoder for its codec")
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}
        yield Video(container, stream, source)


class Decoder:
    """The frames of a video, once, and what is learnt on the way.

    `frames` yields every frame in display order with its time in `pts`. Then `sar_at` and `times`
    say the rest.
    """

    def __init__(self, video: Video) -> None:
        self._container, self._stream, self._source = video
        self._num_packets = 0
        self._demuxed_s = Fraction(0)
        # Pixel aspect ratios in the order in which they come into force.
        self._sars: list[tuple[Fraction, Fraction]] = []
        self._container_sar = _as_fraction(self._stream.sample_aspect_ratio)
        # AVI has no presentation times: frames get the packets' times in order.
        self._free_times: list[int] | None = [] if "avi" in self._container.format.name else None

    def frames(self) -> Iterator[Any]:
        """Raises MediaError at the first damage, and at the end if some frames were missing."""
        first_key: int | None = None
        began_at_key = False
        num_frames, num_keys = 0, 0
        for packet in self._packets():
            time = packet.pts if self._free_times is None else packet.dts
            if packet.size:
                num_keys += packet.is_keyframe
                if packet.is_keyframe and first_key is None:
                    first_key, began_at_key = time, self._num_packets == 1
                if self._free_times is not None:
                    heappush(self._free_times, time)
            # What precedes the first keyframe on the screen leans on frames that were cut away.
            is_leading = (first_key is None and num_frames == 0) or (
                first_key is not None and time is not None and time < first_key
            )
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                in_first_group = num_keys <= 1
                if is_leading or (in_first_group and self._forgets_what_was_cut()):
                    continue
                raise MediaError(
                    "media_undecodable",
                    f"packet {self._num_packets} does not decode: {error.strerror}",
                ) from error
            self._note_sar(time)
            for frame in frames:
                if num_frames == 0 and not began_at_key and self._leans(frame, first_key):
                    continue
                if self._free_times is not None:
                    frame.pts = self._take_time(first_key if num_frames == 0 else None)
                if frame.is_corrupt:
                    if first_key is not None and frame.pts is not None and frame.pts < first_key:
                        continue
                    raise MediaError(
                        "media_undecodable", f"a frame near packet {self._num_packets} is damaged"
                    )
                num_frames += 1
                yield frame
        self._check_duration()

    def _packets(self) -> Iterator[Any]:
        """Packets of the stream. Those of other streams are looked at only for damage and time."""
        try:
            for packet in self._container.demux():
                if packet.pts is not None:
                    end_s = _seconds(packet.pts + (packet.duration or 0), packet.time_base)
                    self._demuxed_s = max(self._demuxed_s, end_s)
                if packet.is_corrupt:
                    raise MediaError("media_truncated", f"packet {self._num_packets} is cut off")
                if packet.stream is self._stream:
                    self._num_packets += packet.size > 0
                    yield packet
        except av.FFmpegError as error:
            raise MediaError(
                "media_undecodable",
                f"the file can't be read on after packet {self._num_packets}: {error.strerror}",
            ) from error
        except IndexError:
            # PyAV's, at the end of a file that got a stream in its middle. The streams that it
            # began with are through by then.
            pass

    def _leans(self, frame: Any, first_key: int | None) -> bool:
        """Whether a first frame may need one that was cut away. Where no frame is a keyframe, and
        parts of each are renewed, the decoder gives none before all parts were.
        """
        if frame.key_frame:
            return False
        if first_key is None or frame.pts is None or self._free_times is not None:
            return True
        return bool(frame.pts < first_key)

    def _forgets_what_was_cut(self) -> bool:
        """Whether the packet that just failed did so only because it tells the decoder to forget
        a frame that was cut away. Its own frame is whole then, and comes out.

        Only libavcodec's messages tell that from damage, so the file is decoded again up to there
        while they are listened to.
        """
        with _MESSAGES, open_video(self._source) as video:
            before = av.logging.get_level(), av.logging.get_skip_repeated()
            av.logging.set_level(av.logging.ERROR)
            av.logging.set_skip_repeated(False)
            try:
                with av.logging.Capture() as messages:
                    for packet in islice(video.container.demux(video.stream), self._num_packets):
                        with suppress(av.FFmpegError):
                            packet.decode()
            finally:
                av.logging.set_level(before[0])
                av.logging.set_skip_repeated(before[1])
        return bool(messages) and all(message.strip() in _FORGETTING for _, _, message in messages)

    def _take_time(self, first_key: int | None) -> int:
        """The smallest packet time that no frame has yet, from `first_key` on."""
        assert self._free_times is not None
        while True:
            time = heappop(self._free_times)
            if first_key is None or time >= first_key:
                return time

    def _note_sar(self, time: int | None) -> None:
        """The aspect ratio that the packet's headers brought into force. Raises MediaError where
        container and stream disagree about it.
        """
        stated = self._stream.codec_context.sample_aspect_ratio
        sar = _as_fraction(stated)
        if time is None or (self._sars and self._sars[-1][1] == sar):
            return
        if not stated and not self._stream_states_sar:
            return
        if self._sars and not self._stream_states_sar:
            raise MediaError(
                "media_aspect",
                f"the pixel aspect ratio changes from {self._sars[-1][1]} to {sar} in the stream, "
                f"while the container states {self._container_sar} for all of it; cut it there",
            )
        self._sars.append((_seconds(time, self._stream.time_base), sar))

    @property
    def _stream_states_sar(self) -> bool:
        """Whether the aspect ratio can only be the stream's: these containers hold none."""
        names = self._container.format.name.split(",")
        return bool({"mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "avi"} & set(names))

    def sar_at(self, time_s: Fraction) -> Fraction:
        """The pixel aspect ratio of the frame with this time."""
        if not self._stream_states_sar:
            return self._container_sar
        in_force = [sar for since_s, sar in self._sars if since_s <= time_s]
        return in_force[-1] if in_force else self._sars[0][1]

    def origin(self, first_s: Fraction) -> Fraction:
        """The timestamp at which a player's display says 0:00. `first_s` is the first frame's."""
        if self._container.start_time is None:
            return first_s
        start_s = Fraction(self._container.start_time, av.time_base)
        if -_PRIMING_S < start_s < 0 <= first_s:
            start_s = Fraction(0)
        # What begins within a frame begins together: sound is a little early where its encoder
        # put silence before it, and a player shows the first frame from the start.
        frame_s = min(1 / _as_fraction(self._stream.average_rate or 24), _PRIMING_S)
        return first_s if first_s - start_s <= frame_s else start_s

    def _check_duration(self) -> None:
        """Raises MediaError if the header promises more than there was. Some count the duration
        from 0, others from the first timestamp.
        """
        names = set(self._container.format.name.split(","))
        if not names & set(_STATE_A_DURATION) or self._container.duration is None:
            return
        promised_s = Fraction(self._container.duration, av.time_base)
        start_s = Fraction(self._container.start_time or 0, av.time_base)
        held_s = max(self._demuxed_s, self._demuxed_s - start_s)
        if promised_s - held_s > _DURATION_TOLERANCE_S:
            raise MediaError(
                "media_truncated",
                f"the header promises {float(promised_s):.2f} s, the file holds "
                f"{float(held_s):.2f} s",
            )


def shown_frames(video: Video, *, deinterlace: bool = False) -> Iterator[Shown]:
    """Every frame of a video with its time on the screen. Of frames with one timestamp the last
    is shown. Raises MediaError (media_undecodable, media_truncated, media_timestamps,
    media_aspect).
    """
    decoder = Decoder(video)
    frames = deinterlaced(decoder.frames()) if deinterlace else decoder.frames()
    origin_s: Fraction | None = None
    pending: tuple[Any, float, Fraction] | None = None
    num_shown, num_hidden = 0, 0
    for frame in frames:
        if frame.pts is None:
            raise MediaError("media_timestamps", "a frame has no timestamp")
        time_s = _seconds(frame.pts, frame.time_base)
        if origin_s is None:
            origin_s = decoder.origin(time_s)
        begin_s = float(time_s - origin_s)
        if pending is not None:
            held, held_begin_s, sar = pending
            if begin_s < held_begin_s:
                raise MediaError(
                    "media_timestamps", f"timestamps go back from {held_begin_s} to {begin_s} s"
                )
            if begin_s == held_begin_s:
                num_hidden += 1
            else:
                num_shown += 1
                yield Shown(held, held_begin_s, begin_s, sar)
        pending = frame, begin_s, decoder.sar_at(time_s)
    if num_hidden > num_shown:
        raise MediaError(
            "media_timestamps",
            f"{num_hidden} of {num_hidden + num_shown + 1} frames have the timestamp of the frame "
            f"before",
        )
    if pending is not None:
        held, held_begin_s, sar = pending
        if held.duration:
            length_s = _seconds(held.duration, held.time_base)
        else:
            length_s = 1 / (_as_fraction(video.stream.average_rate or 24))
        yield Shown(held, held_begin_s, held_begin_s + float(length_s), sar)


def _as_fraction(value: Any) -> Fraction:
    """PyAV's AVRational or Fraction; None and 0 are square pixels, or unknown."""
    return Fraction(value.numerator, value.denominator) if value else Fraction(1)


def _seconds(ticks: int, time_base: Any) -> Fraction:
    return Fraction(ticks * time_base.numerator, time_base.denominator)
