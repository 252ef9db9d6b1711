"""The sequence of samples: every sample once an epoch, whatever the world size, and resumed at
any step.
"""

import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from loader.manifest import ShardInfo
from loader.order import (
    MIX_BLOCK,
    Order,
    OrderError,
    count_buckets,
    is_i2v,
    keyed_uniform,
    once,
    sample_seed,
)
from loader.shuffle import permutation

G = 24


def shards(sizes: dict[str, list[int]], tag: str = "") -> list[ShardInfo]:
    return [
        ShardInfo(f"train-{bucket}-{i:06d}", bucket, size, 512, tag, "", "")
        for bucket, bucket_sizes in sizes.items()
        for i, size in enumerate(bucket_sizes)
    ]


SHARDS = shards(
    {"160x96x9": [40] * 21 + [7], "160x96x1": [31, 30, 29], "96x160x9": [100], "96x160x1": [11]}
)


def sequence(order: Order, start: int, stop: int) -> list[tuple[int, int, int]]:
    return [
        (batch.dataset, int(shard), int(position))
        for batch in map(order.batch, range(start, stop))
        for shard, position in zip(batch.shard_G, batch.position_G, strict=True)
    ]


def test_every_sample_once_an_epoch_but_for_a_counted_tail_that_changes() -> None:
    order = Order([SHARDS], seed=3, global_batch=G)
    per_epoch = order.batches_per_epoch[0]
    everything = {(0, s, p) for s, shard in enumerate(SHARDS) for p in range(shard.num_samples)}
    tails = []
    for epoch in range(3):
        seen = sequence(order, epoch * per_epoch, (epoch + 1) * per_epoch)
        assert len(seen) == len(set(seen)) and set(seen) <= everything
        tails.append(everything - set(seen))
        dropped = Counter(SHARDS[s].bucket for _, s, _ in tails[-1])
        left_out = {str(count.bucket): count.num_left_out for count in order.counts[0]}
        assert dropped == left_out and all(0 < num < G for num in dropped.values())
    assert tails[0] != tails[1] != tails[2]


def test_a_global_batch_holds_one_bucket() -> None:
    order = Order([SHARDS], seed=3, global_batch=G)
    for batch in map(order.batch, range(order.batches_per_epoch[0])):
        assert {SHARDS[s].bucket for s in batch.shard_G} == {str(batch.bucket)}


def test_resumed_at_any_step_the_sequence_goes_on() -> None:
    first = Order([SHARDS], seed=3, global_batch=G)
    stop = 2 * first.batches_per_epoch[0] + 3
    whole = sequence(first, 0, stop)
    for step in range(stop):
        again = Order([SHARDS], seed=3, global_batch=G)
        assert again.resume(first.state(step)) == step
        assert sequence(again, step, min(step + 2, stop)) == whole[step * G : (step + 2) * G]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 in the state, 4 now"),
        ({"global_batch": 12}, "global_batch: 24 in the state, 12 now"),
        ({"window_shards": 2}, "window_shards"),
        ({"datasets": [SHARDS[:-1]]}, "datasets.*num_shards"),
        ({"datasets": [shards({"160x96x9": [40] * 21})]}, "datasets.*num_samples"),
        ({"datasets": [SHARDS, SHARDS]}, "mix.*datasets"),
    ],
)
def test_a_state_of_another_sequence_is_refused_and_the_difference_named(
    change: dict[str, object], named: str
) -> None:
    state = Order([SHARDS], seed=3, global_batch=G).state(7)
    arguments: dict[str, object] = {"datasets": [SHARDS], "seed": 3, "global_batch": G} | change
    datasets = arguments.pop("datasets")
    with pytest.raises(OrderError, match=named):
        Order(datasets, **arguments).resume(state)  # type: ignore[arg-type]


def test_the_same_shards_with_other_bytes_are_another_dataset() -> None:
    state = Order([shards({"160x96x9": [40]}, "a")], seed=3, global_batch=G).state(7)
    with pytest.raises(OrderError, match="content"):
        Order([shards({"160x96x9": [40]}, "b")], seed=3, global_batch=G).resume(state)


def test_only_a_bounded_number_of_shards_is_in_use() -> None:
    many = shards({"160x96x9": [10] * 200, "160x96x1": [10] * 100})
    order = Order([many], seed=1, global_batch=8, window_shards=8)
    seen = [s for _, s, _ in sequence(order, 0, order.batches_per_epoch[0])]
    last = {s: i for i, s in enumerate(seen)}
    live: set[int] = set()
    most = 0
    for i, s in enumerate(seen):
        live.add(s)
        most = max(most, len(live))
        live -= {t for t in live if last[t] <= i}
    assert 10 < most <= 16  # 8 for each of the two buckets


def test_neighbours_in_a_shard_are_parted_and_orders_differ_by_epoch_and_seed() -> None:
    many = shards({"160x96x9": [50] * 64})
    order = Order([many], seed=1, global_batch=8, window_shards=8)
    seen = sequence(order, 0, order.batches_per_epoch[0])
    place = {sample: i for i, sample in enumerate(seen)}
    gaps = [abs(place[0, s, p] - place[0, s, p + 1]) for s in range(64) for p in range(49)]
    # within a window of 8 shards of 50 the mean gap of a full shuffle is a third of it
    assert np.mean(gaps) == pytest.approx(8 * 50 / 3, rel=0.1)
    assert seen != sequence(order, order.batches_per_epoch[0], 2 * order.batches_per_epoch[0])
    assert seen != sequence(Order([many], seed=2, global_batch=8), 0, order.batches_per_epoch[0])


def test_buckets_are_interleaved() -> None:
    order = Order([SHARDS], seed=3, global_batch=G)
    buckets = [order.batch(n).bucket for n in range(order.batches_per_epoch[0])]
    changes = sum(a != b for a, b in pairwise(buckets))
    assert changes > len(order.counts[0])


def test_datasets_are_mixed_by_weight_each_with_its_own_epochs() -> None:
    datasets = [
        shards({"160x96x9": [48] * 10}),
        shards({"160x96x9": [48]}),
        shards({"96x160x9": [48] * 2}),
    ]
    order = Order(datasets, seed=5, global_batch=G, weights=[0.5, 0.3, 0.2])
    batches = [order.batch(n) for n in range(2 * MIX_BLOCK + 10)]
    for block in range(2):
        counts = Counter(
            batch.dataset for batch in batches[block * MIX_BLOCK : (block + 1) * MIX_BLOCK]
        )
        assert counts == {0: 500, 1: 300, 2: 200}
    # no batch of a dataset is skipped or repeated
    for dataset, per_epoch in enumerate(order.batches_per_epoch):
        own = [batch for batch in batches if batch.dataset == dataset]
        assert [batch.epoch for batch in own] == [i // per_epoch for i in range(len(own))]
    again = Order(datasets, seed=5, global_batch=G, weights=[50, 30, 20])
    for n in (1500, 3, 999):
        assert (again.batch(n).shard_G == batches[n].shard_G).all() and again.batch(
            n
        ).dataset == batches[n].dataset


def test_weights_that_can_not_be_kept_are_refused() -> None:
    for weights in ([1.0, 0.0], [1.0, -1.0], [1.0, 1e-5]):
        with pytest.raises(OrderError, match="weights"):
            Order([SHARDS, SHARDS], seed=5, global_batch=G, weights=weights)
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(OrderError, match=f"{len(weights)} dataset weights for 2 datasets"):
            Order([SHARDS, SHARDS], seed=5, global_batch=G, weights=weights)


def test_a_dataset_without_a_whole_batch_is_refused() -> None:
    with pytest.raises(OrderError, match="160x96x9: 23"):
        Order([shards({"160x96x9": [20, 3]})], seed=0, global_batch=G)
    with pytest.raises(OrderError, match="none at all"):
        Order([[]], seed=0, global_batch=G)


def test_seeds_and_draws_are_functions_of_seed_epoch_and_key() -> None:
    draws = np.array([keyed_uniform(1, 0, f"{i:032x}", "i2v") for i in range(4000)])
    assert 0 <= draws.min() and draws.max() < 1 and draws.mean() == pytest.approx(0.5, abs=0.02)
    others = [keyed_uniform(1, 0, f"{i:032x}", "caption") for i in range(4000)]
    assert abs(np.corrcoef(draws, others)[0, 1]) < 0.05
    seeds = {
        sample_seed(seed, epoch, key)
        for seed in range(3)
        for epoch in range(3)
        for key in ("a", "b")
    }
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)
    share = sum(is_i2v(1, 0, f"{i:032x}", 9, 0.4) for i in range(4000)) / 4000
    assert share == pytest.approx(0.4, abs=0.03)
    assert not any(is_i2v(1, 0, f"{i:032x}", 1, 1.0) for i in range(100))


def test_the_sequence_is_pinned_down() -> None:
    """A change of these numbers changes the meaning of every saved state: raise ORDER_VERSION
    with it.
    """
    assert permutation(8, 12345).tolist() == [2, 6, 0, 3, 1, 5, 7, 4]
    batch = Order([SHARDS], seed=3, global_batch=G).batch(100)
    assert (batch.epoch, str(batch.bucket)) == (2, "96x160x9")
    assert (batch.shard_G[:4].tolist(), batch.position_G[:4].tolist()) == (
        [25, 25, 25, 25],
        [66, 18, 39, 17],
    )
    assert sample_seed(1, 2, "a" * 32) == 702871570179589446


def test_a_million_samples_start_and_resume_within_a_second() -> None:
    million = shards(
        {"1280x704x49": [100] * 6000, "832x480x9": [100] * 3000, "832x480x1": [100] * 1000}
    )
    for start in (0, 70_000):
        # of this thread: other tests run beside it
        begin_s = time.thread_time()
        Order([million], seed=3, global_batch=8).batch(start)
        assert time.thread_time() - begin_s < 1


def test_order_needs_no_torch() -> None:
    code = "import sys, loader.order; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_walk_once_has_every_sample_in_key_order_the_tail_included() -> None:
    keys = [["b", "e"], ["a", "d", "f"], [], ["c"]]
    places = once(keys)
    assert [place.key for place in places] == list("abcdef")
    assert all(keys[place.shard][place.position] == place.key for place in places)
    assert [place.key for place in once(keys, {(1, 1), (0, 0)})] == list("acef")


EXCLUDED = {(0, 3), (0, 39), (21, 0), (22, 30), *((25, i) for i in range(80))}


def test_excluded_samples_are_in_no_batch_and_all_others_are() -> None:
    order = Order([SHARDS], seed=3, global_batch=G, excluded=[EXCLUDED])
    everything = {(s, p) for s, shard in enumerate(SHARDS) for p in range(shard.num_samples)}
    ever_seen = set()
    for epoch in range(6):
        start = epoch * order.batches_per_epoch[0]
        seen = [(s, p) for _, s, p in sequence(order, start, start + order.batches_per_epoch[0])]
        assert len(seen) == len(set(seen)) and not set(seen) & EXCLUDED
        ever_seen |= set(seen)
    never = {(s, p) for s, p in everything if SHARDS[s].bucket in ("96x160x1", "96x160x9")}
    assert ever_seen >= everything - EXCLUDED - never


def test_exclusions_are_part_of_the_state_and_none_leave_it_as_it_was() -> None:
    plain = Order([SHARDS], seed=3, global_batch=G).state(7)
    assert plain == Order([SHARDS], seed=3, global_batch=G, excluded=[set()]).state(7)
    assert plain["plan_hash"] == "29c590339f13a8387e2d03bf8fb636bb"
    excluding = Order([SHARDS], seed=3, global_batch=G, excluded=[EXCLUDED])
    assert excluding.resume(excluding.state(7)) == 7
    with pytest.raises(OrderError, match="num_excluded"):
        excluding.resume(plain)
    with pytest.raises(OrderError, match="excluded"):
        excluding.resume(
            Order([SHARDS], seed=3, global_batch=G, excluded=[EXCLUDED | {(0, 4)}]).state(7)
        )


def test_a_bucket_smaller_than_a_global_batch_has_no_batches() -> None:
    counts = {str(count.bucket): count[1:] for count in count_buckets(SHARDS, G)}
    assert counts == {
        "96x160x1": (11, 0, 11),
        "96x160x9": (100, 4, 4),
        "160x96x1": (90, 3, 18),
        "160x96x9": (847, 35, 7),
    }
    without = count_buckets(SHARDS, G, {(25, i) for i in range(80)})
    assert [count[1:] for count in without if str(count.bucket) == "96x160x9"] == [(20, 0, 20)]
