"""What a run tells about itself: OUTPUT/metrics.jsonl, TensorBoard beside it, and the progress
bar of rank 0.

Only measured values are written. A resumed run first drops the lines past its checkpoint, which a
killed run may have left, so that the file always reads as one run.
"""

import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from loader.files import write_atomic

METRICS_FILE = "metrics.jsonl"
Record = dict[str, float | int | None]


class Metrics:
    """Writes one record per logged step; only rank 0 has one."""

    def __init__(self, output: Path, first_step: int, num_steps: int):
        output.mkdir(parents=True, exist_ok=True)
        path = output / METRICS_FILE
        if path.exists():
            kept = [
                line
                for line in path.read_bytes().splitlines(keepends=True)
                if line.endswith(b"\n") and msgspec.json.decode(line)["step"] <= first_step
            ]
            write_atomic(path, b"".join(kept))
        self._file = open(path, "ab")  # closed in __exit__
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=num_steps, initial=first_step, desc="train", unit="step", dynamic_ncols=True
        )

    def write(self, record: Record) -> None:
        """`record["step"]` counts finished steps; None means not measured (memory on a machine
        that can't tell).
        """
        step = int(record["step"] or 0)
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, step)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(
            f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tok/s, "
            f"data wait {record['data_wait_share']:.1%}"
        )

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._writer.close()
        self._file.close()


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

    def _now(self) -> Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """What was done since the last lap was `name`."""
        self._laps.append((name, self._now()))

    def split(self) -> Laps:
        """The laps since the last `split`, for `lap_seconds`."""
        laps, self._laps = self._laps, self._laps[-1:]
        return laps


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
        self._values = torch.stack([scalar.detach().float() for scalar in scalars]).to(
            "cpu", non_blocking=True
        )
        self._copied = torch.cuda.Event() if scalars[0].is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values


class Report(NamedTuple):
    """A step to be logged, with the `num_steps` since the one before; nothing of it has been read
    from the device.
    """

    step: int
    num_steps: int
    epoch: int
    lr: float
    scalars: Scalars  # loss, gradient norm, loss scale
    num_tokens: int
    laps: Laps
    memory_gib: float


def record_of(report: Report) -> Record:
    """The report as numbers. On a GPU this waits until the step is done, but for no later one."""
    seconds, (loss, grad_norm, loss_scale) = lap_seconds(report.laps), report.scalars.read()
    elapsed_s = sum(seconds.values())
    return {
        "step": report.step,
        "epoch": report.epoch,
        "loss": loss,
        "lr": report.lr,
        "grad_norm": grad_norm,
        "loss_scale": loss_scale,
        "s_per_step": elapsed_s / report.num_steps,
        **{name: s / report.num_steps for name, s in seconds.items()},
        "tokens_per_s": report.num_tokens / elapsed_s,
        "data_wait_share": seconds["data_wait_s"] / elapsed_s,
        "memory_gib": report.memory_gib,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far: of the CUDA allocator on a GPU, of the resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
