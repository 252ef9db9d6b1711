"""The fused path through the encoder computes what its layers compute one by one, and hands every
convolution what the tensor cores take.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loader.vae.blocks import Encoder, Past
from loader.vae.encoder import load_vae_encoder, patchify
from loader.vae.fused import encode_chunk
from tools.fake.randomise import randomise
from tools.fake.vae import WAN21, WAN22, random_vae

CHUNKS = [(0, 1), (1, 9), (9, 13), (13, 21)]
PATCH_SIZE = {"wan22": 2, "wan21": 1}
KINDS = {"wan22": WAN22, "wan21": WAN21}


@pytest.fixture(scope="module", params=sorted(PATCH_SIZE))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def encoder_of(kind: str) -> Encoder:
    """Of other widths than the real ones, so that shortcuts average groups of several sizes."""
    encoder = Encoder(
        in_channels=3 * PATCH_SIZE[kind] ** 2,
        dim=12,
        z_dim=4,
        dim_mult=(1, 1, 2, 2),
        num_blocks=2,
        in_time=(False, True, True),
        is_residual=kind == "wan22",
    ).requires_grad_(False)
    randomise(encoder, torch.Generator().manual_seed(1))
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
    return encoder


def pixels(kind: str, batch: int, frames: int) -> Tensor:
    size = 16 * PATCH_SIZE[kind]
    generator = torch.Generator().manual_seed(2)
    return torch.rand((batch, 3, frames, size, 2 * size), generator=generator) * 2 - 1


def by_layers(encoder: Encoder, kind: str, video_BCTHW: Tensor) -> Tensor:
    past: Past = {}
    parts = []
    for start, end in CHUNKS:
        x_BCTHW = patchify(video_BCTHW[:, :, start:end], PATCH_SIZE[kind])
        parts.append(encoder(x_BCTHW.contiguous(memory_format=torch.channels_last_3d), past))
    return torch.cat(parts, 2)


def fused(encoder: Encoder, kind: str, video_BCTHW: Tensor) -> Tensor:
    past: Past = {}
    parts = []
    for start, end in CHUNKS:
        x_BCTHW = video_BCTHW[:, :, start:end]
        is_last = end == video_BCTHW.shape[2]
        parts.append(encode_chunk(encoder, x_BCTHW, PATCH_SIZE[kind], past, is_last))
    return torch.cat(parts, 2)


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_encoder_agrees_with_its_layers(kind: str, batch: int) -> None:
    encoder, video_BCTHW = encoder_of(kind), pixels(kind, batch, frames=21)
    expected = by_layers(encoder, kind, video_BCTHW)
    result = fused(encoder, kind, video_BCTHW)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_images_are_encoded_in_a_batch_and_nothing_is_stored(kind: str) -> None:
    encoder, video_BCTHW = encoder_of(kind), pixels(kind, batch=3, frames=1)
    past: Past = {}
    result = encode_chunk(encoder, video_BCTHW, PATCH_SIZE[kind], past, is_last=True)
    expected = encoder(patchify(video_BCTHW, PATCH_SIZE[kind]), {})
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not past


@torch.inference_mode()
def test_the_next_chunk_is_given_no_more_than_the_frames_that_it_needs(kind: str) -> None:
    encoder, video_BCTHW = encoder_of(kind), pixels(kind, batch=1, frames=9)
    past: Past = {}
    encode_chunk(encoder, video_BCTHW[:, :, :1], PATCH_SIZE[kind], past, is_last=False)
    encode_chunk(encoder, video_BCTHW[:, :, 1:], PATCH_SIZE[kind], past, is_last=False)
    for conv, stored_BPHWC in past.items():
        assert isinstance(conv, torch.nn.Conv3d)
        assert stored_BPHWC.shape[1] == conv.kernel_size[0] - conv.stride[0]
        assert stored_BPHWC.untyped_storage().nbytes() == stored_BPHWC.nbytes


@torch.inference_mode()
def test_every_convolution_gets_input_and_weight_with_channels_last(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise torch with cuDNN 9.8 to 9.14 drops cuDNN for a 3-D convolution in half
    precision, and falls back to a slow one that takes many times the memory. And in multiples of 8
    channels, as tensor cores take them in half precision.
    """
    generator = torch.Generator().manual_seed(1)
    random_vae(KINDS[kind], 16, generator).save_pretrained(tmp_path / "vae")
    vae = load_vae_encoder(tmp_path, "cpu", torch.float32)

    def as_on_a_gpu(pixels_BCTHW: Tensor, past: Past, is_last: bool) -> Tensor:
        return encode_chunk(vae.encoder, pixels_BCTHW, vae.patch_size, past, is_last)

    monkeypatch.setattr(vae, "_encode_chunk", as_on_a_gpu)
    formats = {"conv2d": torch.channels_last, "conv3d": torch.channels_last_3d}
    seen: dict[str, set[tuple[int, ...]]] = {"conv2d": set(), "conv3d": set()}

    def checked(name: str, convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, *options: Any, **named: Any) -> Tensor:
            seen[name].add(tuple(weight.shape))
            for tensor in (x, weight):
                assert tensor.is_contiguous(memory_format=formats[name])
            assert weight.shape[1] % 8 == 0
            return convolution(x, weight, *options, **named)

        return call

    for name in formats:
        monkeypatch.setattr(F, name, checked(name, getattr(F, name)))
    vae.encode(pixels(kind, batch=2, frames=21), chunk_frames=8)
    # with the last one of all, which the encoder's own layers do not have
    z = vae.z_dim
    assert (z, 2 * z, 1, 1, 1) in seen["conv3d"]
    assert {shape[2:] for shape in seen["conv3d"]} == {(3, 3, 3), (3, 1, 1), (1, 1, 1)}
    assert len(seen["conv2d"]) > 3 and len(seen["conv3d"]) > 7
