"""A run that can't go on ends, and says who is to blame.

Every process beats: a thread writes every few seconds where the main thread is, to
OUTPUT/.alive/rank-N or, where not all hosts see that folder, to the store that torchrun keeps
(train/parallel/beats.py). The same thread reads what the others wrote. It ends its process, and
torchrun then all of them, when another process is silent (dead, stopped, its host gone), or when no
process has got any further for `stuck_s` plus three times the longest micro-batch so far. A
thread, because the main thread may wait inside a collective; files, or the agent's store, because
they outlive who wrote them.

Validation, samples and checkpoints count as progress: all of them are done inside `busy`, and the
main thread calls `mark` on its way through the first two, which may take hours on a slow card.
"""

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from loader.files import told
from train.parallel.beats import open_beats
from train.parallel.mesh import World

log = logging.getLogger(__name__)
FOLDER = ".alive"
# until the first micro-batch is done: kernels are compiled, shapes are captured
START_S = 900.0
# for one long thing, such as a checkpoint on a slow disk, or one step of a clip
BUSY_S = 1800.0


class WatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[watch]` table: when a run that hangs is ended."""

    # a process that gives no sign for so long is dead or stopped
    silent_s: Annotated[float, Meta(gt=0.0)] = 25.0
    # no process gets any further for so long plus three times the longest micro-batch
    stuck_s: Annotated[float, Meta(gt=0.0)] = 60.0


class Beat(msgspec.Struct, kw_only=True):
    """Where a process is."""

    rank: int
    host: str
    pid: int
    number: int = 0
    # counts what the main thread has done
    progress: int = 0
    phase: str = "starts"
    is_busy: bool = False
    # finished steps
    step: int = 0
    # of the samples of the last micro-batch
    keys: list[str] = []

    def describe(self) -> str:
        keys = ", ".join(self.keys) or "none"
        return (
            f"rank {self.rank} (host {self.host}, process {self.pid}): {self.phase}, "
            f"{self.step} steps finished, last samples {keys}"
        )


class Watch:
    """Used as a context manager around the loop by every process. `end(reason)` ends it."""

    def __init__(self, output: Path, world: World, config: WatchConfig, end: Callable[[str], None]):
        self._config, self._end, self._world = config, end, world
        self._folder = output / FOLDER
        self._num_ranks = world.size
        self._mine = Beat(rank=world.rank, host=socket.gethostname(), pid=os.getpid())
        self._longest_s: float | None = None
        self._micro_start_s = time.monotonic()
        self._is_unwritten = False
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def mark(self, phase: str) -> None:
        """The main thread gets on: from here on it does `phase`."""
        self._mine.phase = phase
        self._mine.progress += 1

    def start_micro_batch(self, step: int, keys: list[str]) -> None:
        """A micro-batch of these samples starts after `step` finished steps."""
        self._mine.step, self._mine.keys = step, keys
        self._micro_start_s = time.monotonic()
        self.mark("trains")

    def end_micro_batch(self) -> None:
        elapsed_s = time.monotonic() - self._micro_start_s
        self._longest_s = max(self._longest_s or 0.0, elapsed_s)

    @contextmanager
    def busy(self, phase: str) -> Iterator[None]:
        """The block is one long thing, during which nobody is stuck."""
        self.mark(phase)
        self._mine.is_busy = True
        try:
            yield
        finally:
            # in this order: a thing that took long must not be seen as no progress of training
            self.mark("trains")
            self._mine.is_busy = False

    def __enter__(self) -> Self:
        self._beats = open_beats(self._world, self._folder)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finished.set()
        self._thread.join()
        self._beats.remove(self._mine.rank)

    def _run(self) -> None:
        """Of the thread."""
        seen_s = dict.fromkeys(range(self._num_ranks), time.monotonic())
        beats: dict[int, Beat] = {}
        progress_s = time.monotonic()
        interval_s = min(2.0, self._config.silent_s / 8)
        heard_s = written_s = time.monotonic()
        while not self._finished.wait(interval_s):
            now_s = time.monotonic()
            unwritten = self._beat()
            if unwritten is None:
                written_s = now_s
            try:
                current = [self._read(rank) for rank in range(self._num_ranks)]
                heard_s = now_s
            except OSError as error:
                if now_s - heard_s > self._config.silent_s and not self._finished.is_set():
                    self._end(f"nobody was heard for {self._config.silent_s:g} s: {error}")
                continue
            for rank, beat in enumerate(current):
                before = beats.get(rank)
                if beat is None:
                    # not there yet, or finished and gone: the end of a process is torchrun's
                    if before is not None:
                        seen_s[rank] = now_s
                    continue
                if before is None or beat.number != before.number:
                    seen_s[rank] = now_s
                if before is None or beat.progress != before.progress:
                    progress_s = now_s
                beats[rank] = beat
            if unwritten is None:
                self._judge_silence(now_s, seen_s, beats)
            else:
                # the others can't either, and nobody is dead for that
                seen_s = dict.fromkeys(seen_s, now_s)
            if self._num_ranks > 1 and now_s - written_s > self._config.silent_s:
                assert unwritten is not None
                self._end(
                    f"no sign of life could be written for {self._config.silent_s:g} s: "
                    f"{told(unwritten)}"
                )
            self._judge_progress(now_s, beats, progress_s)

    def _judge_silence(
        self, now_s: float, seen_s: dict[int, float], beats: dict[int, Beat]
    ) -> None:
        for rank, last_s in seen_s.items():
            if rank != self._mine.rank and now_s - last_s > self._config.silent_s:
                last = beats[rank].describe() if rank in beats else f"rank {rank}: never seen"
                self._end(
                    f"a process has given no sign for {self._config.silent_s:g} s: it is dead or "
                    f"stopped. {last}"
                )

    def _judge_progress(self, now_s: float, beats: dict[int, Beat], progress_s: float) -> None:
        limit_s = START_S
        if self._longest_s is not None:
            limit_s = self._config.stuck_s + 3 * self._longest_s
        if any(beat.is_busy for beat in beats.values()):
            limit_s = max(limit_s, BUSY_S)
        if now_s - progress_s > limit_s:
            each = "; ".join(beats[rank].describe() for rank in sorted(beats))
            self._end(f"no process has got any further for {limit_s:.0f} s. {each}")

    def _beat(self) -> OSError | None:
        """Returns why it could not be written, on a full disk for example: the loop will meet that
        too, but perhaps later than the others miss this process.
        """
        self._mine.number += 1
        try:
            self._beats.write(self._mine.rank, msgspec.json.encode(self._mine))
        except OSError as error:
            if not self._is_unwritten:
                log.warning("the sign of life could not be written: %s", told(error))
            self._is_unwritten = True
            return error
        self._is_unwritten = False
        return None

    def _read(self, rank: int) -> Beat | None:
        """Raises OSError where nobody can be heard."""
        try:
            words = self._beats.read(rank)
            return None if words is None else msgspec.json.decode(words, type=Beat)
        except msgspec.DecodeError:
            return None


def clear(output: Path) -> None:
    """Remove what an earlier run left; before any process of this one beats."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)
