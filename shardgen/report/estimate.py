"""`shardgen build --dry-run`: what a build would come to, from the labels alone and from what was
measured before.

Counts follow from the labels that pass their rules (the media may still fail). Bytes are those of
the tensors before compression, which is an upper bound close to what is written. Hours need a
rate: it is taken from the last build in this output folder, and without one the honest answer is
"not measured".
"""

from collections import Counter
from collections.abc import Mapping
from math import prod

from loader.shape import Bucket, LatentLayout
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.rates import recall_rate
from shardgen.catalog.tables import ACCEPTED, FETCHED, REJECTED, SKIPPED, SOUND, UNREADABLE, WANTED
from shardgen.rules.config import RulesConfig
from shardgen.rules.shots import PlanError
from shardgen.rules.windows import nearest_aspect, video_stretches

TEXT_ROWS, TEXT_DIM = 128, 4096  # a prompt of some 60 Korean words; UMT5-XXL
_GOOD = (WANTED, FETCHED, SOUND, ACCEPTED)


def expected_samples(catalog: Catalog, rules: RulesConfig) -> Counter[Bucket]:
    """Windows that the labels promise, per bucket: their declared size and length stand in for
    the probed ones.
    """
    counts: Counter[Bucket] = Counter()
    recipe = rules.windows
    for clip in catalog.clips(*_GOOD):
        fitting = nearest_aspect(
            clip.declared_width_px or 16,
            clip.declared_height_px or 9,
            recipe.buckets_for(clip.media_type),
        )
        if not fitting:  # with score_only the label's rule lets it pass
            continue
        if clip.media_type == "image":
            counts[fitting[0]] += 1
            continue
        label = catalog.labels.read(clip.id)
        try:
            stretches, _ = video_stretches(
                label,
                label.duration_s or 0.0,
                fitting,
                recipe.fps,
                recipe.per_shot,
                whole_clip=rules.filters.wrong_timecodes == "whole_clip",
            )
        except PlanError:
            continue
        for stretch in stretches:
            counts[stretch.bucket] += len(stretch.starts_ms)
    return counts


def estimate(
    catalog: Catalog, rules: RulesConfig, layout: LatentLayout, has_condition: bool = False
) -> str:
    """The answer as text. `layout` is the latents'; has_condition: a sample has two of them."""
    samples = expected_samples(catalog, rules)
    total = samples.total()
    num_bytes = sum(
        count * bytes_per_sample(bucket, layout, has_condition) for bucket, count in samples.items()
    )
    rate_s = recall_rate(catalog.database)
    if rate_s is None:
        hours = "not measured: build a part of it first (--limit 200), then ask again"
    else:
        hours = (
            f"{total * rate_s / 3600:.2f} h at {rate_s:.3f} s a sample, as the last build here had"
        )
    labels = {
        "to encode": catalog.count(*_GOOD),
        "rejected": catalog.count(REJECTED),
        "unreadable": catalog.count(UNREADABLE),
        "not selected": catalog.count(SKIPPED),
    }
    shapes = {str(bucket): count for bucket, count in sorted(samples.items())}
    size = f"{num_bytes / 1e9:.2f} GB before compression, {TEXT_ROWS} text rows assumed"
    return "\n".join(
        [
            f"label files: {catalog.count()} ({_listed(labels)})",
            f"samples:     {total} at most ({_listed(shapes)})",
            f"bytes:       {size}",
            f"time:        {hours}",
        ]
    )


def bytes_per_sample(bucket: Bucket, layout: LatentLayout, has_condition: bool = False) -> int:
    """Latent, condition and text as float16, and of video a first frame at a quarter of a byte per
    pixel.
    """
    num_values = (1 + has_condition) * prod(layout.latent_shape(bucket))
    picture = bucket.width_px * bucket.height_px // 4 if bucket.num_frames > 1 else 0
    return 2 * num_values + 2 * TEXT_ROWS * TEXT_DIM + picture


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
