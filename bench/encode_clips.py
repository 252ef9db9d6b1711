"""Clips and images for bench.encode: our encoder against diffusers', eager and compiled, and
against the convolutions alone.

Every measurement is made in turns on real footage, with random weights of the real size. Memory is
measured apart, with nothing else on the device.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.footage import real_windows
from bench.vae_kernels import profiled
from bench.vae_subjects import (
    Convolution,
    convolutions_alone,
    diffusers_latent,
    encode_by_layers,
    load_diffusers,
    num_operations,
    recorded_convolutions,
)
from loader.shape import Bucket
from loader.vae.check import relative_l2
from loader.vae.encoder import load_vae_encoder
from loader.vae.memory import EncodePlan, plan_encoding


def video_of(windows: Any, device: str, dtype: torch.dtype) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1]."""
    pixels_BFHWC = torch.from_numpy(windows).to(device)
    return (pixels_BFHWC.movedim(-1, 1).float() / 127.5 - 1).to(dtype)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(
    works: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of each, in turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peak_gib = dict.fromkeys(works, 0.0)
    for number in range(rounds + 1):
        for name, work in works.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronise(device)
            begin_s = time.perf_counter()
            work()
            synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - begin_s)
            if device == "cuda":
                peak_gib[name] = torch.cuda.max_memory_allocated() / 2**30
    return {
        name: {
            "n": len(each),
            "median_s": statistics.median(each),
            "least_s": min(each),
            "most_s": max(each),
            "peak_gib": peak_gib[name],
        }
        for name, each in seconds.items()
    }


@torch.inference_mode()
def check(
    folder: Path,
    bucket: Bucket,
    num_windows: int,
    device: str,
    dtypes: list[str],
    chunks: list[int],
) -> dict[str, Any]:
    """How far each precision is from diffusers' in float32, the chunk another from window to
    window.
    """
    windows = real_windows(bucket, num_windows)
    exact_vae = load_diffusers(folder, device, torch.float32)
    exact = [
        diffusers_latent(exact_vae, video_of(windows[i : i + 1], device, torch.float32))
        for i in range(num_windows)
    ]
    del exact_vae
    release()
    result: dict[str, Any] = {"window": str(bucket), "num_windows": num_windows}
    for name in dtypes:
        dtype = getattr(torch, name)
        ours, theirs = (
            load_vae_encoder(folder, device, dtype),
            load_diffusers(folder, device, dtype),
        )
        errors = []
        for i in range(num_windows):
            video = video_of(windows[i : i + 1], device, dtype)
            chunk = chunks[i % len(chunks)]
            errors.append((chunk, relative_l2(ours.encode(video, chunk), exact[i])))
        video = video_of(windows[:2], device, dtype)
        batch, first = ours.encode(video), ours.encode(video[:1, :, :1])
        whole = ours.encode(video[:1])
        result[name] = {
            "chunk_and_error": errors,
            "ours": max(error for _, error in errors),
            "batch_of_two": max(relative_l2(batch[i], exact[i][0]) for i in range(2)),
            "diffusers": relative_l2(diffusers_latent(theirs, video[:1]), exact[0]),
            "first_frame_is_its_own": torch.equal(whole[:, :, :1], first),
        }
        del ours, theirs, video, batch, first, whole
        release()
    return result


@torch.inference_mode()
def measure_clip(
    folder: Path,
    bucket: Bucket,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    chunks: list[int],
    plan: EncodePlan,
) -> dict[str, Any]:
    """Seconds of one window, in chunks as `plan` has them and others; `speedup` of ours."""
    video = video_of(real_windows(bucket, 1), device, dtype)
    ours, theirs = load_vae_encoder(folder, device, dtype), load_diffusers(folder, device, dtype)
    calls: list[Convolution] = []
    chunk = plan.chunk_frames
    with recorded_convolutions(calls):
        ours.encode(video, chunk)
    works: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.encode(video, chunk),
        "convolutions": convolutions_alone(calls, device),
        "diffusers": lambda: theirs.encode(video),
        "layers": lambda: encode_by_layers(ours, video),
    }
    for other in chunks:
        works[f"ours, chunks of {other}"] = partial(ours.encode, video, other)
    times = timed(works, rounds, device)
    own_s = times["ours"]["median_s"]
    result = {
        "window": str(bucket),
        "dtype": str(dtype),
        "plan": plan._asdict(),
        "times": times,
        "tera_operations": num_operations(calls) / 1e12,
        "of_the_convolutions": own_s / times["convolutions"]["median_s"],
        "speedup_over_diffusers": times["diffusers"]["median_s"] / own_s,
    }
    if device == "cuda":
        del works, theirs
        release()
        profile = profiled(lambda: ours.encode(video, chunk))
        result["profile"] = profile
        result["of_the_convolutions_kernels"] = 1e3 * own_s / profile["convolutions_ms"]
    return result


@torch.inference_mode()
def measure_images(
    folder: Path, bucket: Bucket, device: str, dtype: torch.dtype, rounds: int, batches: list[int]
) -> dict[str, Any]:
    """Seconds an image, one by one and in batches."""
    bucket = Bucket(bucket.width_px, bucket.height_px, 1)
    ours, theirs = load_vae_encoder(folder, device, dtype), load_diffusers(folder, device, dtype)
    image = video_of(real_windows(bucket, 1), device, dtype)
    works: dict[str, Callable[[], Any]] = {"diffusers, 1": lambda: theirs.encode(image)}
    for batch in batches:
        images = image.repeat(batch, 1, 1, 1, 1)
        works[f"ours, {batch}"] = partial(ours.encode, images)
        calls: list[Convolution] = []
        with recorded_convolutions(calls):
            ours.encode(images)
        works[f"convolutions, {batch}"] = convolutions_alone(calls, device)
    times = timed(works, rounds, device)
    each_s = {name: times[name]["median_s"] / int(name.rpartition(" ")[2]) for name in times}
    return {
        "image": str(bucket),
        "seconds_an_image": each_s,
        "times": times,
        "speedup_over_one_by_one": {
            batch: each_s["ours, 1"] / each_s[f"ours, {batch}"] for batch in batches
        },
    }


@torch.inference_mode()
def measure_compiled(
    folder: Path,
    bucket: Bucket,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    chunk_frames: int,
) -> dict[str, Any]:
    """diffusers with its encoder under torch.compile, in turns with ours."""
    video = video_of(real_windows(bucket, 1), device, dtype)
    ours, theirs = load_vae_encoder(folder, device, dtype), load_diffusers(folder, device, dtype)
    images = video_of(real_windows(Bucket(bucket.width_px, bucket.height_px, 1), 1), device, dtype)
    theirs.encoder = torch.compile(theirs.encoder)
    begin_s = time.perf_counter()
    theirs.encode(video)
    synchronise(device)
    first_s = time.perf_counter() - begin_s
    off = relative_l2(ours.encode(video, chunk_frames), diffusers_latent(theirs, video))
    works = {
        "ours": lambda: ours.encode(video, chunk_frames),
        "compiled": lambda: theirs.encode(video),
        "ours, an image": lambda: ours.encode(images),
        "compiled, an image": lambda: theirs.encode(images),
    }
    times = timed(works, rounds, device)
    return {"first_encode_s": first_s, "ours_against_it": off, "times": times}


@torch.inference_mode()
def measure_memory(
    folder: Path, bucket: Bucket, device: str, dtype: torch.dtype, budgets_gib: list[float]
) -> dict[str, Any]:
    """Peak memory of what `plan_encoding` chooses for each budget, of clips and of images."""
    ours = load_vae_encoder(folder, device, dtype)
    result: dict[str, Any] = {}
    for shape in (bucket, Bucket(bucket.width_px, bucket.height_px, 1)):
        for budget_gib in budgets_gib:
            plan = plan_encoding(shape, budget_gib, ours.stage_bytes_per_pixel)
            assert plan is not None
            pixels = torch.from_numpy(real_windows(shape, 1)).movedim(-1, 1)
            video_BCTHW = pixels.repeat(plan.batch, 1, 1, 1, 1).to(device)
            release()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ours.encode(video_BCTHW, plan.chunk_frames)
            peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            result[f"{shape}, {budget_gib:g} GiB"] = {**plan._asdict(), "peak_gib": peak_gib}
            result[f"{shape}, {budget_gib:g} GiB"]["fits"] = peak_gib <= budget_gib
    return result
