"""The unit of work as values: what goes to a worker and what comes back. Torch-free, because the
program that plans and records doesn't need the models.
"""

from pathlib import Path

import msgspec

from loader.manifest import ShardInfo
from loader.mp4 import Mp4Encoder
from shardgen.catalog.rows import LostWindow, WindowFlag
from shardgen.encode.config import EncodeConfig
from shardgen.media.geometry import Fitting
from shardgen.rules.shards import ShardPlan


class EncodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What all shards of a run share. `output` is the dataset folder; the rest decides the
    bytes.
    """

    output: str
    model: str
    condition: str
    device: str
    dtype: str
    threads: int
    text_batch: int
    vae_batch: int
    vae_memory_gib: float
    fit: Fitting
    zstd_level: int
    jpg_quality: int
    jpg_for_images: bool
    mp4: bool
    mp4_encoder: Mp4Encoder


class ShardJob(msgspec.Struct, frozen=True):
    """One unit of work. `media` maps the xxh3_128 of each medium to a file that held those
    bytes.
    """

    plan: ShardPlan
    media: dict[str, str]


class ShardTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker's seconds went. Encoding goes on while the worker waits or packs, so the
    parts overlap.
    """

    wall_s: float  # without the start of the models
    waiting_s: float  # for decoded frames, with nothing else to do
    vae_s: float  # of the device; on a CPU, of the worker
    text_s: float
    writing_s: float  # the shard's files


class ShardResult(msgspec.Struct, frozen=True):
    """What became of a unit. `info` is None if no window could be made."""

    name: str
    info: ShardInfo | None
    lost: list[LostWindow]
    flags: list[WindowFlag]
    times: ShardTimes


def spec_of(encode: EncodeConfig, output: Path, fit: Fitting) -> EncodeSpec:
    """What every worker is told. Whole paths: a worker of a cluster stands in another folder."""
    return EncodeSpec(
        output=str(output.resolve()),
        model=str(Path(encode.model).resolve()),
        condition=encode.condition,
        device=encode.device,
        dtype=encode.dtype,
        threads=encode.threads,
        text_batch=encode.text_batch,
        vae_batch=encode.vae_batch,
        vae_memory_gib=encode.vae_memory_gib,
        fit=fit,
        zstd_level=encode.zstd_level,
        jpg_quality=encode.jpg_quality,
        jpg_for_images=encode.jpg_for_images,
        mp4=encode.mp4,
        mp4_encoder="h264_nvenc" if encode.mp4_encoder == "h264_nvenc" else "libx264",
    )
