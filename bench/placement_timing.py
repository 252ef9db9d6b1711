"""The clock, the cap on the card's memory and the rows of bench.placement."""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loader.batch import Batch
from loader.registered import RegisteredMemory
from tools.budget import CONTEXT_BYTES, GIB
from tools.table import table
from train.run import Run

CAP_GIB = 32


class Timing(NamedTuple):
    seconds: float
    loss: float
    # of the subject's own: what the others hold is subtracted
    peak_gib: float


class Subject(NamedTuple):
    step: Callable[[Batch], Tensor]
    held_bytes: int  # on the card, from step to step
    run: Run | None = None


def say(text: str) -> None:
    """By one process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def time_step(subject: Subject, others_bytes: int, batch: Batch, device: torch.device) -> Timing:
    """others_bytes: what other subjects hold."""
    if device.type != "cuda":
        begin_s = time.perf_counter()
        loss = float(subject.step(batch))
        return Timing(time.perf_counter() - begin_s, loss, 0.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    loss_tensor = subject.step(batch)
    end.record()
    torch.cuda.synchronize()
    peak_gib = (torch.cuda.max_memory_allocated() - others_bytes) / GIB
    return Timing(start.elapsed_time(end) / 1e3, loss_tensor.item(), peak_gib)


def host_to_device_gb_s(device: torch.device, num_bytes: int = 2**30) -> float:
    """Of registered memory, in this process and those beside it at once."""
    memory = RegisteredMemory(num_bytes, device)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target.copy_(memory.tensor, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin_s = time.perf_counter()
    for _ in range(5):
        target.copy_(memory.tensor, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = 5 * num_bytes / (time.perf_counter() - begin_s) / 1e9
    memory.close()
    return rate


def cap_beside(others_bytes: int, device: torch.device) -> None:
    """From now on the process gets what `others_bytes` need and a card of CAP_GIB has."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    share = (others_bytes + CAP_GIB * GIB - CONTEXT_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0))


def rounds_of(
    subjects: dict[str, Subject],
    held: int,
    batch: Batch,
    device: torch.device,
    num: int,
    is_over: Callable[[], bool],
) -> Iterator[dict[str, list[Timing]]]:
    """In turns, in another order each time; after each round, those so far. Where it `is_over` no
    round begins, but for the first. held: bytes of all subjects together.
    """
    for name, subject in subjects.items():
        for _ in range(2):
            begin_s = time.perf_counter()
            time_step(subject, held - subject.held_bytes, batch, device)
        say(f"  {name}: the second step of the warm-up {time.perf_counter() - begin_s:.2f} s")
    found: dict[str, list[Timing]] = {name: [] for name in subjects}
    order = random.Random(0)
    for number in range(num):
        if number and is_over():
            break
        for name in order.sample(list(subjects), len(subjects)):
            subject = subjects[name]
            found[name].append(time_step(subject, held - subject.held_bytes, batch, device))
        took = ", ".join(f"{name} {timings[-1].seconds:.4f} s" for name, timings in found.items())
        say(f"  round {number + 1}: {took}")
        yield found


def rows_of(case: str, found: dict[str, list[Timing]], base: str) -> list[dict[str, Any]]:
    """A row a subject; ratios are medians over the rounds."""
    rows = []
    for name, timings in found.items():
        seconds = [timing.seconds for timing in timings]
        ratios = [s / other.seconds for s, other in zip(seconds, found[base], strict=True)]
        rows.append(
            {
                "case": case,
                "subject": name,
                "n": len(seconds),
                "s": statistics.median(seconds),
                "min_s": min(seconds),
                "max_s": max(seconds),
                "seconds": seconds,
                "ratio": statistics.median(ratios),
                "peak_gib": max(timing.peak_gib for timing in timings),
                "loss": timings[-1].loss,
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]], base: str) -> None:
    cells = [
        (
            row["case"],
            row["subject"],
            str(row["n"]),
            f"{row['s']:.4f} ({row['min_s']:.4f} to {row['max_s']:.4f})",
            f"{row['ratio']:.4f}",
            f"{row['peak_gib']:.2f}",
            f"{row['loss']:.4f}",
        )
        for row in rows
    ]
    header = ("case", "subject", "n", "s/step (least to most)", f"of {base}", "peak GiB", "loss")
    say(table(header, cells, align="<<>>>>>"))
