"""Encoding, checked and timed: `python -m bench.encode --output DIR [--parts ...]`.

Weights are random, of the real size; footage is real (bench/footage.py). DIR/encode.json and
DIR/encode.txt hold what is measured so far, written again after every step of these parts:

checks   every kernel against its reference at the real widths; latents of real windows within 1e-2
         relative L2 of diffusers' in float32, whatever the chunk; the first latent frame is that of
         the first frame alone, bit for bit; peak memory within encode.vae_memory_gib
clips    ours, our layers one by one, diffusers and the convolutions alone, in turns
images   one by one and in batches
compiled diffusers under torch.compile, in turns with ours
text     UMT5 in each number format
build    `shardgen build` with a tiny text encoder: windows/s against the VAE's own rate
workers  builds by one worker and by one a GPU: the same bytes, which verify; latents of a tiny
         checkpoint within 1e-2 of those of a float32 build on the CPU

The exit code is 1 if a check fails. `--device cpu --shape small` tries the logic.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.encode_builds import BuildSetting, latents_of, run_build, shard_hashes, write_corpus
from bench.encode_clips import (
    check,
    measure_clip,
    measure_compiled,
    measure_images,
    measure_memory,
    release,
)
from bench.encode_text import measure_text
from bench.results import save
from bench.vae_kernels import check_kernels, rates
from bench.vae_subjects import write_model
from loader.shape import Bucket
from loader.vae.encoder import load_vae_encoder
from loader.vae.memory import EncodePlan, plan_encoding
from shardgen.verify import verify_dataset
from tools.fake.checkpoint import write_tiny_checkpoint

TOLERANCE = 1e-2
DTYPES = ["float16", "bfloat16", "float32"]
PARTS = ["checks", "clips", "images", "compiled", "text", "build", "workers"]
# what the precisions not asked for are checked at, and a size for a CPU
QUARTER, SMALL = "640x352x17", "64x32x9"
TINY_BUCKETS = ("160x96x9", "160x96x1")


class Run:
    """The options, what follows from them, and the result so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._begin_s = time.perf_counter()
        self.options, self.folder = options, folder
        self.device, self.rounds = options.device, options.rounds
        self.dtype = getattr(torch, options.dtype)
        self.is_small = options.shape == "small"
        self.bucket = Bucket.parse(SMALL if self.is_small else options.shape)
        self.result: dict[str, Any] = {"device": self.device, "torch": torch.__version__}
        self.checks: dict[str, bool] = {}
        if self.device == "cuda":
            self.result["device"] = torch.cuda.get_device_name()
            self.result["cudnn"] = torch.backends.cudnn.version()
        write_model(folder, options.kind, 8 if self.is_small else None)
        ours = load_vae_encoder(folder, "cpu", self.dtype)
        plan = plan_encoding(self.bucket, 16.0, ours.stage_bytes_per_pixel)
        assert plan is not None
        self.plan: EncodePlan = plan

    def save(self) -> dict[str, Any]:
        """Write what is measured so far, whatever comes next; returns it."""
        wall_s = time.perf_counter() - self._begin_s
        result = self.result | {"checks": self.checks, "wall_s": wall_s}
        save(self.options.output / "encode.json", result)
        (self.options.output / "encode.txt").write_text(summary(result) + "\n")
        return result

    def run_checks(self) -> None:
        folder, few = self.folder, Bucket.parse(SMALL if self.is_small else QUARTER)
        chunks = [4, 8] if self.is_small else [4, 8, 16, 24, 48]
        if self.device == "cuda":
            self.result["kernels_off"] = check_kernels(self.device, (37, 50))
            self.checks["kernels"] = max(self.result["kernels_off"].values()) <= 1
            self.save()
        own, windows = self.options.dtype, self.options.windows
        others = [each for each in DTYPES if each != own]
        self.result["accuracy"] = [
            check(folder, self.bucket, windows, self.device, [own], chunks),
            check(folder, few, 3, self.device, others, [4, 8, 16]),
        ]
        half = self.result["accuracy"][0][own]
        self.checks["latents"] = max(half["ours"], half["batch_of_two"]) <= TOLERANCE
        self.checks["first_frame"] = half["first_frame_is_its_own"]
        self.save()
        memory = measure_memory(folder, self.bucket, self.device, self.dtype, [16.0, 8.0])
        self.result["memory"] = memory
        self.checks["memory"] = all(each["fits"] for each in memory.values())

    def run_clips(self) -> None:
        chunks = [4] if self.is_small else [8, 16, 24]
        self.result["clips"] = measure_clip(
            self.folder, self.bucket, self.device, self.dtype, self.rounds, chunks, self.plan
        )
        self.save()
        release()
        if self.device == "cuda":
            patch = 2 if self.options.kind == "wan22" else 1
            height, width = self.bucket.height_px // patch, self.bucket.width_px // patch
            self.result["rates_gb_per_s"] = rates(self.device, self.dtype, height, width)

    def run_images(self) -> None:
        batches = [1, 2] if self.is_small else [1, 4, 16]
        self.result["images"] = measure_images(
            self.folder, self.bucket, self.device, self.dtype, self.rounds, batches
        )

    def run_compiled(self) -> None:
        self.result["compiled"] = measure_compiled(
            self.folder,
            self.bucket,
            self.device,
            self.dtype,
            self.rounds,
            self.plan.chunk_frames,
        )
        self.checks["compiled"] = self.result["compiled"]["ours_against_it"] <= TOLERANCE

    def run_text(self) -> None:
        self.result["text"] = {}
        for name in DTYPES:
            dtype = getattr(torch, name)
            batch, tokens = (2, 16) if self.is_small else (8, 200)
            self.result["text"][name] = measure_text(
                self.device, dtype, self.rounds, batch, tokens, self.is_small
            )
            self.save()
            release()

    def run_build(self) -> None:
        """The model: this VAE, and the tiny checkpoint's text encoder."""
        root, tiny = self.folder / "corpus", self.folder / "tiny"
        write_corpus(root, self.options.clips, os.cpu_count() or 1)
        write_tiny_checkpoint(tiny)
        for part in ("tokenizer", "text_encoder"):
            (self.folder / part).symlink_to(tiny / part)
        setting = BuildSetting(
            device=self.device,
            dtype=self.options.dtype,
            buckets=(str(self.bucket),),
            per_shot=2,
            samples_per_shard=4 if self.is_small else 25,
            num_workers=1,
            decode_threads=2 if self.is_small else 16,
        )
        built = run_build(self.folder / "built", root, self.folder, setting)
        if "clips" in self.result:
            own_s = self.result["clips"]["times"]["ours"]["median_s"]
            built["of_the_vaes_rate"] = built["windows_per_s"] * own_s
            # on a CPU all of it runs on the same cores
            self.checks["build"] = self.device == "cpu" or built["of_the_vaes_rate"] >= 0.9
        self.result["build"] = built

    def run_workers(self) -> None:
        """With one GPU: one worker, twice."""
        root, tiny = self.folder / "few", self.folder / "few_tiny"
        write_corpus(root, 6, os.cpu_count() or 1)
        write_tiny_checkpoint(tiny)
        setting = BuildSetting(self.device, self.options.dtype, TINY_BUCKETS, 1, 2, 1, 2)
        num_workers = torch.cuda.device_count() if self.device == "cuda" else 2
        builds = {
            "one": setting,
            "all": setting._replace(num_workers=num_workers),
            "exact": setting._replace(device="cpu", dtype="float32"),
        }
        for name, each in builds.items():
            built = run_build(self.folder / name, root, tiny, each)
            faults = list(verify_dataset(self.folder / name, 2, lambda _: None))
            self.checks[f"workers_{name}_verifies"] = not faults
            self.result[f"workers_{name}"] = built
            self.save()
        one, exact = latents_of(self.folder / "one"), latents_of(self.folder / "exact")
        self.checks["workers_same_bytes"] = shard_hashes(self.folder / "one") == shard_hashes(
            self.folder / "all"
        )
        furthest = max(
            float(np.linalg.norm(one[key] - exact[key]) / np.linalg.norm(exact[key]))
            for key in exact
        )
        self.result["latents_against_cpu_float32"] = furthest
        self.checks["workers_latents"] = one.keys() == exact.keys() and furthest <= TOLERANCE

    def run(self) -> Iterator[str]:
        """All parts that were asked for; yields the name of each when it is done."""
        for part in self.options.parts:
            getattr(self, f"run_{part}")()
            release()
            yield part


def times_of(result: dict[str, Any]) -> list[str]:
    return [
        f"{name:24} {each['median_s']:.4f} s ({each['least_s']:.4f} to {each['most_s']:.4f})"
        f"  {each['peak_gib']:.2f} GiB with all that is measured"
        for name, each in result["times"].items()
    ]


def summary(result: dict[str, Any]) -> str:
    """The lines to read first; all figures stand in the JSON."""
    lines = []
    for key, value in result.items():
        if key in ("clips", "images", "compiled"):
            plain = {k: v for k, v in value.items() if k not in ("times", "profile")}
            lines += [f"{key}: {plain}", *times_of(value)]
        else:
            lines.append(f"{key}: {value}")
    for place, each in result.get("clips", {}).get("profile", {}).get("finish", {}).items():
        lines.append(f"{each['ms']:9.2f} ms {each['gb_per_s']:7.0f} GB/s  {place}")
    for each in result.get("clips", {}).get("profile", {}).get("kernels", [])[:20]:
        lines.append(f"{each['ms']:9.2f} ms {each['calls']:5} x {each['name'][:80]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Encoding: checked, and timed.")
    parser.add_argument("--output", type=Path, required=True, help="folder for JSON and summary")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--shape", default="1280x704x49", help="WIDTHxHEIGHTxFRAMES, or small")
    parser.add_argument("--kind", choices=["wan22", "wan21"], default="wan22")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=10, help="real windows that are compared")
    parser.add_argument("--clips", type=int, default=100, help="of two windows, to be built")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shape small tries the logic")
    # float32 is to mean float32 in what the others are compared with
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        run = Run(options, Path(name))
        for part in chain(run.run(), ["end"]):
            result = run.save()
            print(f"{result['wall_s']:.0f} s: {part}", flush=True)
    print(summary(result))
    return 0 if all(run.checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
