"""The VAE encoder computes what diffusers' does, and its first latent frame depends on the first
frame alone.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from loader.vae.encoder import VAEEncoder, VAEError, load_vae_encoder
from tools.fake.vae import WAN21, WAN22, random_vae

KINDS = {"wan22": (WAN22, 16), "wan21": (WAN21, 12)}

Pair = tuple[AutoencoderKLWan, VAEEncoder]


def build(name: str, folder: Path) -> Pair:
    kind, base_dim = KINDS[name]
    reference = random_vae(kind, base_dim, torch.Generator().manual_seed(7))
    reference.eval().requires_grad_(False).save_pretrained(folder / "vae")
    return reference, load_vae_encoder(folder, "cpu", torch.float32)


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def reference_latent(reference: AutoencoderKLWan, video_BCTHW: torch.Tensor) -> torch.Tensor:
    mean_BCTHW = reference.encode(video_BCTHW).latent_dist.mode()
    mean, std = (
        torch.tensor(reference.config[name]).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return (mean_BCTHW - mean) / std


@pytest.mark.parametrize("shape", [(2, 3, 9, 64, 96), (1, 3, 21, 32, 64), (1, 3, 1, 64, 32)])
def test_encodes_as_diffusers_does(pair: Pair, shape: tuple[int, ...]) -> None:
    reference, encoder = pair
    video_BCTHW = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = reference_latent(reference, video_BCTHW)
    latent = encoder.encode(video_BCTHW)
    assert latent.shape == expected.shape
    assert (latent - expected).abs().max() < 1e-5
    assert expected.std() > 0.01  # there is something to compare


def test_first_latent_frame_is_bit_equal_to_the_encoding_of_frame_0(pair: Pair) -> None:
    _, encoder = pair
    video_BCTHW = torch.rand((1, 3, 13, 64, 96), generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert torch.equal(encoder.encode(video_BCTHW)[:, :, :1], encoder.encode(video_BCTHW[:, :, :1]))


def test_a_first_frame_with_grey_after_it_has_the_clips_latent_frame_0_and_diffusers_others(
    pair: Pair,
) -> None:
    """What I2V-A14B is given, bit for bit in float32."""
    reference, encoder = pair
    video_BCTHW = torch.rand((1, 3, 13, 32, 64), generator=torch.Generator().manual_seed(5)) * 2 - 1
    given = encoder.encode(video_BCTHW[:, :, :1], chunk_frames=8, num_grey_frames=12)
    assert torch.equal(given[:, :, 0], encoder.encode(video_BCTHW)[:, :, 0])
    video_BCTHW[:, :, 1:] = 0
    assert (given - reference_latent(reference, video_BCTHW)).abs().max() < 1e-5


@pytest.mark.parametrize("chunk_frames", [4, 8, 64])
def test_chunk_size_does_not_change_the_latent(pair: Pair, chunk_frames: int) -> None:
    _, encoder = pair
    video_BCTHW = torch.rand((1, 3, 25, 32, 64), generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert (
        encoder.encode(video_BCTHW, chunk_frames) - encoder.encode(video_BCTHW)
    ).abs().max() < 1e-5


def test_half_precision_stays_close(tmp_path: Path) -> None:
    build("wan22", tmp_path)
    video_BCTHW = torch.rand((1, 3, 5, 32, 64), generator=torch.Generator().manual_seed(4)) * 2 - 1
    exact = load_vae_encoder(tmp_path, "cpu", torch.float32).encode(video_BCTHW)
    half = load_vae_encoder(tmp_path, "cpu", torch.float16).encode(video_BCTHW)
    assert half.dtype == torch.float16
    assert (half.float() - exact).abs().max() < 1e-2


def test_names_what_it_can_not_encode(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(VAEError, match=r"64x32x8.*4n\+1"):
        pair[1].encode(torch.zeros(1, 3, 8, 32, 64))
    with pytest.raises(VAEError, match="vae"):
        load_vae_encoder(tmp_path, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_std": [1.0]}, "latents_std has 1 numbers, z_dim is 48"),
        ({"latents_mean": [0.0] * 16}, "latents_mean has 16 numbers, z_dim is 48"),
        ({"latents_std": [1.0] * 47 + [0.0]}, "latents_std holds a number that is not above 0"),
        ({"patch_size": None}, "in_channels is 12, which is not 3 colours"),
        ({"temperal_downsample": [True]}, "has 1 entries for the 4 stages of dim_mult"),
        ({"base_dim": 8}, r"of another shape \['encoder.conv_in.bias',"),
        ({"num_res_blocks": 1}, r"unknown \['encoder"),
    ],
)
def test_a_configuration_that_is_not_of_these_weights_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    build("wan22", tmp_path)
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(VAEError, match=message) as caught:
        load_vae_encoder(tmp_path, "cpu", torch.float32)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 1000, -10])
def test_a_download_that_was_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    build("wan22", tmp_path)
    (path,) = (tmp_path / "vae").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(VAEError, match=r"not the VAE of a Wan model.*; download the model again"):
        load_vae_encoder(tmp_path, "cpu", torch.float32)
