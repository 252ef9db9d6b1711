"""manifest.json: version 1 byte for byte as ever, version 2 where the layout needs it, and newer
ones refused in words.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from loader.manifest import (
    MANIFEST_FILE,
    DatasetError,
    Manifest,
    ShardInfo,
    decode_index,
    encode_manifest,
    load_manifest,
    make_manifest,
    read_manifest,
)
from loader.sample import CONDITION, encode_tensor
from loader.shape import WAN21, WAN22
from shardgen.encode.write import write_shard
from shardgen.verify import verify_dataset
from tools.fake.batch import write_synthetic_dataset
from tools.fake.feed import make_feed

SHARD = ShardInfo("train-64x32x5-000000", "64x32x5", 3, 4096, "a", "b", "c")
RECIPE = {"windows": {"fps": 24.0}}


def loaded(manifest: Manifest | dict[str, Any]) -> Manifest:
    data = encode_manifest(manifest) if isinstance(manifest, Manifest) else None
    return load_manifest(lambda: data or msgspec.json.encode(manifest), "M")


def plain(manifest: Manifest, **changes: Any) -> dict[str, Any]:
    return msgspec.json.decode(encode_manifest(manifest)) | changes


def test_version_1_has_the_bytes_it_always_had() -> None:
    assert encode_manifest(make_manifest(RECIPE, {"train": [SHARD]})) == (
        b'{\n "recipe": {\n  "windows": {\n   "fps": 24.0\n  }\n },\n'
        b' "recipe_id": "e41ff7a39d874baffde837e956d01f96",\n'
        b' "splits": {\n  "train": [\n   {\n    "name": "train-64x32x5-000000",\n'
        b'    "bucket": "64x32x5",\n    "num_samples": 3,\n    "bytes": 4096,\n'
        b'    "tar_xxh3": "a",\n    "idx_xxh3": "b",\n    "xxh3_xxh3": "c"\n   }\n  ]\n },\n'
        b' "format_version": 1\n}\n'
    )


def test_the_wan22_layout_is_version_1_unless_version_2_is_asked_for() -> None:
    first = loaded(make_manifest(RECIPE, {}))
    second = loaded(make_manifest(RECIPE, {}, version=2))
    assert (first.format_version, first.layout) == (1, WAN22)
    assert (second.format_version, second.layout) == (2, WAN22)
    assert first.recipe_id == second.recipe_id


def test_another_layout_or_a_condition_makes_it_version_2() -> None:
    a14b = make_manifest(RECIPE, {}, layout=WAN21)
    assert plain(a14b)["latent_layout"] == {
        "channels": 16,
        "stride_t": 4,
        "stride_px": 8,
        "patch_px": 16,
    }
    assert "condition" not in plain(a14b)  # absent fields are left out, not null
    assert loaded(a14b).format_version == 2 and loaded(a14b).layout == WAN21
    i2v = make_manifest(RECIPE, {}, layout=WAN21, condition="first_frame_and_grey")
    assert loaded(i2v).condition == "first_frame_and_grey"


def test_a_newer_version_is_refused_with_advice_whatever_else_it_holds() -> None:
    newer = plain(make_manifest(RECIPE, {}), format_version=3, weather="fine", splits="elsewhere")
    with pytest.raises(DatasetError, match=r"M: format_version 3, .* 1 to 2; update newsreel"):
        loaded(newer)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"latent_layout": msgspec.to_builtins(WAN21)},
        {"condition": "first_frame_and_grey"},
    ],
)
def test_a_version_that_does_not_fit_its_fields_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match="edited or damaged"):
        loaded(plain(make_manifest(RECIPE, {}), **changes))


def test_a_bucket_is_checked_against_the_manifests_own_layout() -> None:
    shard = msgspec.structs.replace(SHARD, name="train-1280x720x49-000000", bucket="1280x720x49")
    assert loaded(make_manifest(RECIPE, {"train": [shard]}, layout=WAN21)).splits["train"] == [
        shard
    ]
    with pytest.raises(DatasetError, match=r"M: shard train-1280x720x49-000000: .*1280x704x49"):
        loaded(make_manifest(RECIPE, {"train": [shard]}))


def test_an_edited_recipe_and_an_unknown_field_are_refused(tmp_path: Path) -> None:
    manifest = make_manifest(RECIPE, {"train": [SHARD]})
    with pytest.raises(DatasetError, match="recipe_id does not match"):
        loaded(plain(manifest, recipe={}))
    with pytest.raises(DatasetError, match="unknown field `weather`"):
        loaded(plain(manifest, weather="fine"))
    (tmp_path / MANIFEST_FILE).write_bytes(encode_manifest(manifest)[:-9])
    with pytest.raises(DatasetError, match=f"{tmp_path}/manifest.json: "):
        read_manifest(tmp_path)


def faults(dataset: Path) -> list[str]:
    """Those of verify, but for the made-up keys, which are no hashes."""
    found = verify_dataset(dataset, 1, lambda count: None)
    return [fault for fault in found if "belong to key" not in fault]


def test_a_dataset_of_another_layout_is_fed_and_verified(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, {"64x48x5": 6}, text_dim=8, layout=WAN21)
    with make_feed(tmp_path, global_batch=2, micro_batch=2) as feed:
        batch, _ = next(feed)
        assert batch.latent_BCTHW.shape == (2, 16, 2, 6, 8) and feed.damages == []
    assert faults(tmp_path) == []


@pytest.mark.parametrize(
    ("condition", "fault"),
    [
        (np.ones((20, 2, 6, 8), np.float16), ""),
        (np.ones((20, 2, 6, 7), np.float16), "no whole number of channels"),
    ],
)
def test_a_condition_member_is_part_of_a_sample_and_verified(
    tmp_path: Path, condition: np.ndarray[Any, Any], fault: str
) -> None:
    manifest = write_synthetic_dataset(tmp_path, {"64x48x5": 1}, text_dim=8, layout=WAN21)
    (shard,) = manifest.splits["train"]
    data = (tmp_path / "train" / f"{shard.name}.tar").read_bytes()
    (members,) = decode_index((tmp_path / "train" / f"{shard.name}.idx").read_bytes(), shard.name)
    stored = {m.name[33:]: data[m.offset : m.offset + m.size] for m in members}
    stored[CONDITION] = encode_tensor(condition)
    shard = write_shard(
        tmp_path / "train", shard.name, shard.bucket, [(members[0].name[:32], stored)]
    )
    manifest = make_manifest({}, {"train": [shard]}, layout=WAN21, condition="first_frame_and_grey")
    (tmp_path / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    assert [fault in each for each in faults(tmp_path)] == [True] * bool(fault)
    with make_feed(tmp_path, global_batch=1) as feed:
        assert next(feed)[0].latent_BCTHW.shape == (1, 16, 2, 6, 8) and feed.damages == []
