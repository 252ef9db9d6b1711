"""Measuring a step without waiting for it: where its time goes, and numbers on their way from the
device to the host.
"""

import resource
import time
from itertools import pairwise

import torch
from torch import Tensor

Moment = float | torch.cuda.Event
Laps = list[tuple[str, Moment]]


class Stopwatch:
    """Where the time goes: every moment since the last `split` belongs to the lap that ends after
    it.

    On a GPU the laps are events on its stream, so they say how long the device was busy with (or
    idle before) a lap, and nothing waits for them but `lap_seconds`. On the CPU they are
    wall-clock time.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._laps: Laps = [("", self._now())]

    def lap(self, name: str) -> None:
        """What was done since the last lap was `name`."""
        self._laps.append((name, self._now()))

    def split(self) -> Laps:
        """The laps since the last `split`, for `lap_seconds`."""
        laps, self._laps = self._laps, self._laps[-1:]
        return laps

    def _now(self) -> Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def lap_seconds(laps: Laps) -> dict[str, float]:
    """Seconds per name; their sum is all of the time. On a GPU this waits until the last lap is
    done.
    """
    seconds: dict[str, float] = {}
    for (_, start), (name, end) in pairwise(laps):
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            elapsed_s = start.elapsed_time(end) / 1000
        else:
            assert isinstance(start, float) and isinstance(end, float)
            elapsed_s = end - start
        seconds[name] = seconds.get(name, 0.0) + elapsed_s
    return seconds


class Scalars:
    """Zero-dimensional tensors on their way to the host. Reading them waits for what was queued
    before they were asked for, and not, as `item` does, for what was queued since.
    """

    def __init__(self, *scalars: Tensor):
        stacked = torch.stack([scalar.detach().double() for scalar in scalars])
        self._values = stacked.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if scalars[0].is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[float]:
        """The values, in the order in which they were given."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values


class RunAhead:
    """Keeps the host at most one micro-batch ahead of the GPU, which never waits for that: so
    whatever the host decides between two micro-batches, such as to stop, takes effect soon.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._before: torch.cuda.Event | None = None

    def wait(self) -> None:
        """After a micro-batch was queued: wait until the one before it is done."""
        if not self._cuda:
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        if self._before is not None:
            self._before.synchronize()
        self._before = event


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far: of the CUDA allocator on a GPU, of the resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
