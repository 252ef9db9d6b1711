"""shard.py: what is read is what was written, and every flipped bit is found."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from loader.manifest import (
    MANIFEST_FILE,
    Manifest,
    decode_index,
    encode_manifest,
    read_manifest,
    recipe_id,
)
from loader.read import Reader
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
from loader.shard import Damage
from loader.store import read_dataset
from shardgen.encode.write import write_shard
from shardgen.verify import check_across, check_shard
from tools.fake.batch import write_synthetic_dataset
from tools.fake.feed import make_feed


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


def test_a_sample_is_read_as_it_was_written(source: Path) -> None:
    sample = reader(source).read(0, 2, everything)
    rng = np.random.default_rng(int(sample.meta.key, 16))
    expected = rng.standard_normal((48, 2, 4, 4), np.float32).astype(np.float16)
    assert (decode_tensor(sample.members[LATENT], sample.meta.latent) == expected).all()
    assert decode_tensor(sample.members[TEXT], sample.meta.text).shape == sample.meta.text.shape
    assert bytes(sample.members[JPG][:3]) == b"\xff\xd8\xff"


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
        make_feed(
            dataset,
            global_batch=4,
            micro_batch=4,
            i2v_share=0.4,
            caption_dropout=0.0,
        ) as feed,
        pytest.raises(SampleError, match=f"shard {info.name}, key {key}: .*{reason}"),
    ):
        next(feed)


def test_a_damage_reads_as_a_sentence() -> None:
    whole, one = Damage("s", "", "s.idx", "gone", 128), Damage("s", "k", "k.json", "short")
    assert str(whole) == "shard s, all 128 samples, member s.idx: gone"
    assert str(one) == "shard s, key k, member k.json: short"
