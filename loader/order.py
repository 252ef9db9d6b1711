"""Which sample next: a pure function of (manifest, seed, global batch size, batch number);
torch-free.

The unit is the global batch: all the samples that one optimizer step sees, over all ranks and
accumulation steps. `Order.batch(n)` says which they are, for any n, without having walked there:
an epoch has the same number of batches every time, so that the epoch is a division, and within
one epoch the whole sequence is a few sorts in numpy (a third of a second for a million samples).
That makes resume arithmetic, and the sequence independent of the number of ranks and threads:
these only decide who fetches which slice.

One epoch of one dataset, bucket by bucket:
1. shuffle the shards;
2. cut them into windows of at most `window_shards` and shuffle the samples within each window, so
   that only that many shards are in use at a time, while neighbours in a shard (same programme,
   often) end up far apart;
3. cut the samples into batches; the tail that fills no batch is left out, another one each epoch.
Then the batches of all buckets are interleaved at random.

With several datasets every 1000 batches hold each one's share exactly, shuffled, so the dataset
of batch n and the number of its batches before n follow from (seed, n) alone, and each dataset
counts its own epochs.

Shuffling sorts by splitmix64 hashes instead of calling numpy's generators: those may change
between releases, and with them the meaning of a saved state. Left out: shuffling across windows
or datasets, and samples of differing weight.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from loader.manifest import ShardInfo
from loader.shape import Bucket

Ints = np.ndarray[Any, np.dtype[Any]]
MIX_BLOCK = 1000  # batches in which every dataset has its exact share
ORDER_VERSION = 1  # part of the plan hash: another algorithm is another sequence


class OrderError(ValueError):
    """No sequence can be made of these datasets, or a state belongs to another one; says which
    and the way out.
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


def _hash64(*parts: int | str) -> int:
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """63-bit seed of a sample in an epoch; timestep, noise and LoRA dropout follow from it."""
    return _hash64(seed, epoch, key) >> 1


def keyed_uniform(seed: int, epoch: int, key: str, purpose: str) -> float:
    """Uniform in [0, 1) from (seed, epoch, key): one independent draw per `purpose`, the same on
    every rank.
    """
    return (_hash64(seed, epoch, key, purpose) >> 11) * 2.0**-53


def is_i2v(seed: int, epoch: int, key: str, num_frames: int, share: float) -> bool:
    """Whether a sample trains image-to-video in this epoch. An image never does: it has no frame
    to predict.
    """
    return num_frames > 1 and keyed_uniform(seed, epoch, key, "i2v") < share


def micro_slice(step: int, rank: int, world_size: int, micro_batch: int) -> slice:
    """Samples of a global batch that `rank` gets in its micro-step `step`; 2 ranks x 1 step == 1
    rank x 2 steps.
    """
    start = (step * world_size + rank) * micro_batch
    return slice(start, start + micro_batch)


def _splitmix64(key: int, num: int) -> Ints:
    """The first `num` outputs of splitmix64 started at `key`, uint64."""
    x = (np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(num: int, key: int) -> Ints:
    """A permutation of range(num), the same for the same 64-bit key on every platform and numpy
    version.
    """
    return np.argsort(_splitmix64(key, num), kind="stable")


class EpochOrder(NamedTuple):
    """All batches of one epoch: `bucket_N` bucket ids, `shard_NG` and `position_NG` the samples."""

    bucket_N: Ints
    shard_NG: Ints
    position_NG: Ints


def epoch_order(
    size_S: Ints, bucket_S: Ints, key: int, global_batch: int, window_shards: int
) -> EpochOrder:
    """The batches of one epoch over shards of `size_S` samples and bucket ids `bucket_S`; `key`
    is the epoch's.
    """
    bucket_ids = np.unique(bucket_S)
    shards_all, positions_all, num_batches = [], [], []
    for bucket in bucket_ids:
        shards = np.flatnonzero(bucket_S == bucket)
        shards = shards[permutation(len(shards), _hash64(key, "shards", bucket))]
        sizes = size_S[shards]
        num_samples = int(sizes.sum())
        num_windows = -(-len(shards) // window_shards)
        # even windows, none of a single shard
        window_S = np.arange(len(shards)) * num_windows // len(shards)
        sort_key = np.repeat(window_S.astype(np.uint64) << np.uint64(40), sizes)
        sort_key |= _splitmix64(_hash64(key, "samples", bucket), num_samples) >> np.uint64(24)
        kept = np.argsort(sort_key, kind="stable")[: num_samples - num_samples % global_batch]
        first_of_shard = np.cumsum(sizes) - sizes
        shards_all.append(np.repeat(shards, sizes)[kept])
        positions_all.append(kept - np.repeat(first_of_shard, sizes)[kept])
        num_batches.append(num_samples // global_batch)
    bucket_N = np.repeat(bucket_ids, num_batches)
    bucket_N = bucket_N[permutation(len(bucket_N), _hash64(key, "buckets"))]
    row_N = np.empty_like(bucket_N)  # the batches of a bucket keep their order
    row_N[np.argsort(bucket_N, kind="stable")] = np.arange(len(bucket_N))
    shape = (-1, global_batch)
    return EpochOrder(
        bucket_N,
        np.concatenate(shards_all).reshape(shape)[row_N],
        np.concatenate(positions_all).reshape(shape)[row_N],
    )


def mix_quotas(weights: Sequence[float]) -> list[int]:
    """How many of every 1000 batches each dataset gets: weights scaled, rounded by largest
    remainder.
    """
    if not weights or min(weights) <= 0:
        raise OrderError(
            f"dataset weights must all be positive, not {list(weights)}; leave a dataset out instead"
        )
    exact = [MIX_BLOCK * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))[
        : MIX_BLOCK - sum(quotas)
    ]:
        quotas[i] += 1
    if min(quotas) == 0:
        raise OrderError(
            f"dataset weights {list(weights)} (default: the batches of each): number "
            f"{quotas.index(0) + 1} is under 1/{MIX_BLOCK} of the sum and would never be read; raise it, "
            f"or leave that dataset out"
        )
    return quotas


def mix(n: int, quotas: Sequence[int], seed: int) -> tuple[int, int]:
    """(dataset of global batch n, how many batches before n were of that dataset), from (seed, n)
    alone.
    """
    block, i = divmod(n, MIX_BLOCK)
    pattern = np.repeat(np.arange(len(quotas)), quotas)[
        permutation(MIX_BLOCK, _hash64(seed, "mix", block))
    ]
    dataset = int(pattern[i])
    return dataset, block * quotas[dataset] + int((pattern[:i] == dataset).sum())


class Order:
    """The sequence of global batches over one or several datasets (the shard lists of one split
    each).

    Args: `weights` is each dataset's share of the batches, in any unit (default: by their numbers
    of batches); `window_shards` bounds the shards in use at a time per bucket (twice that while a
    batch straddles two windows). Raises OrderError when a dataset has no bucket with a whole
    global batch, or not one weight.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[ShardInfo]],
        *,
        seed: int,
        global_batch: int,
        weights: Sequence[float] | None = None,
        window_shards: int = 32,
    ):
        self.seed, self.global_batch, self.window_shards = seed, global_batch, window_shards
        self.buckets = [
            sorted({Bucket.parse(shard.bucket) for shard in shards}) for shards in datasets
        ]
        self._size_S = [
            np.array([shard.num_samples for shard in shards], np.int64) for shards in datasets
        ]
        self._bucket_S = [
            np.array([buckets.index(Bucket.parse(shard.bucket)) for shard in shards], np.int64)
            for buckets, shards in zip(self.buckets, datasets, strict=True)
        ]
        self.batches_per_epoch = []
        # samples left out each epoch, by bucket
        self.dropped_per_epoch: list[dict[Bucket, int]] = []
        for d in range(len(datasets)):
            sizes = {
                bucket: int(self._size_S[d][self._bucket_S[d] == b].sum())
                for b, bucket in enumerate(self.buckets[d])
            }
            self.batches_per_epoch.append(sum(size // global_batch for size in sizes.values()))
            self.dropped_per_epoch.append(
                {bucket: size % global_batch for bucket, size in sizes.items()}
            )
            if self.batches_per_epoch[d] == 0:
                held = (
                    ", ".join(f"{bucket}: {size}" for bucket, size in sizes.items())
                    or "none at all"
                )
                raise OrderError(
                    f"dataset {d} has no bucket with a whole global batch of {global_batch} samples "
                    f"({held}); take a smaller global batch or build more samples"
                )
        if weights and len(weights) != len(datasets):
            raise OrderError(
                f"{len(weights)} dataset weights for {len(datasets)} datasets; give one for each, or none"
            )
        self.quotas = mix_quotas(weights or self.batches_per_epoch)
        self._identity = self._describe(datasets)
        self._epochs: dict[tuple[int, int], EpochOrder] = {}
        self._lock = Lock()

    def batch(self, n: int) -> GlobalBatch:
        """Global batch n, counted from 0 over all datasets and epochs. Safe to call from several
        threads.
        """
        dataset, count = mix(n, self.quotas, self.seed) if len(self.quotas) > 1 else (0, n)
        epoch, i = divmod(count, self.batches_per_epoch[dataset])
        order = self._epoch(dataset, epoch)
        bucket = self.buckets[dataset][order.bucket_N[i]]
        return GlobalBatch(n, dataset, epoch, bucket, order.shard_NG[i], order.position_NG[i])

    def _epoch(self, dataset: int, epoch: int) -> EpochOrder:
        with self._lock:
            if (dataset, epoch) not in self._epochs:
                for old in [(d, e) for d, e in self._epochs if d == dataset and abs(e - epoch) > 1]:
                    del self._epochs[old]
                self._epochs[dataset, epoch] = epoch_order(
                    self._size_S[dataset],
                    self._bucket_S[dataset],
                    _hash64(self.seed, dataset, epoch),
                    self.global_batch,
                    self.window_shards,
                )
            return self._epochs[dataset, epoch]

    def _describe(self, datasets: Sequence[Sequence[ShardInfo]]) -> dict[str, Any]:
        identity: dict[str, Any] = {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window_shards": self.window_shards,
            "mix": self.quotas,
            "datasets": [
                {
                    "num_shards": len(shards),
                    "num_samples": int(sizes.sum()),
                    "content": xxhash.xxh3_128_hexdigest(msgspec.json.encode(shards)),
                }
                for shards, sizes in zip(datasets, self._size_S, strict=True)
            ],
        }
        return identity | {"plan_hash": xxhash.xxh3_128_hexdigest(msgspec.json.encode(identity))}

    def state(self, batches: int) -> dict[str, Any]:
        """What to save once `batches` global batches are consumed: that number, and what the
        sequence depends on.
        """
        return {"batches": batches, **self._identity}

    def resume(self, state: dict[str, Any]) -> int:
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
                f"this state continues another sequence of samples ({'; '.join(changed)}); restore these, "
                f"or start a new run from the saved LoRA"
            )
        return int(state["batches"])
