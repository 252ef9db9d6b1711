"""A video file, opened: its frames in display order, each with its time on the screen, and damage
that is named.

Decoders hide damage by default; here they are told to fail, and packets are counted against the
header.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from shardgen.media.errors import MediaError

# formats that hold their own pictures: a playlist would take them from files that nobody hashed
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mxf,mxf_opatom,mpegts,mpeg,mpegvideo,m4v,h264,hevc,mjpeg,asf,flv,ogg,gxf,dv,"
    "nut,ivf"
)


def open_container(path: Path) -> Any:
    """An open container with at least one video stream, its decoder set to fail on damage, on one
    thread.
    """
    try:
        if path.stat().st_size == 0:
            raise MediaError("media_empty", "the file has 0 bytes")
        container = av.open(
            str(path),
            "r",
            container_options={"format_whitelist": _FORMATS},
            metadata_errors="replace",
        )  # titles are in CP949 as often as in UTF-8
    except av.ArgumentError as error:
        raise MediaError(
            "media_undecodable", f"can't be opened, or its format is none of {_FORMATS}"
        ) from error
    except (av.FFmpegError, OSError) as error:
        raise MediaError("media_undecodable", f"can't be opened: {error}") from error
    if not container.streams.video:
        container.close()
        raise MediaError("media_no_video", "the file has no video stream")
    context: Any = container.streams.video[0].codec_context
    if context is None:
        container.close()
        raise MediaError("media_undecodable", "there is no decoder for its codec")
    context.thread_count = 1
    context.options = {"err_detect": "explode"}
    return container


def timed_frames(
    frames: Iterator[Any], average_rate: Fraction | None
) -> Iterator[tuple[Any, float, float]]:
    """(frame, begin_s, end_s) for each frame, counted from the first one. Raises MediaError."""
    origin: Fraction | None = None
    held: tuple[Any, float] | None = None
    begin_s = -1.0
    for frame in frames:
        if frame.pts is None:
            raise MediaError("media_timestamps", "a frame has no timestamp")
        time = frame.pts * frame.time_base
        origin = time if origin is None else origin
        previous_s, begin_s = begin_s, float(time - origin)
        if begin_s <= previous_s:
            raise MediaError(
                "media_timestamps", f"timestamps go back from {previous_s} to {begin_s} s"
            )
        if held is not None:
            yield *held, begin_s
        held = frame, begin_s
    if held is not None:
        frame, begin_s = held
        length_s = frame.duration * frame.time_base if frame.duration else 1 / (average_rate or 24)
        yield frame, begin_s, begin_s + float(length_s)


def decoded_frames(container: Any) -> Iterator[Any]:
    """All frames in display order. Raises MediaError at the first damage, and at the end if some
    were missing.
    """
    stream = container.streams.video[0]
    num_packets, demuxed_s = 0, 0.0
    try:
        for packet in container.demux():
            if packet.pts is not None:
                demuxed_s = max(
                    demuxed_s, float((packet.pts + (packet.duration or 0)) * packet.time_base)
                )
            if packet.is_corrupt:
                raise MediaError("media_truncated", f"packet {num_packets} is cut off")
            if packet.stream is not stream:
                continue
            num_packets += packet.size > 0
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise MediaError(
                        "media_undecodable", f"a frame near packet {num_packets} is damaged"
                    )
                yield frame
    except av.FFmpegError as error:
        raise MediaError(
            "media_undecodable", f"packet {num_packets} does not decode: {error.strerror}"
        ) from error
    except IndexError:  # PyAV's, at the end of a file that got a stream in its middle: those it began with are through
        pass
    if stream.frames > num_packets:
        raise MediaError(
            "media_truncated",
            f"the header promises {stream.frames} frames, the file holds {num_packets}",
        )
    promised_s = (container.duration or 0) / av.time_base + max(
        container.start_time or 0, 0
    ) / av.time_base
    if promised_s - demuxed_s > 0.5:
        raise MediaError(
            "media_truncated",
            f"the header promises {promised_s:.2f} s, the file holds {demuxed_s:.2f} s",
        )


def deinterlaced(frames: Iterator[Any]) -> Iterator[Any]:
    """Frames as they are up to the first interlaced one, from there on through bwdif, which
    passes progressive ones.
    """
    graph: Any = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base,
            )
            bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
            graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _pulled(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph)


def _pulled(graph: Any) -> Iterator[Any]:
    try:
        while True:
            yield graph.vpull()
    except (av.BlockingIOError, av.EOFError):  # it wants another frame, or has none left
        return


def rotation_deg(frame: Any) -> int:
    """How far a frame is to be turned anticlockwise. Raises MediaError (media_rotation)."""
    if frame.rotation % 90:
        raise MediaError(
            "media_rotation",
            f"turned by {frame.rotation} degrees; only multiples of 90 are handled",
        )
    return int(frame.rotation)
