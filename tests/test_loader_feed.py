"""The feed hands out each global batch once, in order, whatever the world size, the threads and
the interruptions.
"""

import json
import logging
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import fork_server

from loader.batch import Batch
from loader.feed import Feed
from loader.order import OrderError
from loader.read import TooManyDamagedError
from loader.shape import WAN22
from tools.fake.batch import write_synthetic_dataset
from tools.fake.feed import make_feed

G = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_synthetic_dataset(
        folder, {"64x32x5": 70, "32x64x5": 30, "64x32x1": 30}, samples_per_shard=8, text_dim=8
    )
    return folder


def make(*datasets: Path, **changes: Any) -> Feed:
    settings: dict[str, Any] = {"global_batch": G, "seed": 3, "num_threads": 2}
    return make_feed(*datasets, **(settings | changes))


def take(feed: Feed, num: int) -> list[tuple[Batch, dict[str, Any]]]:
    return [next(feed) for _ in range(num)]


def global_keys(
    dataset: Path, world_size: int, micro_batch: int, num: int, state: dict[str, Any] | None = None
) -> list[str]:
    """Keys of `num` global batches, in their order, as all ranks together see them."""
    ranks = []
    for rank in range(world_size):
        with make(dataset, rank=rank, world_size=world_size, micro_batch=micro_batch) as feed:
            if state:
                feed.load_state_dict(state)
            ranks.append(
                [batch.keys for batch, _ in take(feed, num * G // (world_size * micro_batch))]
            )
    return [key for micro_step in zip(*ranks, strict=True) for keys in micro_step for key in keys]


def test_every_world_size_sees_the_same_sequence(dataset: Path) -> None:
    expected = global_keys(dataset, 1, 24, 7)
    for world_size, micro_batch in ((1, 3), (2, 1), (3, 2), (4, 6), (8, 1)):
        assert global_keys(dataset, world_size, micro_batch, 7) == expected


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_by_tokens_hold_the_same_global_batches(
    dataset: Path, world_size: int
) -> None:
    """Tokens of a sample: 64x32x5 and 32x64x5 have 4, 64x32x1 has 2."""
    whole = global_keys(dataset, 1, G, 6)
    parts: dict[int, list[str]] = {}
    for rank in range(world_size):
        settings = {"rank": rank, "world_size": world_size, "micro_tokens": 13}
        with make(dataset, **settings) as feed:
            tokens_to_size = {4: 3, 2: 6}  # 3 x 4 and 6 x 2 tokens fit, and divide 24 and 12
            assert {min(sizes) for sizes in feed.micro_batches.values()} == {3, 6}
            seen, state = 0, feed.state_dict()
            while seen < 6:
                batch, state = next(feed)
                size = tokens_to_size[WAN22.num_tokens(batch.bucket)]
                assert len(batch.keys) == size
                assert batch.num_micro == G // world_size // size
                parts.setdefault(batch.index, []).extend(batch.keys)
                seen += batch.micro_step + 1 == batch.num_micro
            assert feed.state_dict()["batches"] == 6 == state["batches"]
    for index, keys in parts.items():
        assert sorted(keys) == sorted(whole[index * G : (index + 1) * G])


def test_an_epoch_holds_each_sample_once(dataset: Path) -> None:
    with make(dataset, micro_batch=G) as feed:
        per_epoch = feed.num_batches_per_epoch
        for epoch in range(2):
            batches = [batch for batch, _ in take(feed, per_epoch)]
            keys = [key for batch in batches for key in batch.keys]
            assert len(keys) == len(set(keys)) == 4 * G
            assert {batch.epoch for batch in batches} == {epoch}


def test_shares_are_kept_and_images_are_never_i2v(dataset: Path) -> None:
    with make(dataset, micro_batch=G, i2v_share=0.5, caption_dropout=0.25) as feed:
        batches = [batch for batch, _ in take(feed, 40)]
    videos = [i2v for batch in batches if batch.bucket.num_frames > 1 for i2v in batch.is_i2v]
    assert sum(videos) / len(videos) == pytest.approx(0.5, abs=0.07)
    assert not any(i2v for batch in batches if batch.bucket.num_frames == 1 for i2v in batch.is_i2v)
    dropped = [drop for batch in batches for drop in batch.caption_dropped]
    assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.06)


def test_resume_in_the_middle_of_an_epoch_and_of_the_next(dataset: Path) -> None:
    with make(dataset, micro_batch=12) as feed:
        whole = [(batch.keys, state) for batch, state in take(feed, 20)]
    for done in (1, 3, 5, 8):
        _, state = whole[2 * done - 1]
        with make(dataset, micro_batch=12) as feed:
            feed.load_state_dict(json.loads(json.dumps(state)))  # a handful of numbers and strings
            assert [batch.keys for batch, _ in take(feed, 20 - 2 * done)] == [
                keys for keys, _ in whole[2 * done :]
            ]


def test_what_was_prefetched_or_half_consumed_does_not_count(dataset: Path) -> None:
    with make(dataset, micro_batch=12, max_ahead=8) as feed:
        assert feed.state_dict()["batches"] == 0
        take(feed, 5)  # two global batches and a half
        assert feed.state_dict()["batches"] == 2
        expected = [batch.keys for batch, _ in take(feed, 3)][1:]
        feed.load_state_dict(feed.state_dict() | {"batches": 3})
        assert [batch.keys for batch, _ in take(feed, 2)] == expected


def test_a_state_of_other_data_is_refused(dataset: Path, tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, {"64x32x5": 48}, samples_per_shard=8, text_dim=8)
    with make(dataset) as feed:
        state = feed.state_dict()
    with (
        make(tmp_path) as feed,
        pytest.raises(OrderError, match=r"datasets.*'num_samples': 130.*'num_samples': 48"),
    ):
        feed.load_state_dict(state)
    with (
        make(dataset, seed=4) as feed,
        pytest.raises(OrderError, match="seed: 3 in the state, 4 now"),
    ):
        feed.load_state_dict(state)


def test_sizes_that_do_not_divide_are_refused(dataset: Path) -> None:
    with pytest.raises(ValueError, match="24 is not a multiple of micro-batch 5 x world size 1"):
        make(dataset, micro_batch=5)


def kill_and_resume(dataset: Path, folder: Path, rounds: int, seed: int) -> None:
    """Consumers are killed at random and resumed with another world size; the keys they saw must
    be the sequence.
    """
    choose, state_file, keys_file, seen = (
        random.Random(seed),
        folder / "state.json",
        folder / "keys.txt",
        [],
    )
    for _ in range(rounds):
        keys_file.write_text("")
        process = fork_server().Process(
            target=consume, args=(dataset, folder, choose.choice([1, 2, 3, 4, 8])), daemon=True
        )
        process.start()
        num_lines, deadline_s = choose.randrange(1, 30), time.monotonic() + 300
        while (
            keys_file.read_text().count("\n") < num_lines
            and process.is_alive()
            and time.monotonic() < deadline_s
        ):
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        saved = json.loads(state_file.read_text())["batches"] if state_file.exists() else 0
        lines = keys_file.read_text().split("\n")[:-1]  # the last one may have been cut off
        seen += [line.split() for line in lines if int(line.split()[0]) < saved]
    assert len(seen) >= rounds and [int(number) for number, *_ in seen] == list(range(len(seen)))
    assert [key for _, *keys in seen for key in keys] == global_keys(dataset, 1, G, len(seen))


def consume(dataset: Path, folder: Path, world_size: int) -> None:
    """What a killed run does: all ranks in one process; log the keys of a batch, then save the
    state by rename.
    """
    state_file = folder / "state.json"
    feeds = [
        make(dataset, rank=rank, world_size=world_size, micro_batch=G // world_size)
        for rank in range(world_size)
    ]
    for feed in feeds:
        if state_file.exists():
            feed.load_state_dict(json.loads(state_file.read_text()))
    with open(folder / "keys.txt", "a", buffering=1) as log:
        while True:
            parts = [next(feed) for feed in feeds]
            log.write(
                " ".join(
                    [str(parts[0][0].index), *(key for batch, _ in parts for key in batch.keys)]
                )
                + "\n"
            )
            (folder / "state.tmp").write_text(json.dumps(parts[0][1]))
            os.replace(folder / "state.tmp", state_file)


def test_killed_and_resumed_at_other_world_sizes_nothing_is_lost_or_repeated(
    dataset: Path, tmp_path: Path
) -> None:
    kill_and_resume(dataset, tmp_path, rounds=3, seed=1)


@pytest.mark.soak
def test_two_hundred_kills(dataset: Path, tmp_path: Path) -> None:
    kill_and_resume(dataset, tmp_path, rounds=200, seed=2)


def test_damaged_samples_are_replaced_alike_in_every_world_and_reported(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    tar = min((copy / "train").glob("train-64x32x5-*.tar"))
    data = bytearray(tar.read_bytes())
    data[600] ^= 4  # in the first json
    tar.write_bytes(data)
    runs = []
    for world_size, threads in ((1, 1), (2, 3), (8, 2)):
        keys: list[list[str]] = []
        damages = []
        for rank in range(world_size):
            with make(copy, rank=rank, world_size=world_size, num_threads=threads) as feed:
                keys.append(
                    [key for batch, _ in take(feed, 4 * G // world_size) for key in batch.keys]
                )
                damages += feed.damages
        runs.append([key for step in zip(*keys, strict=True) for key in step])
        assert (
            len(damages) == 1
            and damages[0].shard == tar.stem
            and damages[0].member.endswith(".json")
        )
    assert runs[0] == runs[1] == runs[2]
    assert tar.stem in caplog.text and damages[0].key in caplog.text


def test_a_threads_exception_reaches_the_consumer_with_shard_and_key(
    dataset: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    for tar in (copy / "train").glob("train-64x32x5-*.tar"):
        os.truncate(tar, 700)
    with (
        make(copy, max_damaged=2) as feed,
        pytest.raises(
            TooManyDamagedError, match=r"shard train-64x32x5-\d+, key [0-9a-f]{32}, member.*short"
        ),
    ):
        take(feed, 200)


def test_no_thread_outlives_the_feed(dataset: Path) -> None:
    # one of another test may end meanwhile
    before = set(threading.enumerate())
    feed = make(dataset, num_threads=4, max_ahead=16)
    take(feed, 3)
    assert set(threading.enumerate()) - before
    feed.close()
    assert not set(threading.enumerate()) - before


def test_no_more_than_max_ahead_micro_batches_are_read(dataset: Path) -> None:
    with make(dataset, max_ahead=3, num_threads=4) as feed:
        take(feed, 2)
        assert len(feed._pending) == 3


def test_the_dropped_tail_is_logged(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loader.feed"), make(dataset):
        assert "4 batches of 24 an epoch" in caplog.text
        assert "6 of 32x64x5, 6 of 64x32x1, 22 of 64x32x5" in caplog.text


def test_several_datasets_are_mixed_and_never_within_a_batch(dataset: Path, tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, {"64x32x5": 48}, samples_per_shard=8, text_dim=8, seed=1)
    with make(dataset, tmp_path, micro_batch=G, weights=[1, 3]) as feed:
        batches = [batch for batch, _ in take(feed, 40)]
    own = [{key for batch in batches if batch.dataset == d for key in batch.keys} for d in (0, 1)]
    assert not own[0] & own[1] and len(own[1]) == 48
    assert 20 <= sum(batch.dataset for batch in batches) <= 38
    assert max(batch.epoch for batch in batches if batch.dataset == 1) > max(
        batch.epoch for batch in batches if batch.dataset == 0
    )
