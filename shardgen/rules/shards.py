"""Which windows share a shard. Pure functions."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import msgspec

from loader.manifest import shard_name
from loader.shape import Bucket
from shardgen.rules.windows import Window


class ShardPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of one shard, decided before anything is encoded. Keys ascend."""

    name: str
    split: str
    bucket: str
    windows: list[Window]


def window_order(window: Window) -> tuple[str, str, str, str]:
    """Where a window comes when shards are cut: by split, bucket, its medium's hash, key."""
    return window.split, window.bucket, window.media_xxh3, window.key


def assign_shards(
    ordered: Iterable[Window], samples_per_shard: int, next_numbers: dict[tuple[str, str], int]
) -> Iterator[ShardPlan]:
    """Cut windows, which must come in `window_order`, into shards: numbers from `next_numbers`
    (default 0) on.

    Clips are taken in the order of their media's hashes, so a shard holds a random draw of them
    and all windows of a clip lie together (it is decoded once). Holds one shard at a time.
    """
    for (split, bucket), group in groupby(
        ordered, key=lambda window: (window.split, window.bucket)
    ):
        number = next_numbers.get((split, bucket), 0)
        while chosen := list(islice(group, samples_per_shard)):
            yield ShardPlan(
                name=shard_name(split, Bucket.parse(bucket), number),
                split=split,
                bucket=bucket,
                windows=sorted(chosen, key=lambda window: window.key),
            )
            number += 1
