"""tools.index for other models than TI2V-5B: text to video has its own sides, image to video of
A14B is refused.
"""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trainer_runs import train_here

from loader.feed_config import FeedConfig
from loader.manifest import MANIFEST_FILE, encode_manifest, make_manifest, read_manifest
from loader.shape import WAN21
from tools.fake.batch import write_synthetic_dataset
from tools.index import main
from train.config import TrainConfig
from train.model.config import ModelConfig
from train.records import VALIDATION_FILE, ValidationRecord, read_records
from train.sampling import SamplesConfig
from train.validate import ValidationConfig


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """One picture of 120x90 with a caption."""
    levels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(levels).save(jpeg, "JPEG")
    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w") as file:
        for name, data in {"a.jpg": jpeg.getvalue(), "a.json": b'{"caption": "a"}'}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def index(monkeypatch: pytest.MonkeyPatch, tar: Path, output: Path, model: Path) -> None:
    argv = ["index", str(tar), "--output", str(output), "--model", str(model), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    main()


def test_sides_are_multiples_of_16_for_the_wan21_vae(
    monkeypatch: pytest.MonkeyPatch, tar: Path, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    index(monkeypatch, tar, tmp_path / "out", tiny_model("t2v-a14b"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.layout == WAN21
    assert [shard.bucket for shard in manifest.splits["train"]] == ["112x80x1"]
    text = json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert text["format_version"] == 2


def test_image_to_video_of_a14b_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tar: Path, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(SystemExit, match=r"Wan2.2-I2V-A14B takes what `shardgen build` alone"):
        index(monkeypatch, tar, tmp_path / "out", tiny_model("i2v-a14b"))
    assert not (tmp_path / "out").exists()


def test_what_can_be_seen_to_fail_is_said_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tar: Path, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    monkeypatch.delattr("tools.index.TextEncoder")
    with pytest.raises(SystemExit, match=r"gone\.tar: No such file"):
        index(monkeypatch, tmp_path / "gone.tar", tmp_path / "out", tiny_model("t2v-a14b"))
    (tmp_path / "manifest.json").touch()
    with pytest.raises(SystemExit, match="is a dataset already"):
        index(monkeypatch, tar, tmp_path, tiny_model("t2v-a14b"))


@pytest.mark.parametrize("with_shards", [False, True])
def test_a_run_on_an_index_validates_and_samples_what_stored_latents_there_are(
    with_shards: bool,
    monkeypatch: pytest.MonkeyPatch,
    tar: Path,
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
) -> None:
    model, folders = tiny_model("t2v-a14b"), [str(tmp_path / "indexed")]
    index(monkeypatch, tar, tmp_path / "indexed", model)
    if with_shards:
        shards = tmp_path / "shards"
        train = write_synthetic_dataset(shards, {"64x48x1": 2}, layout=WAN21)
        val = write_synthetic_dataset(shards, {"64x48x1": 2}, layout=WAN21, split="val", seed=1)
        manifest = make_manifest({}, train.splits | val.splits, layout=WAN21)
        (shards / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        folders.append(str(shards))
    config = TrainConfig(
        output="",
        model=ModelConfig(path=str(model), expert="high", dtype="float32"),
        data=FeedConfig(datasets=folders, condition="raw", i2v_share=0.0, num_threads=1),
        num_steps=1,
        global_batch=1,
        validation=ValidationConfig(every=1, num_windows=1, num_train_windows=1),
        samples=SamplesConfig(every=1, num_clips=1, num_steps=2),
    )
    train_here(config, tmp_path / "run")
    records = read_records(tmp_path / "run" / VALIDATION_FILE, ValidationRecord)
    sampled = sorted(path.name for path in (tmp_path / "run").glob("samples/step-*"))
    assert [record.step for record in records] == ([0, 1] if with_shards else [])
    assert sampled == ["step-00000000", "step-00000001"][: 2 * with_shards]
    assert all(record.gap is not None for record in records)
