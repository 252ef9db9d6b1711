"""What a build does on GPUs: `python -m bench.encode --json RESULT.json` (`--device cpu --shape
small`: the logic).

Makes clips with PyAV and two models with random weights, the tiny checkpoint and one whose VAE
encoder has the size of Wan2.2's, and runs `shardgen build` with one process a GPU. Checked, or
the exit code is 1:

- every dataset passes `shardgen verify`;
- one worker and as many workers as there are GPUs write the same bytes (with one GPU: one worker,
  twice);
- each latent of the tiny checkpoint is within 1e-2 (relative L2) of that of a float32 build on
  the CPU;
- our VAE encoder is as near to diffusers' in float32 as diffusers' own is in the number format of
  the build.

Measured: samples/s of a build, start of its processes included and without it (once each process
has written a shard), and the VAE's encoding of one window against diffusers', interleaved. Shards
are small here (four samples, the users' 128), and clips are only decoded ahead within a shard, so
a long build does better.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import diffusers
import numpy as np
import torch
import xxhash

from bench.label_tree import label_bytes, make_label
from loader.config import dump_toml
from loader.manifest import decode_index, read_manifest
from loader.sample import JSON, LATENT, decode_meta, decode_tensor, split_member_name
from loader.shape import Bucket
from loader.vae.encoder import load_vae_encoder
from shardgen.config import ShardgenConfig
from shardgen.encode.config import EncodeConfig, ExecutorConfig
from shardgen.rules.config import WindowsConfig
from shardgen.stages.config import LabelsConfig
from shardgen.verify import verify_dataset
from tools.fake.checkpoint import write_tiny_checkpoint
from tools.fake.vae import LATENTS_MEAN, LATENTS_STD, WAN22, random_vae

TOLERANCE = 1e-2
TINY_BUCKETS = ("160x96x9", "160x96x1")


class Setting(NamedTuple):
    """What a run is made of. `vae_dim` is the VAE encoder's base width; Wan2.2's is 160."""

    device: str
    dtype: str
    bucket: str
    vae_dim: int
    num_clips: int
    num_workers: int


def write_corpus(root: Path, num_clips: int, seconds: float) -> None:
    """Clips of 720x480 with wide pixels, as broadcast ones are, each moving its own way; and two
    images.
    """
    root.mkdir()
    for number in range(num_clips):
        clip_id = str(2_400_100 + number)
        num_frames = int(seconds * 30)
        out = f"00:00:{(num_frames - 1) // 30:02};{(num_frames - 1) % 30:02}"
        label = make_label(clip_id, shots=(("00:00:00;00", out),), length=f"00:00:{seconds:05.2f}")
        (root / f"{clip_id}.json").write_bytes(label_bytes(label))
        with av.open(root / f"{clip_id}.mp4", "w") as container:
            stream = container.add_stream(
                "libx264", rate=30, options={"preset": "ultrafast", "crf": "23"}
            )
            stream.width, stream.height, stream.pix_fmt = 720, 480, "yuv420p"
            stream.sample_aspect_ratio = Fraction(32, 27)
            scene = waves(number)
            for t in range(num_frames):
                y, x = (number + 2) * t % 220, 3 * t % 380
                picture = np.ascontiguousarray(scene[y : y + 480, x : x + 720])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    for number in range(2):
        clip_id = str(2_500_100 + number)
        (root / f"{clip_id}.json").write_bytes(
            label_bytes(make_label(clip_id, shots=(("", ""),), media_type="image"))
        )
        av.VideoFrame.from_ndarray(waves(number), format="rgb24").to_image().save(
            root / f"{clip_id}.png"
        )


def waves(number: int) -> Any:
    """A picture larger than a frame, for the frame to move over: uint8 [700, 1100, 3]."""
    y, x = np.mgrid[0:700, 0:1100].astype(np.float32) / 40
    channels = [
        np.sin(x * (1 + number % 3) + c) + np.cos(y * (1 + number % 5) + 2 * c) for c in range(3)
    ]
    return (127.5 + 63 * np.stack(channels, -1)).astype(np.uint8)


def write_model(folder: Path, tiny: Path, vae_dim: int) -> None:
    """The tiny checkpoint with another VAE: an encoder of base width `vae_dim`, a small decoder
    that nobody runs.
    """
    folder.mkdir()
    for name in ("tokenizer", "text_encoder"):
        (folder / name).symlink_to(tiny / name)
    vae = random_vae(WAN22, vae_dim, torch.Generator().manual_seed(1))
    vae.save_pretrained(folder / "vae")


def run_build(
    output: Path,
    root: Path,
    model: Path,
    buckets: tuple[str, ...],
    setting: Setting,
    num_workers: int,
) -> dict[str, float]:
    """`shardgen build` in a process of its own. Raises SystemExit with what it said if it fails."""
    config = ShardgenConfig(
        output=str(output),
        labels=LabelsConfig(root=str(root)),
        windows=WindowsConfig(buckets=buckets, samples_per_shard=4 if len(buckets) == 1 else 2),
        encode=EncodeConfig(model=str(model), device=setting.device, dtype=setting.dtype),  # type: ignore[arg-type]
        executor=ExecutorConfig(workers=num_workers, decode_threads=4),
    )
    path = output.with_suffix(".toml")
    path.write_bytes(dump_toml(config).encode())
    begin_s = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "shardgen.cli", "build", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    wall_s = time.time() - begin_s
    if done.returncode != 0:
        raise SystemExit(
            f"shardgen build {path}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
    written_s = sorted(tar.stat().st_mtime for tar in output.glob("*/*.tar"))
    num_samples = sum(
        info.num_samples for infos in read_manifest(output).splits.values() for info in infos
    )
    result = {
        "workers": num_workers,
        "samples": num_samples,
        "shards": len(written_s),
        "wall_s": wall_s,
        "samples_per_s_with_start": num_samples / wall_s,
    }
    # each worker has written one: what follows is without their start
    if len(written_s) > num_workers:
        per_s = (len(written_s) - num_workers) / (written_s[-1] - written_s[num_workers - 1])
        result["samples_per_s"] = per_s * num_samples / len(written_s)
        result["frames_per_s"] = result["samples_per_s"] * Bucket.parse(buckets[0]).num_frames
    return result


def shard_hashes(dataset: Path) -> dict[str, str]:
    """Everything that has to be the same whoever builds it: shards, indexes, manifest, the empty
    prompt.
    """
    files = [
        dataset / "manifest.json",
        dataset / "empty_prompt.text.zst",
        *(path for split in ("train", "val") for path in (dataset / split).glob("*")),
    ]
    return {
        str(path.relative_to(dataset)): xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in files
    }


def latents_of(dataset: Path) -> dict[str, Any]:
    """Key -> float32 latent of every sample."""
    found = {}
    for index in sorted(dataset.glob("*/*.idx")):
        tar = index.with_suffix(".tar").read_bytes()
        for members in decode_index(index.read_bytes(), str(index)):
            stored = {
                split_member_name(m.name)[1]: tar[m.offset : m.offset + m.size] for m in members
            }
            meta = decode_meta(stored[JSON])
            found[meta.key] = decode_tensor(stored[LATENT], meta.latent).astype(np.float32)
    return found


def timed_s(work: Callable[[], Any], device: str) -> float:
    """Seconds until the device has done it (a host sync on either side)."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin_s = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


@torch.inference_mode()
def measure_vae(model: Path, setting: Setting, rounds: int) -> dict[str, Any]:
    """Ours against diffusers' on one window, interleaved, and how far each is from diffusers' in
    float32.
    """
    bucket, device, dtype = (
        Bucket.parse(setting.bucket),
        setting.device,
        getattr(torch, setting.dtype),
    )
    generator = torch.Generator().manual_seed(2)
    video_BCTHW = (
        torch.rand(
            (1, 3, bucket.num_frames, bucket.height_px, bucket.width_px), generator=generator
        )
        * 2
        - 1
    )
    video_BCTHW = video_BCTHW.to(device)
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (LATENTS_MEAN, LATENTS_STD)
    )

    def reference(vae: Any, video: torch.Tensor) -> torch.Tensor:
        return (vae.encode(video.to(vae.dtype)).latent_dist.mode().float() - mean) / std

    # float32 is to mean float32 in what the others are held against
    torch.backends.cudnn.allow_tf32 = False
    few_BCTHW = video_BCTHW[:, :, :5]
    exact_vae = diffusers.AutoencoderKLWan.from_pretrained(model / "vae", local_files_only=True).to(
        device
    )
    exact = reference(exact_vae, few_BCTHW)
    del exact_vae
    theirs = diffusers.AutoencoderKLWan.from_pretrained(
        model / "vae", torch_dtype=dtype, local_files_only=True
    )
    theirs = theirs.to(device)
    ours = load_vae_encoder(model, device, dtype)
    half_BCTHW = video_BCTHW.to(dtype)
    works = {
        "ours": lambda: ours.encode(half_BCTHW),
        "diffusers": lambda: theirs.encode(half_BCTHW).latent_dist.mode(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peak_gib: dict[str, float] = {}
    for number in range(rounds + 1):  # the first one warms up
        for name, work in works.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took_s = timed_s(work, device)
            if number:
                seconds[name].append(took_s)
                peak_gib[name] = (
                    torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
                )
    error = {
        "ours": float((ours.encode(few_BCTHW.to(dtype)).float() - exact).abs().max()),
        "diffusers": float((reference(theirs, few_BCTHW) - exact).abs().max()),
    }
    return {
        "window": setting.bucket,
        "dtype": setting.dtype,
        "rounds": rounds,
        "largest_error": error,
        "deviation_of_latent": float(exact.std()),
        "peak_gib": peak_gib,
        "seconds": {
            name: {"median": statistics.median(each), "least": min(each), "most": max(each)}
            for name, each in seconds.items()
        },
        "speedup": statistics.median(
            d / o for o, d in zip(seconds["ours"], seconds["diffusers"], strict=True)
        ),
    }


def run(folder: Path, setting: Setting, rounds: int) -> dict[str, Any]:
    """Everything; the result has `checks`, name -> whether it holds."""
    frames = Bucket.parse(setting.bucket).num_frames
    write_corpus(folder / "corpus", setting.num_clips, max(3.5, frames / 24 + 0.5))
    write_tiny_checkpoint(folder / "tiny")
    write_model(folder / "wide", folder / "tiny", setting.vae_dim)
    builds: dict[str, dict[str, float]] = {}
    checks: dict[str, bool] = {}
    for model, buckets in (("tiny", TINY_BUCKETS), ("wide", (setting.bucket,))):
        for name, num_workers in ((f"{model}_one", 1), (f"{model}_all", setting.num_workers)):
            builds[name] = run_build(
                folder / name, folder / "corpus", folder / model, buckets, setting, num_workers
            )
            faults = list(verify_dataset(folder / name, 2, lambda _: None))
            checks[f"{name}_verifies"] = not faults
            print(f"{name}: {builds[name]}", *faults, sep="\n", flush=True)
        checks[f"{model}_same_bytes"] = shard_hashes(folder / f"{model}_one") == shard_hashes(
            folder / f"{model}_all"
        )
    exact = setting._replace(device="cpu", dtype="float32")
    builds["tiny_cpu"] = run_build(
        folder / "tiny_cpu", folder / "corpus", folder / "tiny", TINY_BUCKETS, exact, 1
    )
    ours, reference = latents_of(folder / "tiny_one"), latents_of(folder / "tiny_cpu")
    assert ours.keys() == reference.keys() and ours, "the two builds hold different samples"
    furthest = max(float(np.abs(ours[key] - reference[key]).max()) for key in ours)
    relative = max(
        float(np.linalg.norm(ours[key] - reference[key]) / np.linalg.norm(reference[key]))
        for key in ours
    )
    checks["latents_agree_with_cpu"] = relative <= TOLERANCE
    vae = measure_vae(folder / "wide", setting, rounds)
    error = vae["largest_error"]
    checks["vae_as_exact_as_diffusers"] = error["ours"] <= max(TOLERANCE, 1.5 * error["diffusers"])
    values = np.concatenate([each.ravel() for each in reference.values()])
    latents = {
        "largest_relative_l2": relative,
        "largest_difference": furthest,
        "samples": len(ours),
        "largest_value": float(np.abs(values).max()),
        "deviation": float(values.std()),
    }
    return {"checks": checks, "builds": builds, "latents_against_cpu_float32": latents, "vae": vae}


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds and VAE on GPUs: checked, and timed.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument(
        "--shape", default="1280x704x49", help="WIDTHxHEIGHTxFRAMES, or small: 160x96x9, narrow VAE"
    )
    parser.add_argument("--clips", type=int, help="default: 16, or 8 a GPU if that is more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shape small tries the logic")
    is_small = options.shape == "small"
    num_gpus = torch.cuda.device_count() if options.device == "cuda" else 2
    setting = Setting(
        options.device,
        options.dtype,
        "160x96x9" if is_small else options.shape,
        16 if is_small else 160,
        options.clips or max(16, 8 * num_gpus),
        num_gpus,
    )
    begin_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), setting, options.rounds)
    names = (
        [torch.cuda.get_device_name(i) for i in range(num_gpus)]
        if options.device == "cuda"
        else ["cpu"]
    )
    result |= {
        "devices": names,
        "setting": setting._asdict(),
        "wall_s": time.perf_counter() - begin_s,
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "av": av.__version__,
        },
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
