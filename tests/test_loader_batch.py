"""batch.py: a batch holds what its samples hold; first frames of the raw path become latents, or
are reported.
"""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from extras import needs_dali

from loader.batch import Batch
from loader.feed import Feed
from loader.manifest import MANIFEST_FILE, DatasetError, Manifest, encode_manifest, recipe_id
from loader.order import is_i2v, sample_seed
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
from tools.fake.feed import make_feed

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
    settings: dict[str, Any] = {"global_batch": G, "seed": 3, "num_threads": 2}
    return make_feed(*datasets, **(settings | changes))


def take(feed: Feed, num: int) -> list[tuple[Batch, dict[str, Any]]]:
    return [next(feed) for _ in range(num)]


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


@needs_dali
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


@needs_dali
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
