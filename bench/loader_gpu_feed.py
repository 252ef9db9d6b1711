"""The part `feed` of bench.loader_gpu: the same batches as on the CPU, and how fast they come."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu_rows import DEVICE, Row, at_most
from bench.loader import CPU, feed_samples, limit_samples
from loader.feed import Feed
from tools.fake.feed import make_feed

ROUNDS, WARM_UP = 5, 10


def pair_feed(dataset: Path, device: torch.device, **changes: Any) -> Feed:
    settings: dict[str, Any] = {"global_batch": 2, "micro_batch": 2, "caption_dropout": 0.2}
    return make_feed(dataset, device=device, **(settings | changes))


def check_feed(folder: Path) -> Iterator[Row]:
    for name in ("jpg", "small"):
        differing = 0
        with (
            pair_feed(folder / name, CPU) as on_cpu,
            pair_feed(folder / name, DEVICE, num_threads=4) as on_gpu,
        ):
            for _ in range(24):
                (a, _), (b, _) = next(on_cpu), next(on_gpu)
                differing += not (
                    a.keys == b.keys
                    and torch.equal(a.latent_BCTHW, b.latent_BCTHW.cpu())
                    and torch.equal(a.text_BSD, b.text_BSD.cpu())
                )
        yield at_most(f"{name}: batches of 24 that differ from the CPU's", differing, "", 0)
    subjects = [(kind, threads) for threads in (2, 4) for kind in (feed_samples, limit_samples)]
    rates: dict[Any, list[float]] = {subject: [] for subject in subjects}
    for _ in range(ROUNDS):
        for kind, threads in subjects:
            rates[kind, threads].append(_rate(kind(str(folder / "jpg"), threads, DEVICE, 8)))
    for kind, threads in subjects:
        runs = rates[kind, threads]
        yield Row(
            f"{kind.__name__}, {threads} threads (least {min(runs):.0f}, most {max(runs):.0f}, "
            f"n = {ROUNDS})",
            statistics.median(runs),
            "samples/s",
        )
    for threads in (2, 4):
        share = statistics.median(rates[feed_samples, threads]) / statistics.median(
            rates[limit_samples, threads]
        )
        yield Row(
            f"share of the limit, {threads} threads", share, "", "at least 0.85", share >= 0.85
        )


def _rate(samples: Iterator[Any]) -> float:
    """Samples a second up to the last: closing is no work of theirs (jobs begun beyond it,
    buffers to free).
    """
    for _ in range(WARM_UP):
        next(samples)
    torch.cuda.synchronize()
    start_s, times_s = time.perf_counter(), [time.perf_counter() for _ in samples]
    return len(times_s) / (times_s[-1] - start_s)
