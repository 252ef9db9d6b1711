"""The end of a run, for whoever was not there: status.json, and torchrun's last block."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import msgspec

from train.parallel.mesh import PeerLostError, World
from train.records import RecordError, RunStatus, State, read_status, write_status
from train.signals import Stopped, stopping


class Status:
    """Used as a context manager around a run, by every process, while the main one holds the
    folder's lock: what the block raises is written to status.json as the end of the run.
    """

    def __init__(self, output: Path, world: World, num_steps: int):
        """num_steps: 0 as long as nobody knows how many an epoch has; assign it then."""
        self._output, self._world, self.num_steps = output, world, num_steps
        self._step = 0
        self._end: tuple[State, str] = ("done", "")
        self._best_step: int | None = None
        self._written_s = 0.0

    def running(self, step: int) -> None:
        """`step` steps are finished. Written once a second at most."""
        self._step = step
        if self._world.is_main and time.monotonic() - self._written_s > 1.0:
            self._write("running", "")
            self._written_s = time.monotonic()

    def ends(self, state: State, reason: str, best_step: int | None = None) -> None:
        """How the run ends, if nothing is raised from here on."""
        self._end, self._best_step = (state, reason), best_step

    def stopped_at_once(self, reason: str, number: int) -> NoReturn:
        """From any thread, for a signal of that number when nothing needs to be saved."""
        sys.stderr.write(f"train: {reason}\n")
        sys.stderr.flush()
        self._stop(reason)
        os._exit(128 + number)

    def failed_at_once(self, reason: str) -> NoReturn:
        """From any thread, when the main one can't go on."""
        sys.stderr.write(f"train: {reason}\n")
        sys.stderr.flush()
        self._fail(reason)
        _tell_torchrun(reason)
        os._exit(1)

    def __enter__(self) -> Self:
        self.running(0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            if self._world.is_main:
                self._write(*self._end)
        elif isinstance(error, Stopped | KeyboardInterrupt | SystemExit):
            reason = str(error) or "interrupted"
            self._stop(reason)
            # `record` tells it of an Exception alone
            _tell_torchrun(reason)
        elif isinstance(error, PeerLostError):
            self._fail(str(error), only_if_running=True)
        else:
            self._fail(f"{type(error).__name__}: {error}")

    def _stop(self, reason: str) -> None:
        # torchrun sends SIGTERM too when another process has failed, which then has said why
        if self._world.is_main and self._says_running():
            self._write("stopped", reason)

    def _fail(self, reason: str, only_if_running: bool = False) -> None:
        """Any process may be the one that failed. only_if_running: another one knows better."""
        if only_if_running and not self._says_running():
            return
        self._write("failed", f"rank {self._world.rank}: {reason}")

    def _says_running(self) -> bool:
        """Whether no process has written yet how the run ended."""
        try:
            before = read_status(self._output)
        except (RecordError, OSError):
            return True
        return before is None or before.state == "running"

    def _write(self, state: State, reason: str) -> None:
        status = RunStatus(
            state=state,
            reason=" ".join(reason.split()),
            step=self._step,
            num_steps=self.num_steps,
            best_step=self._best_step,
            pid=os.getpid(),
            host=socket.gethostname(),
            time=time.time(),
        )
        if not self._world.sees_output:
            # of another host: the main process notices its end
            return
        try:
            write_status(self._output, status)
        except OSError as error:
            # a full disk: what ended the run must not be hidden by that
            sys.stderr.write(f"train: {error}\n")


def _tell_torchrun(reason: str) -> None:
    """What torch.distributed.elastic's `record` writes for an exception."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        message = {"message": {"message": reason, "extraInfo": extra}}
        Path(path).write_bytes(msgspec.json.encode(message))


@contextmanager
def interruptible() -> Iterator[None]:
    """Around a run. Before its loop, and after it, nothing needs to be saved: a signal to stop ends
    it as an exception, SIGUSR1 does nothing. What comes after the block changes nothing any more.
    """

    def end(number: int, frame: object) -> None:
        if isinstance(sys.exc_info()[1], PeerLostError):
            # it ends already: where a process is lost, torchrun sends SIGTERM to the others
            return
        raise Stopped(f"{signal.Signals(number).name} before or after the steps", number)

    numbers = stopping()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
