"""The feed hands out each global batch once, in order, whatever the world size, the threads and
the interruptions.
"""

import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from loader.feed import Batch, Feed
from loader.manifest import MANIFEST_FILE, DatasetError, Manifest, encode_manifest, recipe_id
from loader.order import OrderError, is_i2v, sample_seed
from loader.read import TooManyDamagedError
from loader.sample import (
    JPG,
    JSON,
    LATENT,
    TEXT,
    SampleMeta,
    TensorInfo,
    encode_meta,
    encode_tensor,
)
from loader.shape import WAN22
from loader.vae.encoder import load_vae_encoder
from shardgen.encode.write import write_shard
from tools.fake.batch import write_synthetic_dataset

G = 24
RawDataset = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_synthetic_dataset(
        folder, {"64x32x5": 70, "32x64x5": 30, "64x32x1": 30}, samples_per_shard=8, text_dim=8
    )
    return folder


def make(*datasets: Path, **changes: Any) -> Feed:
    arguments: dict[str, Any] = dict(
        split="train",
        global_batch=G,
        micro_batch=1,
        rank=0,
        world_size=1,
        seed=3,
        i2v_share=0.4,
        caption_dropout=0.1,
        condition="latent",
        device="cpu",
        num_threads=2,
        max_ahead=4,
    )
    return Feed(datasets, **(arguments | changes))


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


def test_an_epoch_holds_each_sample_once(dataset: Path) -> None:
    with make(dataset, micro_batch=G) as feed:
        per_epoch = feed.num_batches_per_epoch
        for epoch in range(2):
            batches = [batch for batch, _ in take(feed, per_epoch)]
            keys = [key for batch in batches for key in batch.keys]
            assert len(keys) == len(set(keys)) == 4 * G
            assert {batch.epoch for batch in batches} == {epoch}


def test_a_batch_holds_what_its_samples_hold(dataset: Path) -> None:
    with make(dataset, micro_batch=4, caption_dropout=0.3) as feed:
        for batch, _ in take(feed, 12):
            assert batch.latent_BCTHW.shape == (
                4,
                *WAN22.latent_shape(batch.bucket),
            ) and batch.text_BSD.shape == (4, 512, 8)
            assert (
                batch.latent_BCTHW.dtype == batch.text_BSD.dtype == torch.float16
                and batch.condition_BC1HW is None
            )
            for i, key in enumerate(batch.keys):
                rng = np.random.default_rng(int(key, 16))  # as tools/fake/batch.py draws
                latent = rng.standard_normal(WAN22.latent_shape(batch.bucket), np.float32).astype(
                    np.float16
                )
                text = rng.standard_normal((int(rng.integers(60, 260)), 8), np.float32).astype(
                    np.float16
                )
                if batch.caption_dropped[i]:
                    text = np.full((1, 8), 0.5, np.float16)
                assert (batch.latent_BCTHW[i].numpy() == latent).all()
                assert (
                    batch.text_BSD[i, : len(text)].numpy() == text
                ).all() and not batch.text_BSD[i, len(text) :].any()
                assert batch.seeds[i] == sample_seed(3, batch.epoch, key)
                assert batch.is_i2v[i] == is_i2v(3, batch.epoch, key, batch.bucket.num_frames, 0.4)


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
    # a fork of a process without threads, torch imported once
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["loader.feed", __name__])
    for _ in range(rounds):
        keys_file.write_text("")
        process = processes.Process(
            target=consume, args=(dataset, folder, choose.choice([1, 2, 3, 4, 8]))
        )
        process.start()
        num_lines, deadline_s = choose.randrange(1, 30), time.monotonic() + 60
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
    tar = next((copy / "train").glob("train-64x32x5-*.tar"))
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
    before = set(threading.enumerate())
    feed = make(dataset, num_threads=4, max_ahead=16)
    take(feed, 3)
    assert set(threading.enumerate()) > before
    feed.close()
    assert set(threading.enumerate()) == before


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


@pytest.fixture(scope="module")
def raw_dataset(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> RawDataset:
    """Eight clips whose latents are the tiny VAE's; also, by key, the latent of frame 0 after its
    JPEG (by Pillow).
    """
    folder, vae = (
        tmp_path_factory.mktemp("raw"),
        load_vae_encoder(tiny_checkpoint, "cpu", torch.float32),
    )
    samples, after_jpeg = [], {}
    for i in range(8):
        key = f"{i:032x}"
        coarse = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize((96, 64), PIL.Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        frame, again = (
            torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
            for picture in (image, PIL.Image.open(file))
        )
        video = torch.stack([frame * (1 - 0.1 * t) for t in range(5)], 1)
        latent = vae.encode(video.unsqueeze(0))[0].half().numpy()
        after_jpeg[key] = vae.encode(again[None, :, None])[0]
        meta = SampleMeta(
            key=key,
            clip_id="1",
            label="l.json",
            media_type="video",
            category="",
            programme="",
            split="train",
            prompt="",
            width_px=96,
            height_px=64,
            num_frames=5,
            fps=24.0,
            start_ms=0,
            shot=0,
            media_xxh3=key,
            latent=TensorInfo("float16", latent.shape),
            text=TensorInfo("float16", (2, 8)),
        )
        samples.append(
            (
                key,
                {
                    JSON: encode_meta(meta),
                    LATENT: encode_tensor(latent),
                    JPG: file.getvalue(),
                    TEXT: encode_tensor(np.ones((2, 8), np.float16)),
                },
            )
        )
    shard = write_shard(folder / "train", "train-96x64x5-000000", "96x64x5", samples)
    (folder / "empty_prompt.text.zst").write_bytes(encode_tensor(np.ones((1, 8), np.float16)))
    (folder / MANIFEST_FILE).write_bytes(
        encode_manifest(Manifest({}, recipe_id({}), {"train": [shard]}))
    )
    return folder, after_jpeg


def test_a_missing_or_damaged_empty_prompt_is_named_with_its_dataset(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, {"64x32x1": 8}, text_dim=8)
    file = tmp_path / "empty_prompt.text.zst"
    for change in (lambda: file.write_bytes(file.read_bytes()[:-9]), file.unlink):
        change()
        with pytest.raises(
            DatasetError, match=f"{tmp_path}: {file.name} is missing or damaged .*; copy it anew"
        ):
            make(tmp_path, global_batch=8, micro_batch=4)


def test_the_raw_latent_agrees_with_the_stored_one_within_the_jpegs_loss(
    raw_dataset: RawDataset, tiny_checkpoint: Path
) -> None:
    folder, after_jpeg = raw_dataset
    vae = load_vae_encoder(tiny_checkpoint, "cpu", torch.float32)
    with make(
        folder, global_batch=8, micro_batch=4, condition="raw", vae=vae, i2v_share=0.6
    ) as feed:
        batches = [batch for batch, _ in take(feed, 4)]
        assert feed.damages == []
    assert 0 < sum(sum(batch.is_i2v) for batch in batches) < 16
    for batch in batches:
        assert batch.condition_BC1HW is not None
        for i, key in enumerate(batch.keys):
            stored, raw = batch.latent_BCTHW[i, :, :1].float(), batch.condition_BC1HW[i].float()
            if not batch.is_i2v[i]:
                assert torch.equal(raw, stored)
                continue
            # of the JPEG, against the same frame uncompressed
            loss = (after_jpeg[key] - stored).norm()
            # another decoder may round a pixel the other way
            assert 0 < (raw - stored).norm() < 1.1 * loss
            assert (raw - after_jpeg[key]).norm() < 0.2 * loss


def test_a_frame_that_can_not_be_decoded_is_reported_and_the_stored_latent_used(
    raw_dataset: RawDataset, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source, _ = raw_dataset
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    metas = [
        SampleMeta(
            key=f"{i:032x}",
            clip_id="1",
            label="l.json",
            media_type="video",
            category="",
            programme="",
            split="train",
            prompt="",
            width_px=96,
            height_px=64,
            num_frames=5,
            fps=24.0,
            start_ms=0,
            shot=0,
            media_xxh3="",
            latent=TensorInfo("float16", (48, 2, 4, 6)),
            text=TensorInfo("float16", (2, 8)),
        )
        for i in range(8)
    ]
    samples = [
        (
            meta.key,
            {
                JSON: encode_meta(meta),
                TEXT: encode_tensor(np.ones((2, 8), np.float16)),
                LATENT: encode_tensor(np.full((48, 2, 4, 6), 0.25, np.float16)),
                JPG: b"not a picture" if i == 3 else jpeg(),
            },
        )
        for i, meta in enumerate(metas)
    ]
    shard = write_shard(folder / "train", "train-96x64x5-000000", "96x64x5", samples)
    (folder / MANIFEST_FILE).write_bytes(
        encode_manifest(Manifest({}, recipe_id({}), {"train": [shard]}))
    )
    vae = load_vae_encoder(tiny_checkpoint, "cpu", torch.float32)
    with make(
        folder, global_batch=8, micro_batch=8, condition="raw", vae=vae, i2v_share=1.0
    ) as feed:
        batch, _ = next(feed)
        (damage,) = feed.damages
    assert batch.condition_BC1HW is not None
    assert (
        damage.key == f"{3:032x}"
        and damage.member.endswith(".jpg")
        and "stored latent frame" in damage.reason
    )
    is_stored = [bool((batch.condition_BC1HW[i] == 0.25).all()) for i in range(8)]
    assert [key for key, stored in zip(batch.keys, is_stored, strict=True) if stored] == [
        damage.key
    ]


def jpeg() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (96, 64), (200, 30, 90)).save(file, "JPEG")
    return file.getvalue()


def test_raw_without_a_vae_is_refused(dataset: Path) -> None:
    with pytest.raises(ValueError, match="VAE"):
        make(dataset, condition="raw")
