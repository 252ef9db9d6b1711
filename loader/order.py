"""Which sample next: a pure function of (manifest, seed, global batch size, batch number);
torch-free.

The unit is the global batch: all the samples that one optimizer step sees, over all ranks and
accumulation steps. `Order.batch(n)` says which they are, for any n, without having walked there:
an epoch has the same number of batches every time, so that the epoch is a division, and within
one epoch the whole sequence is one shuffle (shuffle.py). That makes resume arithmetic, and the
sequence independent of the number of ranks and threads: these only decide who fetches which slice
(batching.py).

With several datasets every 1000 batches hold each one's share exactly, shuffled, so the dataset
of batch n and the number of its batches before n follow from (seed, n) alone, and each dataset
counts its own epochs.

Left out: shuffling across datasets, and samples of differing weight.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from threading import Lock
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from loader.manifest import ShardInfo
from loader.shape import Bucket
from loader.shuffle import EpochOrder, Ints, epoch_order, hash64, permutation

Places = AbstractSet[tuple[int, int]]  # samples, as (shard, position)
MIX_BLOCK = 1000  # batches in which every dataset has its exact share
ORDER_VERSION = 1  # part of the plan hash: another algorithm is another sequence


class OrderError(ValueError):
    """No sequence can be made of these datasets, or a state belongs to another one; says which
    and how to fix it.
    """


class GlobalBatch(NamedTuple):
    """Global batch `number`: samples g = 0..G-1 are (shard_G[g], position_G[g]) of `dataset`, all
    in one bucket.

    `shard_G` indexes the manifest's list of the split, `position_G` the samples of that shard in
    tar order. `epoch` is the dataset's own.
    """

    number: int
    dataset: int
    epoch: int
    bucket: Bucket
    shard_G: Ints
    position_G: Ints


class Place(NamedTuple):
    """Where a sample lies: `shard` in the manifest's list of the split, `position` in tar order."""

    key: str
    shard: int
    position: int


def once(keys: Sequence[Sequence[str]], excluded: Places = frozenset()) -> list[Place]:
    """A split walked once: every sample in the order of the keys, nothing shuffled, nothing left
    out but what is `excluded`. `keys` are those of each shard, in tar order.
    """
    places = (
        Place(key, shard, position)
        for shard, keys_of_shard in enumerate(keys)
        for position, key in enumerate(keys_of_shard)
    )
    return sorted(place for place in places if (place.shard, place.position) not in excluded)


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """63-bit seed of a sample in an epoch; timestep, noise and LoRA dropout follow from it."""
    return hash64(seed, epoch, key) >> 1


def keyed_uniform(seed: int, epoch: int, key: str, purpose: str) -> float:
    """Uniform in [0, 1) from (seed, epoch, key): one independent draw per `purpose`, the same on
    every rank.
    """
    top_53_bits = hash64(seed, epoch, key, purpose) >> 11  # as many as a float64 holds
    return top_53_bits * 2.0**-53


def is_i2v(seed: int, epoch: int, key: str, num_frames: int, share: float) -> bool:
    """Whether a sample trains image-to-video in this epoch. An image never does: it has no frame
    to predict.
    """
    return num_frames > 1 and keyed_uniform(seed, epoch, key, "i2v") < share


def mix_quotas(weights: Sequence[float]) -> list[int]:
    """How many of every 1000 batches each dataset gets: weights scaled, rounded by largest
    remainder.
    """
    if not weights or min(weights) <= 0:
        raise OrderError(
            f"dataset weights must all be positive, not {list(weights)}; leave a dataset out "
            f"instead"
        )
    exact = [MIX_BLOCK * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: MIX_BLOCK - sum(quotas)]:
        quotas[i] += 1
    if min(quotas) == 0:
        raise OrderError(
            f"dataset weights {list(weights)} (default: the batches of each): number "
            f"{quotas.index(0) + 1} is under 1/{MIX_BLOCK} of the sum and would never be read; "
            f"raise it, or leave that dataset out"
        )
    return quotas


def mix(n: int, quotas: Sequence[int], seed: int) -> tuple[int, int]:
    """(dataset of global batch n, how many batches before n were of that dataset), from (seed, n)
    alone.
    """
    block, i = divmod(n, MIX_BLOCK)
    dataset_of_block = np.repeat(np.arange(len(quotas)), quotas)
    dataset_of_block = dataset_of_block[permutation(MIX_BLOCK, hash64(seed, "mix", block))]
    dataset = int(dataset_of_block[i])
    before_in_block = int((dataset_of_block[:i] == dataset).sum())
    return dataset, block * quotas[dataset] + before_in_block


class BucketCount(NamedTuple):
    """What an epoch holds of a bucket. `num_left_out` are the samples that fill no batch: other
    ones each epoch, unless there is no batch at all, so that none is ever trained.
    """

    bucket: Bucket
    num_samples: int
    num_batches: int
    num_left_out: int


def count_buckets(
    shards: Sequence[ShardInfo], global_batch: int, excluded: Places = frozenset()
) -> list[BucketCount]:
    """Per bucket, in their order, what an epoch of these shards holds."""
    sizes: dict[Bucket, int] = {}
    for shard in shards:
        bucket = Bucket.parse(shard.bucket)
        sizes[bucket] = sizes.get(bucket, 0) + shard.num_samples
    for shard_number, _ in excluded:
        sizes[Bucket.parse(shards[shard_number].bucket)] -= 1
    return [
        BucketCount(bucket, size, size // global_batch, size % global_batch)
        for bucket, size in sorted(sizes.items())
    ]


def describe_counts(counts: Sequence[BucketCount], global_batch: int) -> str:
    """What an epoch holds, what it leaves out, and what is never trained, as one sentence."""
    num_batches = sum(count.num_batches for count in counts)
    text = f"{num_batches} batches of {global_batch} an epoch"
    tails = [
        f"{count.num_left_out} of {count.bucket}"
        for count in counts
        if count.num_batches and count.num_left_out
    ]
    text += f"; samples left out each epoch, others each time: {', '.join(tails) or 'none'}"
    never = [f"{count.num_samples} of {count.bucket}" for count in counts if not count.num_batches]
    if never:
        text += (
            f"; never trained, because a bucket holds fewer samples than a global batch of "
            f"{global_batch}: {', '.join(never)}"
        )
    return text


class _DatasetShards:
    """The shards of one dataset as arrays over S: samples that take part and bucket ids; and
    where exclusions make gaps, the positions of those samples, all shards in a row.
    """

    def __init__(self, shards: Sequence[ShardInfo], excluded: Places, global_batch: int):
        self.counts = count_buckets(shards, global_batch, excluded)
        self.buckets = [count.bucket for count in self.counts]
        bucket_ids = {str(bucket): i for i, bucket in enumerate(self.buckets)}
        self.bucket_S = np.array([bucket_ids[shard.bucket] for shard in shards], np.int64)
        self.size_S = np.array([shard.num_samples for shard in shards], np.int64)
        self._position_I: Ints | None = None
        if excluded:
            is_included = [np.ones(shard.num_samples, bool) for shard in shards]
            for shard_number, position in excluded:
                is_included[shard_number][position] = False
            positions = [np.flatnonzero(included) for included in is_included]
            self.size_S = np.array([len(each) for each in positions], np.int64)
            self._position_I = np.concatenate(positions)

    def epoch(self, key: int, global_batch: int, window_shards: int) -> EpochOrder:
        order = epoch_order(self.size_S, self.bucket_S, key, global_batch, window_shards)
        if self._position_I is None:
            return order
        # the order counts the samples that take part; these are their places in the tar
        first_S = np.cumsum(self.size_S) - self.size_S
        position_NG = self._position_I[first_S[order.shard_NG] + order.position_NG]
        return order._replace(position_NG=position_NG)


class Order:
    """The sequence of global batches over one or several datasets (the shard lists of one split
    each).

    Args: `weights` is each dataset's share of the batches, in any unit (default: by their numbers
    of batches); `window_shards` bounds the shards in use at a time per bucket (twice that while a
    batch straddles two windows); `excluded` are samples of each dataset that take no part. Raises
    OrderError when a dataset has no bucket with a whole global batch, or not one weight.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[ShardInfo]],
        *,
        seed: int,
        global_batch: int,
        weights: Sequence[float] | None = None,
        window_shards: int = 32,
        excluded: Sequence[Places] | None = None,
    ):
        self.seed, self.global_batch, self.window_shards = seed, global_batch, window_shards
        excluded = excluded or [frozenset()] * len(datasets)
        self._datasets = [
            _DatasetShards(shards, places, global_batch)
            for shards, places in zip(datasets, excluded, strict=True)
        ]
        for number, dataset in enumerate(self._datasets):
            if not any(count.num_batches for count in dataset.counts):
                held = [f"{count.bucket}: {count.num_samples}" for count in dataset.counts]
                raise OrderError(
                    f"dataset {number} has no bucket with a whole global batch of {global_batch} "
                    f"samples ({', '.join(held) or 'none at all'}); take a smaller global batch or "
                    f"build more samples"
                )
        if weights and len(weights) != len(datasets):
            raise OrderError(
                f"{len(weights)} dataset weights for {len(datasets)} datasets; give one for each, "
                f"or none"
            )
        self.quotas = mix_quotas(weights or self.batches_per_epoch)
        self._identity = self._describe(datasets, excluded)
        self._epochs: dict[tuple[int, int], EpochOrder] = {}
        self._lock = Lock()

    @property
    def counts(self) -> list[list[BucketCount]]:
        """Per dataset and bucket, what an epoch holds."""
        return [dataset.counts for dataset in self._datasets]

    @property
    def batches_per_epoch(self) -> list[int]:
        """Per dataset, the global batches of one epoch."""
        return [sum(count.num_batches for count in counts) for counts in self.counts]

    def batch(self, n: int) -> GlobalBatch:
        """Global batch n, counted from 0 over all datasets and epochs. Safe to call from several
        threads.
        """
        dataset, count = mix(n, self.quotas, self.seed) if len(self.quotas) > 1 else (0, n)
        epoch, i = divmod(count, self.batches_per_epoch[dataset])
        order = self._epoch(dataset, epoch)
        bucket = self._datasets[dataset].buckets[order.bucket_N[i]]
        return GlobalBatch(n, dataset, epoch, bucket, order.shard_NG[i], order.position_NG[i])

    def _epoch(self, dataset: int, epoch: int) -> EpochOrder:
        with self._lock:
            if (dataset, epoch) not in self._epochs:
                # at the turn of an epoch two are in use
                for old in [(d, e) for d, e in self._epochs if d == dataset and abs(e - epoch) > 1]:
                    del self._epochs[old]
                self._epochs[dataset, epoch] = self._datasets[dataset].epoch(
                    hash64(self.seed, dataset, epoch), self.global_batch, self.window_shards
                )
            return self._epochs[dataset, epoch]

    def _describe(
        self, datasets: Sequence[Sequence[ShardInfo]], excluded: Sequence[Places]
    ) -> dict[str, Any]:
        """All that the sequence depends on, and its hash."""
        identity: dict[str, Any] = {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window_shards": self.window_shards,
            "mix": self.quotas,
            "datasets": [
                {
                    "num_shards": len(shards),
                    "num_samples": sum(shard.num_samples for shard in shards),
                    "content": xxhash.xxh3_128_hexdigest(msgspec.json.encode(shards)),
                    **_describe_excluded(places),
                }
                for shards, places in zip(datasets, excluded, strict=True)
            ],
        }
        return identity | {"plan_hash": xxhash.xxh3_128_hexdigest(msgspec.json.encode(identity))}

    def state(self, batches: int) -> dict[str, Any]:
        """What to save once `batches` global batches are consumed: that number, and what the
        sequence depends on.
        """
        return {"batches": batches, **self._identity}

    def resume(self, state: Mapping[str, Any]) -> int:
        """The number of consumed batches in `state`. Raises OrderError, naming what changed, if
        it isn't of this order.

        The world size may change freely: it is no part of the sequence.
        """
        if state.get("plan_hash") != self._identity["plan_hash"]:
            changed = [
                f"{name}: {state.get(name)} in the state, {value} now"
                for name, value in self._identity.items()
                if name != "plan_hash" and state.get(name) != value
            ]
            raise OrderError(
                f"this state continues another sequence of samples ({'; '.join(changed)}); restore "
                f"these, or start a new run from the saved LoRA"
            )
        return int(state["batches"])


def _describe_excluded(places: Places) -> dict[str, Any]:
    """Nothing without exclusions, so that such a state is what it always was."""
    if not places:
        return {}
    content = xxhash.xxh3_128_hexdigest(msgspec.json.encode(sorted(places)))
    return {"num_excluded": len(places), "excluded": content}
