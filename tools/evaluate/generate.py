"""Clips of the base and of each candidate, and the real ones, by the trainer's model and loop.

Resumable: a clip that is there is not made again. Under torchrun each process makes its share.
Nothing of a candidate is kept before the proof that its LoRA is in effect: its tensors are finite
and not all zero, each of them is in the model, and its first latent is not the base's.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from loader.feed_config import FeedConfig
from loader.files import write_atomic
from loader.models import read_kind
from loader.mp4 import encode_mp4
from loader.sample import JPG, MP4
from loader.walk import Walk
from tools.applied import NotAppliedError
from tools.evaluate.clips import (
    BASE,
    CATEGORIES_FILE,
    REAL,
    REFERENCE_FILE,
    VARIANT_FILE,
    Clip,
    Frames,
    Kept,
    clips_of,
    latent_features,
    read_mp4,
    write_npy,
    write_variant,
)
from tools.evaluate.config import EvaluateConfig
from tools.evaluate.evaluation_set import EvaluationSet, Windows, choose_set, write_set
from tools.evaluate.inputs import adapters_in, check_inputs
from tools.evaluate.pictures import psnr_db
from tools.evaluate.result import Variant
from train.denoise import Decoder, Schedule, denoise
from train.lora import adapters as lora
from train.lora.config import parse_blocks
from train.lora.start import start_from
from train.model.attention import Attention, choose_attention
from train.model.identity import weights_xxh3
from train.model.load import load_transformer
from train.model.wan import Wan
from train.parallel.mesh import World, barrier


def generate(config: EvaluateConfig, world: World) -> EvaluationSet:
    """Make every clip of `config` that is missing. Raises ValueError, naming what can't be used,
    LoRAError for a LoRA of another model, NotAppliedError for one without effect.
    """
    num_tensors, not_compared = check_inputs(config)
    if world.is_main:
        for line in not_compared:
            print(line)
    data = FeedConfig(datasets=config.datasets)
    with Walk(data, "val", world.device) as walk:
        chosen = choose_set(walk, config)
        if world.is_main:
            config.folder.mkdir(parents=True, exist_ok=True)
            write_set(config.folder, chosen)
            for name in (REAL, BASE, *config.candidates):
                (config.folder / name).mkdir(exist_ok=True)
        barrier(world)
        decoder, windows = Decoder(Path(config.model), world.device), Windows(walk)
        _write_real(config, chosen, windows, decoder, world)
        for name in (BASE, *config.candidates):
            _write_variant(config, chosen, windows, decoder, world, name, num_tensors.get(name, 0))
            barrier(world)
    return chosen


def _write_real(
    config: EvaluateConfig, chosen: EvaluationSet, windows: Windows, decoder: Decoder, world: World
) -> None:
    """The real windows: their latents, and as pictures the shard's KEY.mp4 where it has one, else
    what the VAE makes of the latent; encoded like all other clips.
    """
    clips = list(clips_of(chosen, REAL))[world.data_rank :: world.data_size]
    for clip in _progress(_missing(config.folder, clips), REAL, world):
        latent_CThw = windows.batch(clip.prompt.key).latent_BCTHW[0].float()
        if clip.prompt.decoded:
            decoded = decoder.decode(latent_CThw)
            members = windows.members(clip.prompt.key, (MP4, JPG))
            frames, kept = real_frames(decoded, members)
            write_atomic(config.folder / clip.kept, msgspec.json.encode(kept))
            _save(config, clip, latent_CThw, frames)
        else:
            _save(config, clip, latent_CThw, None)
    if world.is_main:
        features_path, categories_path = (
            config.folder / name for name in (REFERENCE_FILE, CATEGORIES_FILE)
        )
        if not (features_path.exists() and categories_path.exists()):
            # one latent at a time: 2,048 of 1280x704x49 are 9 GiB
            features, categories = [], []
            for key in chosen.reference:
                array_CThw = windows.batch(key).latent_BCTHW[0].cpu().numpy()
                features.append(latent_features(array_CThw))
                categories.append(windows.category(key))
            same = [i for i, each in enumerate(features) if each.shape == features[0].shape]
            write_npy(features_path, np.stack([features[i] for i in same]))
            write_atomic(categories_path, msgspec.json.encode([categories[i] for i in same]))
        write_variant(config.folder, Variant(REAL))


def real_frames(decoded: Frames, members: dict[str, bytes]) -> tuple[Frames, Kept]:
    """The pictures of a real window, and how much of the shard's own frames (all of them, or the
    first one as JPEG) the VAE keeps.
    """
    if MP4 in members:
        frames = read_mp4(members[MP4], MP4)
        return frames, Kept(of="KEY.mp4", psnr_db=psnr_db(frames, decoded))
    if JPG in members:
        with Image.open(io.BytesIO(members[JPG])) as picture:
            first = np.asarray(picture.convert("RGB"))[None]
        return decoded, Kept(of="KEY.jpg, the first frame", psnr_db=psnr_db(first, decoded[:1]))
    return decoded, Kept(of="", psnr_db=None)


def _write_variant(
    config: EvaluateConfig,
    chosen: EvaluationSet,
    windows: Windows,
    decoder: Decoder,
    world: World,
    name: str,
    num_tensors: int,
) -> None:
    """The clips of the base or of one candidate."""
    path = Path(config.candidates[name]) if name != BASE else None
    lora_xxh3 = xxhash.xxh3_128_hexdigest(path.read_bytes()) if path else ""
    base_xxh3 = weights_xxh3(Path(config.model))
    record = config.folder / name / VARIANT_FILE
    if record.exists():
        old = msgspec.json.decode(record.read_bytes(), type=Variant)
        if old.lora_xxh3 != lora_xxh3:
            raise ValueError(
                f"{record}: its clips are of another LoRA than {path}; give the candidate another "
                f"name, or delete {record.parent}"
            )
        # older versions wrote none
        if old.base_xxh3 not in ("", base_xxh3):
            raise ValueError(
                f"{record}: its clips are of another base model than {config.model}; choose "
                f"another output, or delete {config.folder}"
            )
    clips = list(clips_of(chosen, name))[world.data_rank :: world.data_size]
    missing = _missing(config.folder, clips)
    if not missing and record.exists():
        return
    dtype = getattr(torch, config.sampling.dtype)
    model = load_transformer(Path(config.model), world.device, dtype)
    model.eval()
    attach_file(model, path, num_tensors)
    # chosen without timing, so that a clip's kernel does not depend on the day
    attention = choose_attention("auto", world.device, dtype, deterministic=True).attention
    difference = None
    if path is not None:
        difference = _prove(config, chosen, windows, model, attention, path)
    if world.is_main:
        found = Variant(name, path.name if path else "", lora_xxh3, difference, base_xxh3)
        write_variant(config.folder, found)
    for clip in _progress(missing, name, world):
        latent_CThw = _denoised(chosen, windows, model, attention, clip)
        frames = decoder.decode(latent_CThw) if clip.prompt.decoded else None
        _save(config, clip, latent_CThw, frames)


def attach_file(model: Wan, path: Path | None, num_tensors: int) -> None:
    """Put the adapters of a LoRA file, in any keys, on `model`. Raises LoRAError for a file of
    another model, NotAppliedError unless all of its `num_tensors` tensors have their place.
    """
    if path is None:
        return
    num_layers = model.config.num_layers
    config = adapters_in(path, num_layers)
    adapters = lora.attach(
        model,
        targets=config.targets,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        seed=0,
        blocks=parse_blocks(config.blocks, num_layers),
    )
    start_from(adapters, path)
    if 2 * len(adapters.tensors()) != num_tensors:
        raise NotAppliedError(
            f"{path}: has {num_tensors} LoRA tensors, {2 * len(adapters.tensors())} are in the "
            f"model"
        )


def _prove(
    config: EvaluateConfig,
    chosen: EvaluationSet,
    windows: Windows,
    model: Wan,
    attention: Attention,
    path: Path,
) -> float:
    """The root mean square difference of the first latent from the base's, which is there."""
    first = next(clips_of(chosen, BASE))
    base_CThw = torch.from_numpy(np.load(config.folder / first.latent)).float()
    ours_CThw = _denoised(chosen, windows, model, attention, first).cpu()
    difference = float((ours_CThw - base_CThw).square().mean().sqrt())
    if difference < 1e-3:  # base latents are kept in float16
        raise NotAppliedError(
            f"{path}: all tensors are in the model, but its first latent differs from the base's "
            f"by {difference:.1e} only: it has no effect"
        )
    return difference


def _denoised(
    chosen: EvaluationSet,
    windows: Windows,
    model: Wan,
    attention: Attention,
    clip: Clip,
) -> Tensor:
    batch = windows.batch(clip.prompt.key)
    empty = windows.batch(clip.prompt.key, drop_caption=True)
    generator = torch.Generator().manual_seed(chosen.noise_seed(clip.prompt, clip.seed))
    noise_CThw = torch.randn(batch.latent_BCTHW.shape[1:], generator=generator)
    return denoise(
        model,
        attention,
        text_SD=batch.text_BSD[0],
        empty_SD=empty.text_BSD[0],
        noise_CThw=noise_CThw.to(batch.latent_BCTHW.device),
        schedule=Schedule(chosen.num_steps, chosen.shift_of(clip.prompt), chosen.guidance),
    )


def _save(config: EvaluateConfig, clip: Clip, latent_CThw: Tensor, frames: Frames | None) -> None:
    """The latent last: it stands for the whole clip. Raises ValueError for NaN."""
    if not bool(torch.isfinite(latent_CThw).all()):
        raise ValueError(
            f"{clip.stem}: its latent holds NaN or infinity: in float16 activations may overflow; "
            f'try sampling.dtype = "bfloat16" or "float32"'
        )
    if frames is not None:
        fps = read_kind(Path(config.model)).fps
        write_atomic(config.folder / clip.mp4, encode_mp4(frames, fps))
    write_npy(config.folder / clip.latent, latent_CThw.half().cpu().numpy())


def _missing(folder: Path, clips: Sequence[Clip]) -> list[Clip]:
    return [clip for clip in clips if not (folder / clip.latent).exists()]


def _progress(clips: list[Clip], name: str, world: World) -> Any:
    return tqdm(clips, desc=f"generate {name}", unit="clip", disable=not world.is_main)
