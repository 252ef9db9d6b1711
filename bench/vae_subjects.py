"""What bench.encode compares: encoders with random weights of the real size, ours and
diffusers', and the convolutions alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from loader.vae import fused
from loader.vae.blocks import Past
from loader.vae.encoder import VAEEncoder
from tools.fake.vae import WAN21, WAN22, random_vae

KINDS = {"wan22": (WAN22, 160), "wan21": (WAN21, 96)}


def write_model(folder: Path, kind: str, base_dim: int | None = None) -> None:
    """A VAE with random weights, and a decoder that nobody runs."""
    config, real_dim = KINDS[kind]
    vae = random_vae(config, base_dim or real_dim, torch.Generator().manual_seed(1))
    vae.save_pretrained(folder / "vae")


def load_diffusers(folder: Path, device: str, dtype: torch.dtype) -> AutoencoderKLWan:
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=dtype, local_files_only=True)
    del vae.decoder
    return vae.to(device).eval().requires_grad_(False)


def diffusers_latent(vae: AutoencoderKLWan, video_BCTHW: Tensor) -> Tensor:
    """The normalised mean in float32, as ours is."""
    mean_BCTHW = vae.encode(video_BCTHW.to(vae.dtype)).latent_dist.mode().float()
    mean, std = (
        torch.tensor(vae.config[name], device=video_BCTHW.device).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return (mean_BCTHW - mean) / std


def encode_by_layers(vae: VAEEncoder, video_BCTHW: Tensor, chunk_frames: int = 16) -> Tensor:
    """Our layers one by one (loader/vae/blocks.py): what ran on GPUs before they were fused."""
    past: Past = {}
    frames, parts = video_BCTHW.shape[2], []
    for start in (0, *range(1, frames, chunk_frames)):
        end = min(start + chunk_frames, frames) if start else 1
        parts.append(vae.encode_by_layers(video_BCTHW[:, :, start:end], past))
    return torch.cat(parts, 2)


class Convolution(NamedTuple):
    """One call: a function of torch.nn.functional and what it was given, but for values."""

    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    weight: Tensor
    options: dict[str, Any]


@contextmanager
def recorded_convolutions(calls: list[Convolution]) -> Iterator[None]:
    """Append every convolution of our fused encoder to `calls`, 1x1 shortcuts included."""

    def recorder(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: Any = 1,
            padding: Any = 0,
            *rest: Any,
        ) -> Tensor:
            options = {"stride": stride, "padding": padding}
            calls.append(Convolution(function, tuple(x.shape), weight, options))
            return function(x, weight, bias, stride, padding, *rest)

        return call

    shortcut = fused._linear

    def record_shortcut(stream: Any, conv: Any) -> Any:
        weight_OC = conv.weight.flatten(1)
        calls.append(Convolution(F.linear, tuple(stream.x_BTHWC.shape), weight_OC, {}))
        return shortcut(stream, conv)

    with (
        patch.object(F, "conv2d", recorder(F.conv2d)),
        patch.object(F, "conv3d", recorder(F.conv3d)),
        patch.object(fused, "_linear", record_shortcut),
    ):
        yield


def convolutions_alone(calls: list[Convolution], device: str) -> Callable[[], None]:
    """A program that runs the same convolutions without biases on random inputs, and nothing
    else.
    """
    inputs: dict[tuple[int, ...], Tensor] = {}
    for call in calls:
        if call.shape not in inputs:
            x = torch.randn(call.shape, device=device, dtype=call.weight.dtype)
            if call.function is F.conv3d:
                x = x.contiguous(memory_format=torch.channels_last_3d)
            elif call.function is F.conv2d:
                x = x.contiguous(memory_format=torch.channels_last)
            inputs[call.shape] = x

    def run() -> None:
        for call in calls:
            call.function(inputs[call.shape], call.weight, **call.options)

    return run


def num_operations(calls: list[Convolution]) -> float:
    """Floating-point operations of the convolutions, a multiplication and an addition each."""
    total = 0.0
    for call in calls:
        with torch.device("meta"):
            x, weight = torch.empty(call.shape), torch.empty(call.weight.shape)
            total += 2.0 * call.function(x, weight, **call.options).numel() * weight[0].numel()
    return total
