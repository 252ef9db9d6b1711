"""H.264 proxies of clips that browsers don't play: made one at a time, bounded in length and size.

A proxy is small (360 lines), square in its pixels and progressive, and is called by the hash of the
media, so equal clips share one. The folder has a size limit; the proxies that were not used for the
longest time go first.
"""

import io
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import av
import av.error
import av.filter
from av.error import FFmpegError

from loader.files import TEMPORARY

log = logging.getLogger(__name__)
HEIGHT_PX, MAX_WIDTH_PX = 360, 854
MAX_LENGTH_S, MAX_WORK_S = 60.0, 120.0
MAX_BYTES, FOLDER_BYTES = 32 << 20, 2 << 30
MAX_WAITING = 20

Made = Literal["ready", "failed", "absent"]


def path_of(folder: Path, media_xxh3: str) -> Path | None:
    """Where the proxy of these media stands; None for what is no hash."""
    if len(media_xxh3) != 32 or not set(media_xxh3) <= set("0123456789abcdef"):
        return None
    return folder / f"{media_xxh3}.mp4"


def state_of(folder: Path, media_xxh3: str) -> Made:
    path = path_of(folder, media_xxh3)
    if path is None or (folder, media_xxh3) in _maker().failed:
        return "failed"
    if not path.is_file():
        return "absent"
    os.utime(path)  # it was wanted now
    return "ready"


def request(folder: Path, media_xxh3: str, source: Path) -> None:
    """Have the proxy made in the background, unless too many wait already."""
    _maker().add(folder, media_xxh3, source)


class _Maker:
    """The one thread that encodes."""

    def __init__(self) -> None:
        self.failed: set[tuple[Path, str]] = set()
        self._queue: queue.Queue[tuple[Path, str, Path]] = queue.Queue(MAX_WAITING)
        self._waiting: set[tuple[Path, str]] = set()
        threading.Thread(target=self._run, name="proxies", daemon=True).start()

    def add(self, folder: Path, media_xxh3: str, source: Path) -> None:
        if (folder, media_xxh3) not in self._waiting:
            try:
                self._queue.put_nowait((folder, media_xxh3, source))
                self._waiting.add((folder, media_xxh3))
            except queue.Full:
                pass  # an open page asks again

    def _run(self) -> None:
        while True:
            folder, media_xxh3, source = self._queue.get()
            try:
                path = path_of(folder, media_xxh3)
                assert path is not None, "asked for before it was added"
                folder.mkdir(parents=True, exist_ok=True)
                make_proxy(source, path)
                evict(folder, FOLDER_BYTES)
            except (FFmpegError, OSError, ValueError) as error:
                log.warning("no proxy of %s: %s", source, error)
                self.failed.add((folder, media_xxh3))
            finally:
                self._waiting.discard((folder, media_xxh3))


@cache
def _maker() -> _Maker:
    return _Maker()


def make_proxy(source: Path, target: Path) -> None:
    """Encode `source` for browsers. Raises FFmpegError, OSError, ValueError."""
    temporary = target.with_name(f"{target.name}{TEMPORARY}")
    try:
        with av.open(str(source)) as reader, av.open(str(temporary), "w", format="mp4") as writer:
            video = reader.streams.video[0]
            rate = min(Fraction(video.average_rate or 30), Fraction(60))
            graph, output, num_bytes = _scaler(video), None, 0
            for frame in _decoded(reader, video, time.monotonic() + MAX_WORK_S):
                for small in _through(graph, frame):
                    if output is None:
                        output = writer.add_stream("libx264", rate=rate)
                        output.width, output.height = small.width, small.height
                        output.pix_fmt, output.time_base = "yuv420p", video.time_base
                        output.options = {"crf": "26", "preset": "veryfast"}
                    packets = output.encode(small)
                    num_bytes += sum(packet.size for packet in packets)
                    writer.mux(packets)
                if num_bytes > MAX_BYTES:
                    break
            if output is None:
                raise ValueError("there is no picture in it")
            writer.mux(output.encode(None))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _decoded(reader: Any, video: Any, deadline: float) -> Iterator[Any]:
    """Frames of the first MAX_LENGTH_S, for as long as there is time; None ends them."""
    for frame in reader.decode(video):
        if (frame.time or 0.0) > MAX_LENGTH_S or time.monotonic() > deadline:
            break
        yield frame
    yield None


def _through(graph: av.filter.Graph, frame: Any) -> Iterator[Any]:
    """What comes out of the filters when this frame goes in; the deinterlacer is one behind."""
    graph.push(frame)
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _scaler(video: Any) -> av.filter.Graph:
    """Progressive, square pixels, HEIGHT_PX lines or as many as fit MAX_WIDTH_PX."""
    aspect = float(video.sample_aspect_ratio or 1) * video.width / video.height
    height = min(HEIGHT_PX, int(MAX_WIDTH_PX / aspect)) // 2 * 2
    width = max(2, round(height * aspect / 2) * 2)
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(template=video),
        graph.add("bwdif", "mode=send_frame:deint=interlaced"),
        graph.add("scale", f"{width}:{max(2, height)}"),
        graph.add("setsar", "1"),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ]
    for first, second in pairwise(nodes):
        first.link_to(second)
    graph.configure()
    return graph


def evict(folder: Path, limit_bytes: int) -> None:
    """Delete the proxies that were wanted the longest ago until the folder is below its limit."""
    files = sorted((each.stat(), each) for each in folder.glob("*.mp4"))
    files.sort(key=lambda item: item[0].st_mtime_ns)
    held = sum(stat.st_size for stat, _ in files)
    for stat, path in files:
        if held <= limit_bytes:
            return
        path.unlink(missing_ok=True)
        held -= stat.st_size


@lru_cache(maxsize=256)
def still(path: Path) -> bytes | None:
    """The first picture of a file as a small JPEG; None if there is none."""
    try:
        with av.open(str(path)) as reader:
            video = reader.streams.video[0]
            frame = next(iter(reader.decode(video)))
            graph = _scaler(video)
            small = [*_through(graph, frame), *_through(graph, None)]
            picture = small[0].to_image()
    except (FFmpegError, OSError, ValueError, IndexError, StopIteration):
        return None
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()
