"""Reading finds every damage, names it, and replaces the sample by a rule; open shards stay
bounded.
"""

import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from loader.feed import Feed
from loader.manifest import (
    MANIFEST_FILE,
    DatasetError,
    Manifest,
    decode_index,
    encode_manifest,
    read_manifest,
    recipe_id,
)
from loader.read import Damage, Reader, Sample, TooManyDamagedError, read_dataset
from loader.sample import (
    JPG,
    JSON,
    LATENT,
    TEXT,
    SampleError,
    TensorInfo,
    decode_meta,
    decode_tensor,
    encode_meta,
    encode_tensor,
)
from shardgen.encode.write import write_shard
from shardgen.verify import check_across, check_shard
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


def test_a_sample_is_read_as_it_was_written(source: Path) -> None:
    sample = reader(source).read(0, 2, everything)
    rng = np.random.default_rng(int(sample.meta.key, 16))
    expected = rng.standard_normal((48, 2, 4, 4), np.float32).astype(np.float16)
    assert (decode_tensor(sample.members[LATENT], sample.meta.latent) == expected).all()
    assert decode_tensor(sample.members[TEXT], sample.meta.text).shape == sample.meta.text.shape
    assert bytes(sample.members[JPG][:3]) == b"\xff\xd8\xff"


def member_bytes(dataset: Path) -> list[tuple[int, int, Path, int]]:
    """(shard, position, tar, offset) of every byte of every member."""
    _, manifest = read_dataset(dataset)
    found = []
    for i, info in enumerate(manifest.splits["train"]):
        for line, text in enumerate(
            (dataset / "train" / f"{info.name}.idx").read_text().splitlines()[1:]
        ):
            words = text.split()
            for offset, size in zip(words[1::4], words[2::4], strict=True):
                tar = dataset / "train" / f"{info.name}.tar"
                found += [
                    (i, line, tar, byte) for byte in range(int(offset), int(offset) + int(size))
                ]
    return found


def flips_found(dataset: Path, num_flips: int, seed: int) -> int:
    random_flips = random.Random(seed)
    where = member_bytes(dataset)
    good = reader(dataset)
    found = 0
    for shard, position, tar, offset in random_flips.choices(where, k=num_flips):
        with tar.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ (1 << random_flips.randrange(8))]))
            file.flush()
            before = len(good.damages)
            good.damages.clear()
            good.read(shard, position, everything)
            found += len(good.damages) == 1 and good.damages[0].shard == tar.stem
            assert before <= 1
            file.seek(offset)
            file.write(bytes([byte]))
    good.damages.clear()
    for shard, position, _, _ in where[::997]:  # and nothing intact is called damaged
        good.read(shard, position, everything)
    assert good.damages == []
    return found


def test_every_flipped_bit_of_a_member_is_found(dataset: Path) -> None:
    assert flips_found(dataset, 200, seed=1) == 200


@pytest.mark.soak
def test_every_one_of_ten_thousand_flipped_bits_is_found(dataset: Path) -> None:
    assert flips_found(dataset, 10_000, seed=2) == 10_000


@pytest.mark.soak
def test_verify_finds_a_thousand_flips_anywhere(tiny_dataset: Path, tmp_path: Path) -> None:
    """In the manifest, the .idx, the .xxh3 and the .tar of the smallest shard."""
    dataset = Path(
        shutil.copytree(
            tiny_dataset, tmp_path / "one", ignore=shutil.ignore_patterns("catalog*", "*.csv")
        )
    )
    manifest = read_manifest(dataset)
    info = min(manifest.splits["train"], key=lambda info: info.bytes)
    (dataset / MANIFEST_FILE).write_bytes(
        encode_manifest(msgspec.structs.replace(manifest, splits={"train": [info]}))
    )
    for path in [*dataset.glob("*/*")]:
        if path.is_file() and path.stem != info.name:
            path.unlink()

    def faults() -> list[str]:
        """verify_dataset without its pool of processes."""
        try:
            now = read_manifest(dataset)
            checked = {
                one.name: check_shard((split, one, None), dataset=dataset)
                for split, infos in now.splits.items()
                for one in infos
            }
        except ValueError as error:
            return [str(error)]
        return [
            *(fault for shard in checked.values() for fault in shard.faults),
            *check_across(dataset, now, checked),
        ]

    assert faults() == []
    choose = random.Random(3)
    files = [
        dataset / MANIFEST_FILE,
        *(dataset / "train" / f"{info.name}.{kind}" for kind in ("idx", "xxh3", "tar")),
    ]
    for path in [files[0]] * 150 + [files[1]] * 100 + [files[2]] * 100 + [files[3]] * 650:
        whole = path.read_bytes()
        at = choose.randrange(len(whole))
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ 1 << choose.randrange(8)]) + whole[at + 1 :]
        )
        assert faults(), (path, at)
        path.write_bytes(whole)


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
        TooManyDamagedError, match=f"{SHARD}.*number 4.*max_damaged allows 3.*verify"
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


@pytest.mark.parametrize(
    ("too_long", "reason"), [(False, "zstd"), (True, r"shape \[600, \d+\], where \[512, \d+\]")]
)
def test_a_tensor_that_was_written_wrong_is_named_by_the_feed(
    dataset: Path, too_long: bool, reason: str
) -> None:
    info = read_manifest(dataset).splits["train"][0]
    tar = dataset / "train" / f"{info.name}.tar"
    data, samples = tar.read_bytes(), []
    for members in decode_index(tar.with_suffix(".idx").read_bytes(), info.name):
        samples.append(
            (
                members[0].name[:32],
                {m.name[33:]: data[m.offset : m.offset + m.size] for m in members},
            )
        )
    key, members_of_key = samples[3]
    if too_long:
        meta = decode_meta(members_of_key[JSON])
        text = np.zeros((600, meta.text.shape[1]), np.float16)
        meta = msgspec.structs.replace(meta, text=TensorInfo("float16", text.shape))
        members_of_key |= {JSON: encode_meta(meta), TEXT: encode_tensor(text)}
    else:
        members_of_key[LATENT] = members_of_key[LATENT][:-9]
    shard = write_shard(tar.parent, info.name, info.bucket, samples)
    (dataset / MANIFEST_FILE).write_bytes(
        encode_manifest(Manifest({}, recipe_id({}), {"train": [shard]}))
    )
    with (
        Feed(
            [dataset],
            split="train",
            global_batch=4,
            micro_batch=4,
            rank=0,
            world_size=1,
            seed=0,
            i2v_share=0.4,
            caption_dropout=0.0,
            condition="latent",
            device="cpu",
        ) as feed,
        pytest.raises(SampleError, match=f"shard {info.name}, key {key}: .*{reason}"),
    ):
        next(feed)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"manifest\.json: no manifest"):
        read_dataset(tmp_path)


def test_a_damage_reads_as_a_sentence() -> None:
    assert str(Damage("s", "", "s.idx", "gone")) == "shard s, key (unknown), member s.idx: gone"
