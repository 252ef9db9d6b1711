"""encode.py: a shard is a function of its plan; what a medium can't give is left out by name,
never by chance.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_jobs import BUCKET, job_for, spec_for, window

from loader.files import file_xxh3
from loader.manifest import decode_index
from loader.mp4 import encode_mp4
from loader.sample import (
    EMPTY_PROMPT_FILE,
    SampleMeta,
    TensorInfo,
    decode_meta,
    decode_tensor,
)
from loader.shape import WAN22, Bucket
from loader.vae.encoder import load_vae_encoder
from shardgen.catalog.rows import LostWindow
from shardgen.encode import shard
from shardgen.encode.decoding import EncodeError
from shardgen.encode.encoders import Encoders, load_encoders
from shardgen.encode.shard import encode_shard
from shardgen.encode.unit import EncodeSpec
from shardgen.encode.worker import encode_unit
from shardgen.media.decode import decode_window


@pytest.fixture
def clips(tmp_path: Path) -> dict[str, str]:
    """Three clips of 24 frames: xxh3 -> path."""
    media = {}
    for seed in range(3):
        noise = (
            np.random.default_rng(seed)
            .integers(0, 255, (24, 4, 6, 3), np.uint8)
            .repeat(16, 1)
            .repeat(16, 2)
        )
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(encode_mp4(noise, 24.0))
        media[file_xxh3(path)] = str(path)
    return media


def read_shard(folder: Path, name: str) -> dict[str, tuple[SampleMeta, dict[str, bytes]]]:
    data = (folder / f"{name}.tar").read_bytes()
    samples = {}
    for members in decode_index((folder / f"{name}.idx").read_bytes(), name):
        stored = {m.name.partition(".")[2]: data[m.offset : m.offset + m.size] for m in members}
        meta = decode_meta(stored["json"])
        samples[meta.key] = (meta, stored)
    return samples


def test_samples_hold_what_the_format_says(
    tiny_checkpoint: Path, tmp_path: Path, clips: dict[str, str]
) -> None:
    spec = spec_for(tiny_checkpoint, tmp_path / "out", mp4=True)
    windows = [window(xxh3, f"{i}00", start) for i, xxh3 in enumerate(clips) for start in (0, 500)]
    result = encode_shard(job_for(windows, clips), spec)
    assert result.info is not None and result.info.num_samples == 6 and not result.lost
    samples = read_shard(tmp_path / "out" / "train", result.name)
    assert list(samples) == sorted(samples)
    vae = load_vae_encoder(tiny_checkpoint, "cpu", torch.float32)
    for planned in windows:
        meta, stored = samples[planned.key]
        assert (meta.prompt, meta.start_ms, meta.label) == (
            planned.prompt,
            planned.start_ms,
            planned.label,
        )
        assert list(stored) == ["json", "latent.zst", "text.zst", "jpg", "mp4"]
        latent = decode_tensor(stored["latent.zst"], meta.latent)
        assert latent.shape == WAN22.latent_shape(BUCKET)
        first = decode_window(
            Path(clips[planned.media_xxh3]), planned.start_ms, 24.0, Bucket(96, 64, 1)
        )
        pixels_BCTHW = torch.from_numpy(first).movedim(-1, 0).unsqueeze(0).float() / 127.5 - 1
        expected = vae.encode(pixels_BCTHW)[0].numpy()
        assert np.abs(latent[:, :1] - expected).max() < 2e-3 * np.abs(expected).max()
        assert decode_tensor(stored["text.zst"], meta.text).shape[1] == 32


def test_bytes_follow_the_plan_alone(
    tiny_checkpoint: Path, tmp_path: Path, clips: dict[str, str]
) -> None:
    windows = [
        window(xxh3, f"{i}00", start) for i, xxh3 in enumerate(clips) for start in (0, 250, 500)
    ]
    infos = []
    for run, threads in enumerate((1, 3)):
        spec = spec_for(tiny_checkpoint, tmp_path / f"out{run}")
        if run:  # another shard before it, as after a resume
            encode_shard(job_for(windows[:2], clips, number=7), spec)
        infos.append(encode_shard(job_for(windows, clips), spec, decode_threads=threads).info)
    assert infos[0] == infos[1]


def test_the_time_on_a_shard_is_without_the_start_of_the_models(
    tiny_checkpoint: Path,
    tmp_path: Path,
    clips: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the first shard of every worker counts the reading of gigabytes as an idle device."""

    def slow_start(spec: EncodeSpec) -> Encoders:
        time.sleep(0.5)
        return load_encoders(spec)

    monkeypatch.setattr(shard, "load_encoders", slow_start)
    windows = [window(next(iter(clips)), "100", 0)]
    begin_s = time.perf_counter()
    times = encode_shard(job_for(windows, clips), spec_for(tiny_checkpoint, tmp_path)).times
    assert times.wall_s <= time.perf_counter() - begin_s - 0.5
    assert 0 < times.vae_s + times.text_s < times.wall_s


def test_a_window_that_its_medium_cannot_give_is_left_out_by_name(
    tiny_checkpoint: Path, tmp_path: Path, clips: dict[str, str]
) -> None:
    spec = spec_for(tiny_checkpoint, tmp_path / "out")
    good, bad = window(next(iter(clips)), "100", 0), window(next(iter(clips)), "100", 900)
    result = encode_shard(job_for([good, bad], clips), spec)
    assert [lost.key for lost in result.lost] == [bad.key] and result.lost[
        0
    ].reason == "media_truncated"
    assert list(read_shard(tmp_path / "out" / "train", result.name)) == [good.key]
    nothing = encode_shard(job_for([bad], clips, number=1), spec)
    assert nothing.info is None and isinstance(nothing.lost[0], LostWindow)


def test_a_medium_that_changed_or_is_gone_is_an_error_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, clips: dict[str, str]
) -> None:
    spec = spec_for(tiny_checkpoint, tmp_path / "out")
    xxh3, path = next(iter(clips.items()))
    job = job_for([window(xxh3, "100", 0)], clips)
    Path(path).write_bytes(Path(path).read_bytes() + b"x")
    with pytest.raises(EncodeError, match="has changed since it was planned"):
        encode_shard(job, spec)
    Path(path).unlink()
    with pytest.raises(EncodeError, match="can't be read"):
        encode_shard(job, spec)
    assert not (tmp_path / "out").exists()


def test_an_image_is_one_frame_without_a_jpg_unless_asked(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save(path)
    bucket = Bucket(96, 64, 1)
    job = job_for(
        [window(file_xxh3(path), "100", 0, bucket, "image")], {file_xxh3(path): str(path)}
    )
    for wanted in (False, True):
        spec = spec_for(tiny_checkpoint, tmp_path / str(wanted), jpg_for_images=wanted, mp4=True)
        result = encode_shard(job, spec)
        ((meta, stored),) = read_shard(tmp_path / str(wanted) / "train", result.name).values()
        assert meta.num_frames == 1 and meta.latent.shape == WAN22.latent_shape(bucket)
        assert ("jpg" in stored) == wanted and "mp4" not in stored


def test_the_empty_prompt_is_one_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert encode_unit(None, spec=spec_for(tiny_checkpoint, tmp_path)) is None
    # `</s>` alone
    rows = decode_tensor(
        (tmp_path / EMPTY_PROMPT_FILE).read_bytes(), TensorInfo("float16", (1, 32))
    )
    assert np.abs(rows).max() > 0
