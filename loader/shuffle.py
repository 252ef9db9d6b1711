"""The shuffle of one epoch of one dataset, as a few sorts in numpy; torch-free. A million samples
take a third of a second.

Bucket by bucket:
1. shuffle the shards;
2. cut them into windows of at most `window_shards` and shuffle the samples within each window, so
   that only that many shards are in use at a time, while neighbours in a shard (same programme,
   often) end up far apart;
3. cut the samples into batches; the tail that fills no batch is left out, another one each epoch.
Then the batches of all buckets are interleaved at random.

Shuffling sorts by splitmix64 hashes instead of calling numpy's generators: those may change
between releases, and with them the meaning of a saved state. Left out: shuffling across windows.

Suffixes of names: S shards, I samples, N batches, G samples of a batch.
"""

from typing import Any, NamedTuple

import numpy as np
import xxhash

Ints = np.ndarray[Any, np.dtype[Any]]


def hash64(*parts: int | str) -> int:
    """64 bits of the parts, joined by slashes."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def _splitmix64(key: int, num: int) -> Ints:
    """The first `num` outputs of splitmix64 started at `key`, uint64.

    Sebastiano Vigna's constants (https://prng.di.unimi.it/splitmix64.c).
    """
    golden_gamma = np.uint64(0x9E3779B97F4A7C15)
    x = np.arange(1, num + 1, dtype=np.uint64) * golden_gamma + np.uint64(key)
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
    samples = [
        _bucket_samples(
            shard_S=np.flatnonzero(bucket_S == bucket),
            size_S=size_S,
            shards_key=hash64(key, "shards", bucket),
            samples_key=hash64(key, "samples", bucket),
            global_batch=global_batch,
            window_shards=window_shards,
        )
        for bucket in bucket_ids
    ]
    num_batches = [len(shard_I) // global_batch for shard_I, _ in samples]

    # interleave the buckets' batches at random; the batches of a bucket keep their order
    bucket_N = np.repeat(bucket_ids, num_batches)
    bucket_N = bucket_N[permutation(len(bucket_N), hash64(key, "buckets"))]
    row_N = np.empty_like(bucket_N)
    row_N[np.argsort(bucket_N, kind="stable")] = np.arange(len(bucket_N))

    shard_I = np.concatenate([shards for shards, _ in samples])
    position_I = np.concatenate([positions for _, positions in samples])
    return EpochOrder(
        bucket_N=bucket_N,
        shard_NG=shard_I.reshape(-1, global_batch)[row_N],
        position_NG=position_I.reshape(-1, global_batch)[row_N],
    )


def _bucket_samples(
    *,
    shard_S: Ints,
    size_S: Ints,
    shards_key: int,
    samples_key: int,
    global_batch: int,
    window_shards: int,
) -> tuple[Ints, Ints]:
    """The (shard, position) of one bucket's samples in their order, without the tail. `shard_S`
    are its shards, `size_S` the sizes of all.
    """
    shard_S = shard_S[permutation(len(shard_S), shards_key)]
    size_S = size_S[shard_S]
    num_samples = int(size_S.sum())

    # windows of nearly the same number of shards, so that none is a single one
    num_shards = len(shard_S)
    num_windows = round_up(num_shards, window_shards) // window_shards
    window_S = np.arange(num_shards) * num_windows // num_shards

    # one sort: by window in the top bits, at random within it by 40 bits of a hash
    window_I = np.repeat(window_S.astype(np.uint64), size_S)
    random_I = _splitmix64(samples_key, num_samples) >> np.uint64(24)
    order_I = np.argsort(window_I << np.uint64(40) | random_I, kind="stable")
    order_I = order_I[: num_samples - num_samples % global_batch]

    first_S = np.cumsum(size_S) - size_S  # where each shard's samples begin in the unsorted list
    s_I = np.repeat(np.arange(num_shards), size_S)[order_I]
    return shard_S[s_I], order_I - first_S[s_I]


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple
