"""Reading finds every damage, names it, and replaces the sample by a rule; open shards stay
bounded.
"""

import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from loader.manifest import (
    DatasetError,
)
from loader.read import Reader, TooManyDamagedError
from loader.sample import (
    JPG,
    LATENT,
    TEXT,
)
from loader.shard import Sample
from loader.store import read_dataset
from tools.fake.batch import write_synthetic_dataset

SHARD = "train-64x64x5-000000"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_synthetic_dataset(folder, {"64x64x5": 12, "96x32x5": 8}, samples_per_shard=4, text_dim=8)
    return folder


@pytest.fixture
def dataset(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "dataset"))


def everything(extensions: Sequence[str]) -> Sequence[str]:
    return (LATENT, TEXT, JPG)


def reader(dataset: Path, max_damaged: int = 10**6, max_open: int = 4) -> Reader:
    store, manifest = read_dataset(dataset)
    return Reader(
        store, "train", manifest.splits["train"], max_open=max_open, max_damaged=max_damaged
    )


def copied(sample: Sample) -> tuple[str, dict[str, bytes]]:
    return sample.meta.key, {extension: bytes(view) for extension, view in sample.members.items()}


def damage_json(dataset: Path) -> None:
    tar = dataset / "train" / f"{SHARD}.tar"
    data = bytearray(tar.read_bytes())
    data[520] ^= 1
    tar.write_bytes(data)


def truncate_tar(dataset: Path) -> None:
    os.truncate(dataset / "train" / f"{SHARD}.tar", 600)


def flip_index(dataset: Path) -> None:
    path = dataset / "train" / f"{SHARD}.idx"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))


def drop_hash(dataset: Path) -> None:
    path = dataset / "train" / f"{SHARD}.xxh3"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("fault", "member", "reason"),
    [
        (damage_json, ".json", "bytes differ"),
        (truncate_tar, ".json", "short"),
        (flip_index, ".idx", "hash differs from the manifest"),
        (drop_hash, ".xxh3", "hash differs from the manifest"),
        (lambda dataset: (dataset / "train" / f"{SHARD}.tar").unlink(), ".tar", "No such file"),
        (lambda dataset: (dataset / "train" / f"{SHARD}.idx").unlink(), ".idx", "No such file"),
    ],
    ids=["bit flip", "truncated", "index", "hashes", "tar gone", "index gone"],
)
def test_a_damage_is_named_and_the_sample_replaced_in_its_bucket(
    dataset: Path,
    fault: Callable[[Path], object],
    member: str,
    reason: str,
) -> None:
    fault(dataset)
    broken = reader(dataset)
    sample = broken.read(0, 0, everything)
    assert str(sample.meta.bucket) == "64x64x5"
    damage = broken.damages[0]
    assert damage.shard == SHARD and damage.member.endswith(member) and reason in damage.reason
    # the same stand-in every time
    assert copied(reader(dataset).read(0, 0, everything)) == copied(sample)
    assert len(broken.damages) == len(set(broken.damages))


def test_the_stand_in_is_the_next_sample_of_the_shard_then_the_like_of_the_next_shard(
    dataset: Path,
) -> None:
    whole = reader(dataset)
    next_in_shard, next_shard = (
        copied(whole.read(0, 1, everything)),
        copied(whole.read(1, 3, everything)),
    )
    damage_json(dataset)
    assert copied(reader(dataset).read(0, 0, everything)) == next_in_shard
    truncate_tar(dataset)
    assert copied(reader(dataset).read(0, 3, everything)) == next_shard


def test_a_member_that_the_sample_lacks_is_named(source: Path) -> None:
    lacking = reader(source, max_damaged=1)
    with pytest.raises(
        TooManyDamagedError, match=r"key [0-9a-f]{32}, member [0-9a-f]{32}\.mp4: missing"
    ):
        lacking.read(0, 0, lambda extensions: ("mp4",))


def test_too_many_damaged_samples_stop_the_run(dataset: Path) -> None:
    truncate_tar(dataset)
    assert reader(dataset, max_damaged=4).read(0, 0, everything).shard != SHARD
    with pytest.raises(
        TooManyDamagedError, match=f"{SHARD}.*makes 4 samples.*max_damaged allows 3.*verify"
    ):
        reader(dataset, max_damaged=3).read(0, 0, everything)
    for path in (dataset / "train").glob("train-64x64x5-*.tar"):
        path.unlink()
    with pytest.raises(
        TooManyDamagedError, match="no intact sample is left in the shards of 64x64x5"
    ):
        reader(dataset).read(0, 0, everything)


def test_the_same_damage_counts_once(dataset: Path) -> None:
    damage_json(dataset)
    broken = reader(dataset, max_damaged=1)
    for _ in range(5):
        broken.read(0, 0, everything)
    assert len(broken.damages) == 1


def test_only_so_many_shards_stay_open(source: Path) -> None:
    def open_tars() -> int:
        links = (
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        )
        return sum(link.startswith(str(source)) for link in links)

    bounded = reader(source, max_open=2)
    for shard in [0, 1, 2, 3, 4, 0, 2, 4]:
        bounded.read(shard, 0, everything)
        assert 1 <= open_tars() <= 2
    del bounded
    assert open_tars() == 0


def test_threads_read_the_same_bytes_while_shards_are_closed_under_them(source: Path) -> None:
    expected = {
        (s, p): copied(reader(source).read(s, p, everything)) for s in range(5) for p in range(4)
    }
    shared, wrong = reader(source, max_open=1), []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(200):
            place = choose.choice(list(expected))
            if copied(shared.read(*place, everything)) != expected[place]:
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and shared.damages == []


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"manifest\.json: no manifest"):
        read_dataset(tmp_path)
