"""Interlaced frames through bwdif, one frame out for each frame in."""

from collections.abc import Iterator
from typing import Any

import av

from shardgen.media.errors import MediaError


def deinterlaced(frames: Iterator[Any]) -> Iterator[Any]:
    """Frames as they are up to the first interlaced one, from there on through bwdif, which
    passes progressive ones. Raises MediaError (media_undecodable) for what bwdif does not take, as
    pictures of less than three lines.
    """
    try:
        yield from _through_bwdif(frames)
    except av.FFmpegError as error:
        raise MediaError("media_undecodable", f"can't be deinterlaced: {error.strerror}") from error


def _through_bwdif(frames: Iterator[Any]) -> Iterator[Any]:
    graph: Any = None
    kind: Any = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        # a graph is for one size and format
        if kind != (frame.width, frame.height, frame.format.name):
            if graph is not None:
                yield from _drained(graph)
            graph = _bwdif(frame)
            kind = frame.width, frame.height, frame.format.name
        graph.vpush(frame)
        yield from _pulled(graph)
    if graph is not None:
        yield from _drained(graph)


def _bwdif(frame: Any) -> Any:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base,
    )
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    return graph


def _drained(graph: Any) -> Iterator[Any]:
    graph.vpush(None)
    yield from _pulled(graph)


def _pulled(graph: Any) -> Iterator[Any]:
    try:
        while True:
            yield graph.vpull()
    except (av.BlockingIOError, av.EOFError):  # it wants another frame, or has none left
        return
