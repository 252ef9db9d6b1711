"""The configuration of encoding: the models and number formats, which decide bytes, and who runs
the shards, which decides only how fast they come.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]
# Which encoder writes the latents on a GPU: 2 is loader/vae/fused.py. Recipes that name none were
# encoded layer by layer, as a CPU still does.
CUDA_ENCODER, LAYER_ENCODER = 2, 1


class EncodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The models and number formats that decide a shard's bytes."""

    model: str  # folder of a Wan model in diffusers layout
    # what a sample holds beside its latent: "first_frame_and_grey" for I2V-A14B, which takes the
    # latent of the first frame with grey frames after it; empty for all others
    condition: Literal["", "first_frame_and_grey"] = ""
    # with several GPUs the executor starts one process for each
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    threads: PositiveInt = 1  # torch threads per process: part of what decides the bytes
    text_batch: PositiveInt = 8
    # windows at a time on a CPU; on a GPU the budget below decides, with the window's shape
    vae_batch: PositiveInt = 1
    vae_memory_gib: Annotated[float, Meta(gt=0)] = 16.0
    zstd_level: Annotated[int, Meta(ge=1, le=22)] = 3
    jpg_quality: Annotated[int, Meta(ge=1, le=100)] = 95
    jpg_for_images: bool = False
    mp4: bool = False
    mp4_encoder: Literal["auto", "libx264", "h264_nvenc"] = "auto"


def encode_recipe(encode: EncodeConfig) -> dict[str, Any]:
    """What of the configuration decides bytes, as plain JSON types: on a GPU other things do than
    on a CPU. Where the model lies decides nothing.
    """
    plain: dict[str, Any] = msgspec.to_builtins(encode)
    del plain["model"]
    if not encode.condition:
        # recipes are older than this key
        del plain["condition"]
    if encode.device == "cuda":
        del plain["vae_batch"]
        return plain | {"encoder": CUDA_ENCODER}
    del plain["vae_memory_gib"]
    return plain


def encoded_by(recipe: dict[str, Any]) -> str:
    """What made the latents of a dataset, from the recipe in its manifest; empty for an index of
    foreign tars, which has none.
    """
    encode = recipe.get("encode")
    if not encode:
        return ""
    version = encode.get("encoder", LAYER_ENCODER)
    how = "layer by layer" if version == LAYER_ENCODER else "fused"
    return f"VAE encoder {version} ({how}), {encode['device']}, {encode['dtype']}"


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who runs the shards."""

    kind: Literal["local", "ray"] = "local"
    workers: PositiveInt = 1
    decode_threads: PositiveInt = 2  # clips decoded ahead of the encoder, per worker
    address: str = ""  # of a Ray cluster; empty: start one here
