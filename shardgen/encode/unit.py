"""The unit of work as values: what goes to a worker and what comes back. Torch-free, because the
program that plans and records doesn't need the models; the worker imports them when it starts on
its first unit.
"""

import msgspec

from loader.manifest import ShardInfo
from shardgen.media.geometry import Fitting
from shardgen.media.pictures import Mp4Encoder
from shardgen.rules.shards import ShardPlan


class EncodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What all shards of a run share. `output` is the dataset folder; the rest decides the
    bytes.
    """

    output: str
    model: str
    device: str
    dtype: str
    threads: int
    text_batch: int
    vae_batch: int
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


class Lost(msgspec.Struct, frozen=True):
    """A planned window that its medium could not give."""

    key: str
    reason: str
    detail: str


class ShardResult(msgspec.Struct, frozen=True):
    """What became of a unit. `info` is None if no window was left; `notes` are (key, remark) for
    the catalog.
    """

    name: str
    info: ShardInfo | None
    lost: list[Lost]
    notes: list[tuple[str, str]]


def encode_unit(
    job: ShardJob | None, spec: EncodeSpec, decode_threads: int = 2
) -> ShardResult | None:
    """What an executor runs: a shard, or, for None, the empty prompt."""
    import torch

    from shardgen.encode.shard import EncodeError, encode_empty_prompt, encode_shard

    try:
        if job is not None:
            return encode_shard(job, spec, decode_threads)
        encode_empty_prompt(spec)
        return None
    except torch.OutOfMemoryError as error:
        raise EncodeError(
            f"the GPU's memory is full ({error}); lower encode.vae_batch or encode.text_batch"
        ) from error
