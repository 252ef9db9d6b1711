"""Strangers can read the shards: tar, zstd, webdataset and DALI, none of them with a line of
ours.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from extras import needs_dali

from loader.manifest import decode_index, read_manifest


@pytest.fixture(scope="module")
def shard(tiny_dataset: Path) -> Path:
    """A shard of videos."""
    name = next(
        info.name
        for info in read_manifest(tiny_dataset).splits["train"]
        if info.bucket == "160x96x9"
    )
    return tiny_dataset / "train" / f"{name}.tar"


def members(shard: Path) -> list[str]:
    return [
        m.name
        for sample in decode_index(shard.with_suffix(".idx").read_bytes(), shard.name)
        for m in sample
    ]


def test_tar_lists_and_extracts(shard: Path, tmp_path: Path) -> None:
    listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == members(shard) and not listed.stderr
    subprocess.run(["tar", "xf", shard, "-C", tmp_path], check=True)
    for name in members(shard):
        if name.endswith(".json"):
            meta = json.loads((tmp_path / name).read_text(encoding="utf-8"))
            packed = (tmp_path / name.replace(".json", ".latent.zst")).read_bytes()
            if shutil.which("zstd"):
                unpacked = subprocess.run(
                    ["zstd", "-dc"], input=packed, capture_output=True, check=True
                ).stdout
                assert unpacked == zstandard.ZstdDecompressor().decompress(packed)
            planes = np.frombuffer(
                zstandard.ZstdDecompressor().decompress(packed), np.uint8
            ).reshape(2, -1)
            latent = (
                (planes[0].astype("<u2") << 8 | planes[1])
                .view("<f2")
                .reshape(meta["latent"]["shape"])
            )
            assert np.isfinite(latent).all() and latent.std() > 0.1


# webdataset leaves its file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_iterates(shard: Path) -> None:
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [
        n.partition(".")[0] for n in members(shard) if "json" in n
    ]
    for sample in samples:
        assert json.loads(sample["json"])["key"] == sample["__key__"]
        assert {"latent.zst", "text.zst", "jpg"} <= sample.keys()


@needs_dali
@pytest.mark.parametrize("kind", ["video", "image"])
def test_dali_reads_by_the_index_and_a_missing_jpg_is_empty(tiny_dataset: Path, kind: str) -> None:
    from nvidia.dali import fn, pipeline_def

    frames = "x9" if kind == "video" else "x1"
    name = next(
        info.name
        for info in read_manifest(tiny_dataset).splits["train"]
        if info.bucket.endswith(frames)
    )
    stem = str(tiny_dataset / "train" / name)
    num_samples = len(decode_index(Path(stem + ".idx").read_bytes(), name))

    @pipeline_def(batch_size=num_samples, num_threads=1, device_id=None)
    def read():  # type: ignore[no-untyped-def]
        return tuple(
            fn.readers.webdataset(
                paths=[stem + ".tar"],
                index_paths=[stem + ".idx"],
                ext=["json", "jpg"],
                missing_component_behavior="empty",
            )
        )

    pipeline = read()
    pipeline.build()
    metas, pictures = pipeline.run()
    for i in range(num_samples):
        assert len(json.loads(bytes(metas.at(i)))["key"]) == 32
        picture = bytes(pictures.at(i))
        assert picture[:3] == b"\xff\xd8\xff" if kind == "video" else picture == b""
