"""The folder of an evaluation, and what one clip in it is.

set.json
VARIANT/variant.json                 which LoRA, proven how
VARIANT/ID-SEED.latent.npy           float16 [C, T, h, w], normalised; of "real", seed 0 alone
VARIANT/ID-SEED.mp4                  of prompts that are decoded
reference.features.npy               float32 [N, D], features of other real windows' latents
reference.categories.json            the category of each
scores/                              what was measured of them
result.json                          what is said of it
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import msgspec
import numpy as np
import torch

from loader.files import write_atomic
from tools.evaluate.evaluation_set import EvaluationSet, Prompt
from tools.evaluate.frechet import Features
from tools.evaluate.result import Variant

REAL, BASE = "real", "base"
VARIANT_FILE, SCORES = "variant.json", "scores"
REFERENCE_FILE, CATEGORIES_FILE = "reference.features.npy", "reference.categories.json"
Frames = np.ndarray[Any, Any]  # uint8 RGB [F, H, W, 3]


class Clip(NamedTuple):
    """One clip of a variant: of which prompt, with which of the set's seeds."""

    variant: str
    prompt: Prompt
    seed: int

    @property
    def stem(self) -> str:
        return f"{self.variant}/{self.prompt.id}-{self.seed}"

    @property
    def mp4(self) -> str:
        return f"{self.stem}.mp4"

    @property
    def kept(self) -> str:
        """Of a real clip: what the VAE keeps of it."""
        return f"{self.stem}.kept.json"

    @property
    def latent(self) -> str:
        return f"{self.stem}.latent.npy"


class Kept(msgspec.Struct, frozen=True):
    """PSNR of the VAE's pictures against the shard's own; `of`: which of its members."""

    of: str
    psnr_db: float | None


def clips_of(chosen: EvaluationSet, variant: str) -> Iterator[Clip]:
    """In the order of prompts and seeds; of a real clip there is one."""
    num_seeds = 1 if variant == REAL else chosen.num_seeds
    for prompt in chosen.prompts:
        for seed in range(num_seeds):
            yield Clip(variant, prompt, seed)


def latent_features(latent_CThw: np.ndarray[Any, Any]) -> Features:
    """A latent as a vector: its means over a grid of at most 3 x 6 x 10 cells a channel."""
    num_frames, rows, columns = latent_CThw.shape[1:]
    pooled = torch.nn.functional.adaptive_avg_pool3d(
        torch.from_numpy(latent_CThw.astype(np.float32)),
        (min(num_frames, 3), min(rows, 6), min(columns, 10)),
    )
    return np.asarray(pooled.flatten().numpy())


def write_npy(path: Path, array: np.ndarray[Any, Any]) -> None:
    data = io.BytesIO()
    np.save(data, array)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data.getvalue())


def read_mp4(data: bytes, name: str) -> Frames:
    """All frames of a clip. Raises ValueError, naming it, if it can't be decoded."""
    try:
        with av.open(io.BytesIO(data)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise ValueError(f"{name}: can't be decoded ({error}); delete it, and generate") from error
    return np.stack(frames)


def write_variant(folder: Path, variant: Variant) -> None:
    text = msgspec.json.format(msgspec.json.encode(variant), indent=1)
    path = folder / variant.name / VARIANT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text + b"\n")


def read_variants(folder: Path, names: list[str]) -> list[Variant]:
    """Those of `names`. Raises ValueError for one that was not generated."""
    found = []
    for name in names:
        try:
            data = (folder / name / VARIANT_FILE).read_bytes()
        except OSError as error:
            raise ValueError(
                f"{folder / name}: has no {VARIANT_FILE}; run tools.evaluate generate"
            ) from error
        found.append(msgspec.json.decode(data, type=Variant))
    return found


def read_reference(folder: Path) -> tuple[Features, list[str]]:
    """Features [N, D] of the real windows that distances are taken to, and their categories.
    Raises ValueError where they were not generated.
    """
    try:
        features_ND = np.load(folder / REFERENCE_FILE)
        data = (folder / CATEGORIES_FILE).read_bytes()
    except OSError as error:
        raise ValueError(f"{error.filename}: is missing; run tools.evaluate generate") from error
    return features_ND, msgspec.json.decode(data, type=list[str])
