"""What the operating system asks of a run, and when all processes act on it.

SIGTERM, SIGINT and SIGHUP: stop after a checkpoint. SIGUSR1: a checkpoint, then go on. A signal
reaches one process at a time, and often all of them, so it is only noted; `agreed`, which every
process calls between the same two micro-batches, tells all of them the same. A second signal to
stop ends the process at once.

A thread reads the signals from a pipe into which Python's C code writes them, because a handler in
Python has to wait until the main thread is back from C, out of a collective for example.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import TracebackType
from typing import Self

from train.parallel import mesh
from train.parallel.mesh import World

# torchrun passes on what a terminal or a service manager has sent to the whole group already: what
# comes within this time is the same signal
REPEATED_S = 2.0
# for the last words of a process that a second signal ends
EXIT_S = 1.0


def stopping() -> list[int]:
    """The signals that ask to stop. SIGHUP comes when a terminal is closed or a connection breaks,
    also from torchrun, which passes it on under nohup too; without torchrun nohup keeps it away.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


class Wish(IntEnum):
    """What was asked for; of two wishes the higher one counts."""

    NONE = 0
    CHECKPOINT = 1
    STOP = 2


class Stopped(BaseException):
    """The run ended because a signal asked for it; `number` is the signal's. No Exception: outside
    of the loop it is raised anywhere, and must not be taken for a fault of what it interrupts.
    """

    def __init__(self, reason: str, number: int):
        super().__init__(reason)
        self.number = number


class Signals:
    """Used as a context manager around the loop, in the main thread."""

    def __init__(self, end_now: Callable[[str, int], None] | None = None) -> None:
        """end_now(reason, number): called by a thread when a second signal comes, to say so; the
        process ends after it, and after a second in any case.
        """
        self._lock, self._wish = threading.Lock(), Wish.NONE
        self._end_now = end_now
        self._stop_s: float | None = None
        # of the signal that asked to stop, if this process got one
        self._number = int(signal.SIGTERM)
        self._end: Callable[[str, int], None] | None = None

    def agreed(self, world: World) -> Wish:
        """What any process was asked for since the last call: the same on all of them. Raises
        PeerLostError.
        """
        with self._lock:
            mine, self._wish = self._wish, Wish.NONE
        return Wish(mesh.maximum(mine, world))

    def stopped(self, step: int) -> Stopped:
        """What to raise after a checkpoint of `step` finished steps."""
        name = signal.Signals(self._number).name
        where = f"after step {step}, which is saved" if step else "before the first step was done"
        return Stopped(f"{name}: stopped {where}", self._number)

    @contextmanager
    def at_once(self, end: Callable[[str, int], None]) -> Iterator[None]:
        """In the block nothing needs to be saved: when asked to stop, also before the block,
        `end(reason, number)` is called, perhaps in a thread; it should not return.
        """
        with self._lock:
            self._end = end
            self._end_if_asked()
        try:
            yield
        finally:
            with self._lock:
                self._end = None

    def _end_if_asked(self) -> None:
        if self._end is not None and self._stop_s is not None:
            name = signal.Signals(self._number).name
            self._end(f"{name}: stopped during validation or samples", self._number)

    def __enter__(self) -> Self:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._stopping = stopping()
        numbers = [*self._stopping, signal.SIGUSR1]
        # a handler must be there for the pipe to be written to; it has nothing to do
        self._old = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._writer)
        self._thread.join()

    def _read(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                with self._lock:
                    self._note(number)
        os.close(reader)

    def _note(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self._wish = max(self._wish, Wish.CHECKPOINT)
        elif number in self._stopping:
            now_s = time.monotonic()
            if self._stop_s is None:
                self._stop_s, self._number, self._wish = now_s, number, Wish.STOP
                self._end_if_asked()
            elif now_s - self._stop_s > REPEATED_S:
                self._exit(number)

    def _exit(self, number: int) -> None:
        if self._end_now is not None:
            # a disk that hangs is no reason to stay
            late = threading.Timer(EXIT_S, os._exit, (128 + number,))
            late.daemon = True
            late.start()
            name = signal.Signals(number).name
            self._end_now(
                f"{name}: ended at once by a second signal; what came after the last checkpoint is "
                f"lost",
                number,
            )
        os._exit(128 + number)
