"""Clips to windows of frames, ahead of the encoder: in threads of the worker's process, and on
into the shard that comes next, whose first clips decode while this one's texts are encoded and its
files are written.

Results are taken in the order of the plan, whichever clip is ready first: batches must not depend
on the speed of a disk.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loader.files import file_xxh3
from loader.mp4 import encode_mp4
from loader.sample import JPG, MP4
from loader.shape import Bucket
from shardgen.encode.unit import EncodeSpec, ShardJob
from shardgen.media.decode import Frames, decode_windows
from shardgen.media.errors import MediaError
from shardgen.media.pictures import encode_jpeg, window_faults
from shardgen.rules.windows import Window


class EncodeError(ValueError):
    """A shard can't be encoded now; the message names the shard, the file and how to fix it."""


class Decoded(NamedTuple):
    """A window out of its clip: uint8 [F, H, W, 3] and the picture members made from it, or why
    there are none.
    """

    window: Window
    frames: Frames
    pictures: dict[str, bytes]
    faults: list[str]
    error: MediaError | None = None


class _Begun:
    """The clips of one shard: those that no thread has been given yet, and those under way."""

    def __init__(self, job: ShardJob, spec: EncodeSpec) -> None:
        self.job, self.spec = job, spec
        # Windows by medium: each is decoded once, in one pass.
        clips: dict[str, list[Window]] = {}
        for window in sorted(
            job.plan.windows, key=lambda window: (window.media_xxh3, window.start_ms, window.key)
        ):
            clips.setdefault(window.media_xxh3, []).append(window)
        self.clips = deque(clips.values())
        self.running: deque[Future[list[Decoded]]] = deque()

    def submit(self, pool: ThreadPoolExecutor, limit: int) -> int:
        """Hand up to `limit` clips to the pool; returns how many more it could have been."""
        while self.clips and limit > 0:
            self.running.append(pool.submit(decode_clip, self.job, self.spec, self.clips.popleft()))
            limit -= 1
        return limit

    def cancel(self) -> None:
        for future in self.running:
            future.cancel()


class ClipReader:
    """Decodes the clips of one shard after another, `num_threads` clips ahead."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads)
        self._next: _Begun | None = None

    def windows(
        self, job: ShardJob, spec: EncodeSpec, upcoming: ShardJob | None = None
    ) -> Generator[Decoded]:
        """Every window of the plan, clip by clip, in an order that only the plan decides.

        When no clip of this shard is left to start, those of `upcoming` are; they are not lost if
        it is what this method is called with next. Raises EncodeError if a file is not the
        planned one.
        """
        begun, self._next = self._next, None
        if begun is None or (begun.job, begun.spec) != (job, spec):
            if begun is not None:
                begun.cancel()
            begun = _Begun(job, spec)
        following = None if upcoming is None else _Begun(upcoming, spec)
        try:
            while begun.clips or begun.running:
                # one clip more than there are threads: the one that is taken next
                limit = self._num_threads + 1 - len(begun.running)
                room = begun.submit(self._pool, limit)
                if following is not None:
                    following.submit(self._pool, room - len(following.running))
                yield from begun.running.popleft().result()
        except BaseException:
            begun.cancel()
            raise
        finally:
            self._next = following
            if following is not None:
                following.submit(self._pool, self._num_threads - len(following.running))


@lru_cache(maxsize=1)
def clip_reader(num_threads: int) -> ClipReader:
    """This process's reader: what it has begun for the next shard stays from call to call."""
    return ClipReader(num_threads)


def decode_clip(job: ShardJob, spec: EncodeSpec, windows: list[Window]) -> list[Decoded]:
    """All windows of one medium, in one pass. Raises EncodeError if the file is not the planned
    one.
    """
    expected = windows[0].media_xxh3
    path, bucket = Path(job.media[expected]), Bucket.parse(job.plan.bucket)
    # Whatever is decoded below must be the bytes that were planned.
    try:
        found = file_xxh3(path)
    except OSError as error:
        raise EncodeError(
            f"{job.plan.name}: {path} can't be read: {error.strerror}; make it readable and run "
            f"the build again"
        ) from error
    if found != expected:
        raise EncodeError(
            f"{job.plan.name}: {path} has changed since it was planned (its xxh3_128 is {found}, "
            f"was {expected}); put the old file back, or build into a new output folder"
        )
    decoded: dict[int, Decoded] = {}
    try:
        starts_ms = [window.start_ms for window in windows]
        for index, frames in decode_windows(path, starts_ms, windows[0].fps, bucket, spec.fit):
            decoded[index] = Decoded(
                windows[index],
                frames,
                _pictures(windows[index], frames, spec),
                window_faults(frames),
            )
    except MediaError as error:
        # Windows before the fault stand; those behind it are lost for this reason.
        for index, window in enumerate(windows):
            decoded.setdefault(index, Decoded(window, np.empty(0, np.uint8), {}, [], error))
    return [decoded[index] for index in range(len(windows))]


def _pictures(window: Window, frames: Frames, spec: EncodeSpec) -> dict[str, bytes]:
    members = {}
    if window.media_type == "video" or spec.jpg_for_images:
        members[JPG] = encode_jpeg(frames[0], spec.jpg_quality)
    if spec.mp4 and window.media_type == "video":
        members[MP4] = encode_mp4(frames, window.fps, spec.mp4_encoder)
    return members
