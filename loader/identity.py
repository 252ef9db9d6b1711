"""Is a dataset of this model? What the manifest says of the models that made it, compared with
those that are to be trained; torch-free.

A latent of another VAE, or of another frame rate, trains without an error and teaches nonsense.
So a trainer compares before it starts, and where it can't, it says so.
"""

from collections.abc import Callable
from pathlib import Path

import xxhash
from msgspec import UNSET

from loader.files import file_xxh3
from loader.manifest import DatasetError, Manifest
from loader.models import ModelKind
from loader.shape import Bucket, LatentLayout


def folder_xxh3(folder: Path, hash_file: Callable[[Path], str] = file_xxh3) -> str:
    """xxh3_128 hex over the names and contents of all files below `folder`; "" if it has none.

    This is what `recipe.models` holds for each part of a model. Raises OSError.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        return ""
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(f"{path.relative_to(folder)} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def check_identity(name: str, manifest: Manifest, *, model: ModelKind, vae_xxh3: str) -> list[str]:
    """Compare the dataset `name` with a model: layout, frame rate, condition; and with its VAE.

    `vae_xxh3` is `folder_xxh3` of the VAE's folder, "" where there is none. Returns a line for
    each of frame rate and VAE that could not be compared, to be logged. Raises DatasetError for
    a difference.
    """
    layout, fps = model.layout, model.fps
    if manifest.layout != layout:
        raise DatasetError(
            f"{name}: its latents have {_layout_text(manifest.layout)}, those of {model.name} "
            f"{_layout_text(layout)}; train the model that it was built for, or build it anew"
        )
    condition = "" if manifest.condition is UNSET else manifest.condition
    # samples that hold more than a text-to-video model takes are as good for it
    if model.condition and condition != model.condition:
        raise DatasetError(
            f"{name}: its samples hold {condition or 'no condition'}, and {model.name} learns from "
            f'{model.condition}; build it with encode.condition = "{model.condition}"'
        )
    if model.condition:
        _refuse_images(name, manifest, model)
    not_compared = []
    built_fps = manifest.recipe.get("windows", {}).get("fps")
    if built_fps is None:
        not_compared.append(f"{name}: its frame rate was not compared: its recipe names none")
    elif built_fps != fps:
        raise DatasetError(
            f"{name}: its clips have {built_fps:g} frames a second, {model.name} takes {fps:g}; "
            f"build it anew with windows.fps = {fps:g}"
        )
    built_vae = manifest.recipe.get("models", {}).get("vae", "")
    if not built_vae or not vae_xxh3:
        missing = "this model folder has no vae" if built_vae else "its recipe names none"
        not_compared.append(f"{name}: its VAE was not compared with the model's: {missing}")
    elif built_vae != vae_xxh3:
        raise DatasetError(
            f"{name}: its latents are of another VAE: the files of vae/ had xxh3 {built_vae}, the "
            f"model's have {vae_xxh3}; copy the folder that it was built with, or build it anew"
        )
    return not_compared


def _refuse_images(name: str, manifest: Manifest, model: ModelKind) -> None:
    """An image has no frame to predict from its first one."""
    for shards in manifest.splits.values():
        for shard in shards:
            if Bucket.parse(shard.bucket).num_frames == 1:
                raise DatasetError(
                    f"{name}: shard {shard.name} holds images, and {model.name} learns from video "
                    f"alone; build it without a shape of one frame in windows.buckets"
                )


def _layout_text(layout: LatentLayout) -> str:
    return (
        f"{layout.channels} channels, strides of {layout.stride_t} frames and {layout.stride_px} "
        f"pixels and patches of {layout.patch_px}"
    )
