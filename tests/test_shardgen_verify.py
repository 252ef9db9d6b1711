"""verify.py and inspect: a whole dataset has no faults, and whatever is broken in it is found and
named.
"""

import random
import shutil
from pathlib import Path

import msgspec
import pytest

from loader.manifest import (
    Manifest,
    ShardInfo,
    decode_index,
    encode_manifest,
    read_manifest,
    recipe_id,
)
from loader.sample import SampleMeta, decode_meta, encode_meta
from shardgen.cli import main as shardgen
from shardgen.encode.write import write_shard
from shardgen.verify import verify_dataset


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A copy to break: shards and manifest."""
    copy = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, copy, ignore=shutil.ignore_patterns("catalog*", "*.csv", "cache"))
    return copy


def faults(dataset: Path) -> list[str]:
    return list(verify_dataset(dataset, 1, lambda count: None))


def biggest(dataset: Path) -> tuple[Path, ShardInfo]:
    """The largest shard with video, its .tar and its entry."""
    shards = [info for info in read_manifest(dataset).splits["train"] if info.bucket.endswith("x9")]
    info = max(shards, key=lambda info: info.bytes)
    return dataset / "train" / f"{info.name}.tar", info


def test_a_whole_dataset_has_no_faults(
    tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shardgen(["verify", str(tiny_dataset), "--workers", "1"]) == 0
    assert "no faults" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        ({}, "VAE encoder 1 (layer by layer), cpu, float32"),
        # a dataset from before the encoder had a version
        ({"device": "cuda", "dtype": "float16"}, "VAE encoder 1 (layer by layer), cuda, float16"),
        ({"device": "cuda", "encoder": 2}, "VAE encoder 2 (fused), cuda, float32"),
    ],
)
def test_a_dataset_of_any_encoder_is_valid_and_says_which_wrote_it(
    dataset: Path, encoder: dict[str, object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(dataset)
    recipe = manifest.recipe | {"encode": manifest.recipe["encode"] | encoder}
    old = msgspec.structs.replace(manifest, recipe=recipe, recipe_id=recipe_id(recipe))
    (dataset / "manifest.json").write_bytes(encode_manifest(old))
    assert shardgen(["verify", str(dataset), "--workers", "1"]) == 0
    assert f"encoded by: {told}" in capsys.readouterr().out


def test_any_flipped_bit_is_found_and_traced_to_its_member(dataset: Path) -> None:
    path, info = biggest(dataset)
    whole = path.read_bytes()
    members = [
        m
        for sample in decode_index(path.with_suffix(".idx").read_bytes(), info.name)
        for m in sample
    ]
    rng = random.Random(0)
    for _ in range(6):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        found = faults(dataset)
        assert any("xxh3_128" in fault and path.name in fault for fault in found), at
        inside = [
            m.name for m in members if m.offset - 512 <= at < m.offset + m.size + -m.size % 512
        ]
        assert any(name in fault for fault in found for name in inside) or not inside, (at, found)


@pytest.mark.parametrize("suffix", [".idx", ".xxh3", ".tar"])
def test_a_missing_or_cut_file_is_found(dataset: Path, suffix: str) -> None:
    path = biggest(dataset)[0].with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-600])
    assert any(path.name in fault for fault in faults(dataset))
    path.unlink()
    assert any(str(path) in fault for fault in faults(dataset))


def test_strays_damaged_empty_prompt_and_edited_manifest_are_found(dataset: Path) -> None:
    (dataset / "train" / "train-160x96x9-000099.tar").write_bytes(b"x")
    (dataset / "empty_prompt.text.zst").write_bytes(b"x")
    found = faults(dataset)
    assert any("000099.tar: is not in manifest.json" in fault for fault in found)
    assert any("empty_prompt.text.zst" in fault for fault in found)
    manifest = dataset / "manifest.json"
    manifest.write_bytes(
        manifest.read_bytes().replace(b'"min_caption_chars": 50', b'"min_caption_chars": 51')
    )
    assert shardgen(["verify", str(dataset)]) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"start_ms": 1}, "belong to key"),
        ({"split": "val"}, "a sample of val"),
        ({"width_px": 128}, "160x96x9"),
        ({"latent": msgspec.UNSET}, "has no member latent.zst"),
        ({"jpg": msgspec.UNSET}, "a video without jpg"),
        ({"text": (3, 32)}, "zstd frame"),
        ({"programme": "val's"}, "both sides of the split"),
    ],
)
def test_a_consistent_shard_with_wrong_contents_is_found(
    dataset: Path, change: dict[str, object], expected: str
) -> None:
    path, info = biggest(dataset)
    data = path.read_bytes()
    samples: list[tuple[str, dict[str, bytes]]] = []
    for members in decode_index(path.with_suffix(".idx").read_bytes(), info.name):
        samples.append(
            (
                members[0].name[:32],
                {m.name[33:]: data[m.offset : m.offset + m.size] for m in members},
            )
        )
    meta = decode_meta(samples[0][1]["json"])
    samples[0][1].update(json=encode_meta(changed(meta, dataset, change)))
    for name, value in change.items():
        if value is msgspec.UNSET:
            del samples[0][1]["latent.zst" if name == "latent" else name]
    manifest = read_manifest(dataset)
    again = write_shard(path.parent, info.name, info.bucket, samples)
    splits = {
        split: [again if shard.name == info.name else shard for shard in shards]
        for split, shards in manifest.splits.items()
    }
    (dataset / "manifest.json").write_bytes(
        encode_manifest(Manifest(manifest.recipe, manifest.recipe_id, splits))
    )
    found = faults(dataset)
    assert found and any(expected in fault for fault in found), found


def changed(meta: SampleMeta, dataset: Path, change: dict[str, object]) -> SampleMeta:
    plain = {name: value for name, value in change.items() if value is not msgspec.UNSET}
    if "text" in plain:
        plain["text"] = msgspec.structs.replace(meta.text, shape=plain["text"])
    if "programme" in plain:
        shard = dataset / "val" / f"{read_manifest(dataset).splits['val'][0].name}.tar"
        first = decode_index(shard.with_suffix(".idx").read_bytes(), shard.name)[0][0]
        plain["programme"] = decode_meta(
            shard.read_bytes()[first.offset : first.offset + first.size]
        ).programme
    return msgspec.structs.replace(meta, **plain)


def test_inspect_lists_a_shard_and_shows_one_sample(
    tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, info = biggest(tiny_dataset)
    assert shardgen(["inspect", str(path)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == info.num_samples and all(info.bucket in line for line in listed)
    assert shardgen(["inspect", str(path), listed[0][:8]]) == 0
    shown = capsys.readouterr().out
    assert '"clip_id"' in shown and "latent.zst: shape [48, 3, 6, 10]" in shown
    assert shardgen(["inspect", str(path), "ffffffffffff"]) == 2
    assert "no sample has a key" in capsys.readouterr().err
