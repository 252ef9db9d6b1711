"""The self-check finds an encoder that is wrong, and an overflow in half precision is given the
name of the layer that needs float32.
"""

import copy
from pathlib import Path

import pytest
import torch

from loader.vae.check import TOLERANCE, deviation_from_float32, overflowing_layer
from loader.vae.encoder import VAEEncoder, load_vae_encoder


@pytest.fixture
def exact(tiny_checkpoint: Path) -> VAEEncoder:
    return load_vae_encoder(tiny_checkpoint, "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_passes_the_check_and_a_wrong_convolution_does_not(
    exact: VAEEncoder, dtype: torch.dtype
) -> None:
    half = copy.deepcopy(exact).to(dtype)
    assert deviation_from_float32(half, exact) < TOLERANCE[dtype]
    # as a convolution over time that takes its taps in the wrong order would
    time_conv = half.get_submodule("encoder.down_blocks.1.downsampler.time_conv")
    assert isinstance(time_conv, torch.nn.Conv3d)
    time_conv.weight.data = time_conv.weight.flip(2)
    assert not deviation_from_float32(half, exact) < TOLERANCE[dtype]


def test_a_result_that_is_not_finite_does_not_pass(exact: VAEEncoder) -> None:
    broken = copy.deepcopy(exact)
    broken.encoder.conv_out.weight.data[0] = torch.nan
    assert not deviation_from_float32(broken, exact) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("scaled", "named"),
    [
        # a convolution's own output
        ("encoder.down_blocks.1.resnets.0.conv2", "encoder.down_blocks.1.resnets.0.conv2"),
        # the stream from conv_in on grows from sum to sum, until a stage's does
        ("encoder.conv_in", "encoder.down_blocks.3"),
    ],
)
def test_scaled_up_activations_overflow_in_the_layer_that_is_named(
    exact: VAEEncoder, scaled: str, named: str
) -> None:
    """Norms hide the size of a stream from the convolutions behind them, so float32 and bfloat16
    encode what float16 can't: the layer that is named is the one that needs float32.
    """
    video_BCTHW = torch.rand((1, 3, 5, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    conv = exact.get_submodule(scaled)
    assert isinstance(conv, torch.nn.Conv3d)
    conv.weight.data *= 3e4
    conv.get_parameter("bias").data *= 3e4
    # the scaled weights themselves stay in range: it is the activations that don't
    assert conv.weight.abs().max() < torch.finfo(torch.float16).max
    assert overflowing_layer(exact, video_BCTHW) is None
    assert overflowing_layer(copy.deepcopy(exact).bfloat16(), video_BCTHW) is None
    assert overflowing_layer(copy.deepcopy(exact).half(), video_BCTHW) == named
