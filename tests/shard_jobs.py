"""Shards to be encoded, as values: what tests of shardgen/encode share."""

from pathlib import Path

import msgspec

from loader.sample import sample_key
from loader.shape import Bucket
from shardgen.encode.unit import EncodeSpec, ShardJob
from shardgen.rules.shards import ShardPlan
from shardgen.rules.windows import Window

BUCKET = Bucket(96, 64, 5)


def spec_for(tiny_checkpoint: Path, output: Path, **changes: object) -> EncodeSpec:
    spec = EncodeSpec(
        output=str(output),
        model=str(tiny_checkpoint),
        condition="",
        device="cpu",
        dtype="float32",
        threads=1,
        text_batch=2,
        vae_batch=2,
        vae_memory_gib=16.0,
        fit="letterbox",
        zstd_level=3,
        jpg_quality=95,
        jpg_for_images=False,
        mp4=False,
        mp4_encoder="libx264",
    )
    return msgspec.structs.replace(spec, **changes)


def window(
    media_xxh3: str, clip_id: str, start_ms: int, bucket: Bucket = BUCKET, media_type: str = "video"
) -> Window:
    return Window(
        key=sample_key(media_xxh3, clip_id, 0, start_ms, bucket, 24.0),
        label=f"video/{clip_id}.json",
        clip_id=clip_id,
        media_type=media_type,
        category="생활",
        programme="p",
        split="train",
        shot=0,
        start_ms=start_ms,
        fps=24.0,
        prompt=f"시장 {clip_id[0]}",
        bucket=str(bucket),
        media_xxh3=media_xxh3,
    )


def job_for(windows: list[Window], media: dict[str, str], number: int = 0) -> ShardJob:
    windows = sorted(windows, key=lambda item: item.key)
    bucket = windows[0].bucket
    plan = ShardPlan(
        name=f"train-{bucket}-{number:06d}", split="train", bucket=bucket, windows=windows
    )
    return ShardJob(plan, media)
