"""The pass between convolutions on a GPU, for bench.encode: right at the real widths, how fast
for each tile, and where the time of a whole encode goes.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from loader.vae import pointwise_triton
from loader.vae.pending import GroupMean, Pending, Stream
from loader.vae.pointwise import finish_eager

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
# (TILE, NUM_WARPS)
TILES = ((1024, 4), (512, 2), (512, 4), (2048, 4), (2048, 8), (4096, 8))


def places(
    channels: int, height: int, width: int, dtype: torch.dtype, device: str, frames: int = 4
) -> Iterator[tuple[str, Callable[[], Pending], dict[str, Any], float]]:
    """Each kind of place in the encoder: (name, fresh pending sum, the rest of finish's arguments,
    bytes that have to move).
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, residual = (random(1, frames, height, width, channels) for _ in range(2))
    bias, gamma = random(channels), random(channels)
    source = Stream(random(1, frames, 2 * height, 2 * width, channels), bias)
    halves = Stream(random(1, 2 * frames, 2 * height, 2 * width, channels // 2), None)
    past = random(1, 2, height, width, channels)
    empty = torch.empty(1, 2 + frames, height, width, channels, device=device, dtype=dtype)
    padded = x.new_empty(1, frames, height + 1, width + 1, channels)
    flags = {"gamma_C": gamma, "past_BPHWC": past, "silu": True, "stores_sum": True}
    size = float(x.nbytes)
    into = {"buffer_BTHWC": empty, **flags}

    yield (
        "bias, norm",
        lambda: Pending(x.clone(), bias),
        into | {"stores_sum": False},
        2 * size + 2 * past.nbytes,
    )
    yield (
        "bias, residual, norm, sum",
        lambda: Pending(x.clone(), bias, residual),
        into,
        4 * size + 2 * past.nbytes,
    )
    yield (
        "bias, residual, padding",
        lambda: Pending(x.clone(), bias, residual),
        {
            "buffer_BTHWC": padded,
            "gamma_C": None,
            "past_BPHWC": None,
            "silu": False,
            "stores_sum": False,
        },
        3 * size,
    )
    yield (
        "bias, means of 2x2, norm, sum",
        lambda: Pending(x.clone(), bias, None, GroupMean(source, 1, 2)),
        into,
        3 * size + source.x_BTHWC.nbytes + 2 * past.nbytes,
    )
    yield (
        "bias, means of 2x2x2, norm, sum",
        lambda: Pending(x.clone(), bias, None, GroupMean(halves, 2, 2)),
        into,
        3 * size + halves.x_BTHWC.nbytes + 2 * past.nbytes,
    )


def check_kernels(device: str, shape: tuple[int, int]) -> dict[str, float]:
    """The largest deviation from the reference by place and dtype, in units of the tolerance;
    infinite where two runs differ.
    """
    worst: dict[str, float] = {}
    for dtype, tolerance in TOLERANCE.items():
        for channels in (96, 160, 320, 640) if dtype == torch.float16 else (160,):
            for name, pending, options, _ in places(channels, *shape, dtype, device):
                results = []
                for run in (finish_eager, pointwise_triton.finish, pointwise_triton.finish):
                    own, buffer = pending(), options["buffer_BTHWC"]
                    buffer.fill_(float("nan"))
                    run(own, **options)
                    results.append(torch.cat([buffer.flatten(), own.x_BTHWC.flatten()]))
                reference, once, again = results
                allowed = tolerance * (1 + reference.float().abs())
                off = float(((once.float() - reference.float()).abs() / allowed).max())
                off = off if off == off and torch.equal(once, again) else float("inf")
                key = f"{name}, {dtype}".replace("torch.", "")
                worst[key] = max(worst.get(key, 0.0), off)
    return worst


def rates(device: str, dtype: torch.dtype, height: int, width: int) -> dict[str, dict[str, float]]:
    """GB/s of every place at 160 channels and the first stage's size, by tile; and of a copy."""
    x = torch.randn(1, 16, height, width, 160, device=device, dtype=dtype)
    copy_s = _median_s(partial(torch.empty_like(x).copy_, x))
    result = {"copy": {"copy": 2 * x.nbytes / copy_s / 1e9}}
    del x
    for name, pending, options, num_bytes in places(160, height, width, dtype, device, 16):
        own = pending()
        result[name] = {}
        for tile, num_warps in TILES:
            with (
                patch.object(pointwise_triton, "TILE", tile),
                patch.object(pointwise_triton, "NUM_WARPS", num_warps),
            ):
                took_s = _median_s(partial(pointwise_triton.finish, own, **options))
            result[name][f"{tile} x {num_warps}"] = num_bytes / took_s / 1e9
    return result


def _median_s(work: Callable[[], Any], rounds: int = 7) -> float:
    work()
    times_s = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times_s.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times_s)


def profiled(work: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds by kernel, of the convolutions, and of each kind of `_finish` with its GB/s."""
    launches: list[tuple[str, float]] = []
    finish = pointwise_triton.finish

    def described(pending: Pending, buffer: Tensor, gamma: Any, past: Any, *flags: bool) -> None:
        x, shortcut = pending.x_BTHWC, pending.shortcut
        read = [x, pending.residual_BTHWC, None if shortcut is None else shortcut.source.x_BTHWC]
        num_bytes = sum(tensor.nbytes for tensor in read if tensor is not None) + buffer.nbytes
        num_bytes += flags[1] * x.nbytes
        parts = [f"{x.shape[-1]} channels {x.shape[3]}x{x.shape[2]}x{x.shape[1]}"]
        parts += ["norm"] * (gamma is not None) + ["residual"] * (read[1] is not None)
        parts += ["means"] * (shortcut is not None) + ["sum"] * flags[1]
        launches.append((", ".join(parts), float(num_bytes)))
        finish(pending, buffer, gamma, past, *flags)

    with (
        patch.object(pointwise_triton, "finish", described),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded,
    ):
        work()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: event.time_range.start)
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name].append(event.time_range.elapsed_us() / 1e3)
    finished = [event for event in kernels if event.name.startswith("_finish")]
    by_place: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event, (place, num_bytes) in zip(finished, launches, strict=False):
        by_place[place][0] += event.time_range.elapsed_us() / 1e3
        by_place[place][1] += num_bytes
    by_operator = {
        event.key: event.self_device_time_total / 1e3
        for event in recorded.key_averages()
        if event.self_device_time_total > 0 and event.key.startswith("aten::")
    }
    begin_us = min(event.time_range.start for event in kernels)
    end_us = max(event.time_range.end for event in kernels)
    return {
        "span_ms": (end_us - begin_us) / 1e3,
        "busy_ms": sum(map(sum, by_name.values())),
        "convolutions_ms": by_operator.get("aten::cudnn_convolution", 0.0),
        "operators_ms": dict(sorted(by_operator.items(), key=lambda item: -item[1])[:20]),
        "kernels": [
            {"name": name[:120], "calls": len(each), "ms": sum(each)}
            for name, each in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]
        ],
        "finish": {
            place: {"ms": ms, "gb_per_s": num_bytes / ms / 1e6}
            for place, (ms, num_bytes) in by_place.items()
        },
        "finish_launches": [len(finished), len(launches)],
    }
