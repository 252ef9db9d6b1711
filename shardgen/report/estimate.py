"""`shardgen build --dry-run`: what a build would come to, from the labels alone and from what was
measured before.

Counts follow from the labels that pass their rules (the media may still fail). Bytes are those of
the tensors before compression, which is an upper bound close to what is written. Hours need a
rate: it is taken from the last build in this output folder, and without one the honest answer is
"not measured".
"""

from collections import Counter
from collections.abc import Mapping

from loader.shape import WAN22, Bucket
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.tables import ACCEPTED, FETCHED, REJECTED, SKIPPED, SOUND, UNREADABLE, WANTED
from shardgen.config import ShardgenConfig
from shardgen.rules.shards import PlanError, nearest_aspect, video_stretches

TEXT_ROWS, TEXT_DIM = 128, 4096  # a prompt of some 60 Korean words; UMT5-XXL
_RATE = "seconds_per_sample"


def remember_rate(catalog: Catalog, seconds: float, num_samples: int) -> None:
    """Keep the rate that a build has just had, all workers together."""
    if num_samples:
        catalog.remember(_RATE, f"{seconds / num_samples:.6f}")


def expected_samples(catalog: Catalog, config: ShardgenConfig) -> Counter[Bucket]:
    """Windows that the labels promise, per bucket: their declared size and length stand in for
    the probed ones.
    """
    counts: Counter[Bucket] = Counter()
    recipe, buckets = config.windows, list(map(Bucket.parse, config.windows.buckets))
    for row in catalog.clips(WANTED, FETCHED, SOUND, ACCEPTED):
        images = row["media_type"] == "image"
        fitting = nearest_aspect(
            row["declared_width_px"] or 16,
            row["declared_height_px"] or 9,
            [bucket for bucket in buckets if (bucket.num_frames == 1) == images],
        )
        if not fitting:  # with score_only the label's rule lets it pass
            continue
        if images:
            counts[fitting[0]] += 1
            continue
        label = catalog.label(row["id"])
        try:
            stretches, _ = video_stretches(
                label,
                label.duration_s or 0.0,
                fitting,
                recipe.fps,
                recipe.per_shot,
                config.filters.wrong_timecodes == "whole_clip",
            )
        except PlanError:
            continue
        for stretch in stretches:
            counts[stretch.bucket] += len(stretch.starts_ms)
    return counts


def estimate(catalog: Catalog, config: ShardgenConfig) -> str:
    """The answer as text."""
    samples = expected_samples(catalog, config)
    rate = catalog.recall(_RATE)
    num_bytes = sum(count * bytes_per_sample(bucket) for bucket, count in samples.items())
    total = samples.total()
    hours = (
        f"{total * float(rate) / 3600:.2f} h at {float(rate):.3f} s a sample, as the last build here had"
        if rate
        else "not measured: build a part of it first (--limit 200), then ask again"
    )
    stays = {
        "to encode": catalog.count(WANTED, FETCHED, SOUND, ACCEPTED),
        "rejected": catalog.count(REJECTED),
        "unreadable": catalog.count(UNREADABLE),
        "not selected": catalog.count(SKIPPED),
    }
    return "\n".join(
        [
            f"label files: {catalog.count()} ({_listed(stays)})",
            f"samples:     {total} at most ({_listed({str(b): n for b, n in sorted(samples.items())})})",
            f"bytes:       {num_bytes / 1e9:.2f} GB before compression, {TEXT_ROWS} text rows assumed",
            f"time:        {hours}",
        ]
    )


def bytes_per_sample(bucket: Bucket) -> int:
    """Latent and text as float16, and a first frame at a quarter of a byte per pixel for video."""
    channels, frames, height, width = WAN22.latent_shape(bucket)
    picture = bucket.width_px * bucket.height_px // 4 if bucket.num_frames > 1 else 0
    return 2 * channels * frames * height * width + 2 * TEXT_ROWS * TEXT_DIM + picture


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
