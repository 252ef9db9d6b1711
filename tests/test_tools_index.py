"""Foreign tars, indexed: what is usable trains as it lies there, the rest is counted, and the
tars stay untouched.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from extras import needs_dali

from loader.batch import Batch
from loader.feed import Feed
from loader.manifest import DatasetError, Manifest, decode_index, media_shards, read_manifest
from loader.mp4 import BT709
from loader.read import TooManyDamagedError
from loader.vae.encoder import VAEEncoder, load_vae_encoder
from shardgen.cli import main as shardgen
from shardgen.encode.text import TextEncoder
from shardgen.verify import verify_dataset
from tools.fake.feed import make_feed
from tools.index import tar_samples, write_index

FRAMES = 5
CAPTIONS = [" ".join(["clip"] * (i + 1)) for i in range(4)]


def pictures(seed: int, num: int, width: int = 100, height: int = 70) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    first = np.array(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC))
    return [np.roll(first, 2 * t, axis=1) for t in range(num)]


def clip(frames: list[np.ndarray], codec: str = "mjpeg", matrix: int | None = None) -> bytes:
    """Motion JPEG, which DALI decodes without a GPU; of H.264 it can't."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height = frames[0].shape[1], frames[0].shape[0]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec == "mjpeg":
            stream.codec_context.qmin = stream.codec_context.qmax = 2
        if matrix:
            stream.codec_context.colorspace = matrix
        for t, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if matrix:
                picture = picture.reformat(format="yuv420p", dst_colorspace=matrix)
            picture.pts = t
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()


def jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, members in samples.items():
            for extension, data in members.items():
                member = tarfile.TarInfo(f"./some folder/{name}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def about(caption: object) -> bytes:
    return json.dumps({"caption": caption, "url": "somewhere"}).encode()


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> TextEncoder:
    return TextEncoder(tiny_checkpoint, "cpu", torch.float32)


@pytest.fixture(scope="module")
def vae(tiny_checkpoint: Path) -> VAEEncoder:
    return load_vae_encoder(tiny_checkpoint, "cpu", torch.float32)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("foreign")
    clips = {
        f"clip {i}": {"mp4": clip(pictures(i, FRAMES + i)), "json": about(CAPTIONS[i])}
        for i in range(4)
    }
    images = {
        f"image{i}": {"jpeg": jpeg(pictures(9 + i, 1)[0]), "json": about(f"A picture, {i}.")}
        for i in range(2)
    }
    bad = {
        "alone": {"mp4": clips["clip 0"]["mp4"]},
        "mute": {"jpg": b"", "json": about(None)},
        "text": {"txt": b"x", "json": about("x")},
        "short": {"mp4": clip(pictures(5, 3)), "json": about("x")},
        "odd": {"mp4": clip(pictures(6, 9), "libx264", BT709), "json": about("x")},
        "broken": {"mp4": clips["clip 1"]["mp4"][:500], "json": about("x")},
        "cut": {"jpg": b"x", "json": b"{"},
        "\udcb0\udca1": {"jpg": jpeg(pictures(7, 1)[0]), "json": about("x")},
    }
    return [write_tar(folder / "one.tar", clips), write_tar(folder / "two.tar", bad | images)]


@pytest.fixture(scope="module")
def indexed(
    tars: list[Path], encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    write_index(tars, folder, encoder, num_frames=FRAMES)
    return folder


def feed(dataset: Path, vae: VAEEncoder, **changes: Any) -> Feed:
    return make_feed(
        dataset,
        global_batch=2,
        micro_batch=2,
        i2v_share=0.5,
        caption_dropout=0.0,
        condition="raw",
        vae=vae,
        **changes,
    )


def batches(dataset: Path, vae: VAEEncoder, num: int) -> list[Batch]:
    with feed(dataset, vae) as ready:
        taken = [next(ready)[0] for _ in range(num)]
        assert ready.damages == []
    return taken


def test_every_sample_is_used_or_refused_for_one_reason_and_the_tars_stay_as_they_are(
    tars: list[Path], encoder: TextEncoder, tmp_path: Path
) -> None:
    before = [tar.read_bytes() for tar in tars]
    manifest, refused = write_index(tars, tmp_path, encoder, num_frames=FRAMES)
    assert [tar.read_bytes() for tar in tars] == before
    assert {shard.bucket: shard.num_samples for shard in manifest.splits["train"]} == {
        "96x64x5": 4,
        "96x64x1": 2,
    }
    assert refused == {
        "no json": 1,
        'no text under "caption" in its json': 1,
        "neither mp4 nor jpg": 1,
        f"fewer than {FRAMES} frames": 1,
        "its mp4: media_truncated": 1,
        "its json can't be read": 1,
        "its name is not UTF-8": 1,
        "the colour matrix of its mp4 is not the one of its size (BT.709 if large, else BT.601)": 1,
    }
    assert isinstance(read_manifest(tmp_path), Manifest)
    with pytest.raises(ValueError, match="a dataset already"):
        write_index(tars, tmp_path, encoder, num_frames=FRAMES)


@needs_dali
def test_the_feed_gives_the_latents_of_the_clips_and_the_texts_of_the_captions(
    indexed: Path, tars: list[Path], vae: VAEEncoder, encoder: TextEncoder
) -> None:
    texts = encoder.encode(CAPTIONS, 16).texts
    seen = []
    for batch in batches(indexed, vae, 3):
        assert batch.condition_BC1HW is not None
        assert torch.equal(batch.condition_BC1HW, batch.latent_BCTHW[:, :, :1])
        if batch.bucket.num_frames == 1:
            continue
        for latent, text in zip(batch.latent_BCTHW, batch.text_BSD, strict=True):
            rows = text[: int(text.any(1).sum())].numpy()
            (i,) = (i for i in range(4) if np.array_equal(rows, texts[CAPTIONS[i]].rows))
            frames = (
                torch.from_numpy(np.stack(pictures(i, FRAMES))[:, 3:67, 2:98]).permute(3, 0, 1, 2)
                / 127.5
                - 1
            )
            expected = vae.encode(frames.unsqueeze(0))[0]
            assert (latent.float() - expected).norm() < 0.1 * expected.norm()  # motion JPEG's loss
            seen.append(i)
    assert sorted(seen) == [0, 1, 2, 3]


@needs_dali
def test_dali_reads_the_foreign_tar_with_our_index(indexed: Path, tars: list[Path]) -> None:
    from nvidia.dali import Pipeline, fn

    (info,) = (
        info for info in media_shards(read_manifest(indexed)).values() if info.num_samples == 4
    )
    tar = indexed / "train" / f"{info.name}.tar"
    assert tar.resolve() == tars[0].resolve()
    pipeline = Pipeline(batch_size=4, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(
            fn.readers.webdataset(
                paths=str(tar), index_paths=str(tar.with_suffix(".idx")), ext="mp4"
            )
        )
    pipeline.build()
    stored = {np.array(data).tobytes() for data in pipeline.run()[0]}
    assert stored == {clip(pictures(i, FRAMES + i)) for i in range(4)}


@needs_dali
def test_a_clip_that_changed_or_does_not_decode_is_replaced_and_reported(
    tars: list[Path], encoder: TextEncoder, vae: VAEEncoder, tmp_path: Path
) -> None:
    good = {
        f"clip {i}": {"mp4": clip(pictures(i, FRAMES)), "json": about(CAPTIONS[i])}
        for i in range(4)
    }
    # a fair clip, but there is no GPU
    good["clip 1"]["mp4"] = clip(pictures(1, FRAMES, 96, 64), "libx264")
    tar = write_tar(tmp_path / "foreign.tar", good)
    write_index([tar], tmp_path / "indexed", encoder, num_frames=FRAMES)
    data = bytearray(tar.read_bytes())
    data[dict(tar_samples(tar))["./some folder/clip 2"]["mp4"].offset + 700] ^= 1
    tar.write_bytes(data)
    runs = []
    for threads in (1, 3):
        with feed(tmp_path / "indexed", vae, num_threads=threads) as ready:
            runs.append([key for _ in range(8) for key in next(ready)[0].keys])
            reasons = sorted(damage.reason for damage in ready.damages)
    assert (
        len(reasons) == 2
        and "H.264 on a GPU only" in reasons[0]
        and "differ from the .xxh3" in reasons[1]
    )
    assert runs[0] == runs[1] and len(set(runs[0])) == 2
    with (
        feed(tmp_path / "indexed", vae, max_damaged=1) as ready,
        pytest.raises(TooManyDamagedError),
    ):
        for _ in range(4):
            next(ready)


def test_stored_latents_can_not_be_asked_of_it(indexed: Path) -> None:
    with pytest.raises(DatasetError, match=r'holds no latents; set data.condition = "raw"'):
        make_feed(
            indexed,
            global_batch=2,
            micro_batch=2,
            i2v_share=0.5,
            caption_dropout=0.0,
        )


def test_what_is_no_tar_or_repeats_is_refused_by_name(
    tars: list[Path], encoder: TextEncoder, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tars[0].read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.tar: not a plain, whole tar"):
        write_index([cut], tmp_path / "a", encoder, num_frames=FRAMES)
    endless = tarfile.TarInfo("a")
    endless.type, endless.size = tarfile.XHDTYPE, 1 << 80
    cut.write_bytes(endless.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match=r"cut\.tar: not a plain, whole tar"):
        write_index([cut], tmp_path / "a", encoder, num_frames=FRAMES)
    again = tmp_path / "zwei.tar"
    again.write_bytes(tars[0].read_bytes())
    with pytest.raises(
        ValueError, match=r"clip 0 in .*zwei.tar is the same sample as .*clip 0 in .*one.tar"
    ):
        write_index([tars[0], again], tmp_path / "b", encoder, num_frames=FRAMES)


def test_verify_checks_an_index_and_the_clips_it_links_to(
    tars: list[Path], encoder: TextEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def faults() -> list[str]:
        return list(verify_dataset(folder, 1, lambda count: None))

    folder, tar = tmp_path / "indexed", tmp_path / "one.tar"
    tar.write_bytes(tars[0].read_bytes())
    write_index([tar], folder, encoder, num_frames=FRAMES)
    assert faults() == []
    shard = folder / "train" / "train-96x64x5-000000.tar"
    key = decode_index(shard.with_suffix(".media.idx").read_bytes(), "")[0][0].name[:32]
    assert (
        shardgen(["inspect", str(shard), key]) == 0 and "text.zst: shape" in capsys.readouterr().out
    )

    whole = tar.read_bytes()
    member = dict(tar_samples(tar))["./some folder/clip 2"]["mp4"]
    tar.write_bytes(whole[: member.offset + 9] + b"?" + whole[member.offset + 10 :])
    assert any(".media.tar: xxh3_128 is" in fault for fault in faults())
    assert any(".mp4: its bytes don't match" in fault for fault in faults())
    tar.write_bytes(whole)
    index = shard.with_suffix(".media.idx")
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert any("are not those of the 4 samples" in fault for fault in faults())
    index.write_text("".join(lines))
    assert faults() == []
    tar.unlink()
    (fault,) = faults()
    assert "No such file" in fault and "index it again: tools.index" in fault
