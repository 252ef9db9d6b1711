"""The fused LoRA linear against its reference implementation."""

import pytest
import torch
from torch import Tensor

from train.kernels.dropout import Dropout, dropout_keys
from train.kernels.layout import has_padding
from train.kernels.pointwise import gelu_tanh
from train.lora.adapters import LoRAProjections
from train.lora.linear import FusedLayers, LoRALinear, lora_linear_eager
from train.lora.nf4 import NF4Weight
from train.model.wan import Projections

LAYERS = {"attn1.to_q": 24, "attn1.to_k": 24, "attn1.to_v": 40}
KEYS_NB = dropout_keys(torch.tensor([2**62 + 5, 77]), 5)


def adapted(targets: tuple[str, ...], dropout: float, nf4: bool = False) -> LoRAProjections:
    torch.manual_seed(0)
    base = Projections(16, LAYERS, tag="attn1.qkv")
    for parameter in (base.weight, base.bias):
        torch.nn.init.normal_(parameter)
    module = LoRAProjections(base, targets, rank=8, alpha=20.0, dropout=dropout, layer=3, nf4=nf4)
    torch.nn.init.normal_(module.a_RK)
    torch.nn.init.normal_(module.b_NR)
    for destination, source, factor in module.copies():
        destination.copy_(source * factor)
    module.key_B = KEYS_NB[3]
    return module


def eager(module: LoRAProjections, x_BLK: Tensor) -> Tensor:
    b_NR = torch.zeros(sum(LAYERS.values()), module.num_padding)
    row = 0
    for i, (start, end) in enumerate(module.spans):
        b_NR[start:end, i * 8 : (i + 1) * 8] = module.b_NR[row : row + end - start]
        row += end - start
    weight_NKR = module.weight if module.nf4 is None else module.nf4.dense()
    return lora_linear_eager(
        x_BLK,
        weight_NKR[:, :16],
        module.bias,
        module.a_RK,
        b_NR,
        module.scale,
        Dropout(module.dropout, module.key_B),
    )


@pytest.mark.parametrize("targets", [tuple(LAYERS), ("attn1.to_v", "attn1.to_q"), ("attn1.to_k",)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    ("padded", "gelu", "nf4"),
    [
        (True, False, False),
        (False, False, False),
        (False, True, False),
        (True, False, True),
        (False, True, True),
    ],
)
def test_fused_equals_eager_forward_and_gradients(
    targets: tuple[str, ...], dropout: float, padded: bool, gelu: bool, nf4: bool
) -> None:
    module = adapted(targets, dropout, nf4)
    source_BLK = torch.randn(2, 5, 16, requires_grad=True)
    weights_BLN = torch.randn(2, 5, sum(LAYERS.values()))
    x_BLK = gelu_tanh(source_BLK, module.num_padding if padded else 0)
    assert has_padding(x_BLK, module.num_padding) == padded
    results = []
    for forward in (
        lambda u: (
            module(u, gelu=True)
            if gelu
            else module(gelu_tanh(u, module.num_padding if padded else 0))
        ),
        lambda u: eager(module, gelu_tanh(u)),
    ):
        y_BLN = forward(source_BLK)
        gradients = torch.autograd.grad(
            (y_BLN * weights_BLN).sum(), [source_BLK, module.a_RK, module.b_NR]
        )
        results.append((y_BLN.detach(), *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_are_added_to_those_that_are_there(gelu: bool, in_place: bool) -> None:
    module, x_BLK = adapted(tuple(LAYERS), 0.25), torch.randn(2, 5, 16, requires_grad=True)
    parameters = (module.a_RK, module.b_NR)
    expected = torch.autograd.grad(module(x_BLK, gelu=gelu).square().sum(), parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        parameter.adds_in_place = in_place
    module(x_BLK, gelu=gelu).square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 1 + gradient)


def test_gelu_before_an_input_that_needs_no_gradient() -> None:
    """As in block 0 with ffn.net.2 adapted alone."""
    module, u_BLK = adapted(tuple(LAYERS), 0.25), torch.randn(2, 5, 16)
    found = torch.autograd.grad(module(u_BLK, gelu=True).square().sum(), [module.a_RK, module.b_NR])
    expected = torch.autograd.grad(
        eager(module, gelu_tanh(u_BLK)).square().sum(), [module.a_RK, module.b_NR]
    )
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-3, rtol=1e-4)


def test_nf4_weights_are_near_the_dense_ones_and_take_a_seventh_of_float32() -> None:
    torch.manual_seed(0)
    weight_NK = torch.randn(96, 256)
    packed = NF4Weight(weight_NK, num_low=8)
    dense_NKR = packed.dense()
    assert dense_NKR.shape == (96, 264) and torch.equal(dense_NKR[:, 256:], torch.zeros(96, 8))
    assert 0.05 < (dense_NKR[:, :256] - weight_NK).norm() / weight_NK.norm() < 0.12
    assert packed.packed_bytes * 7 < weight_NK.nbytes


def test_gradients_of_adapters_are_float32_in_half_precision() -> None:
    module = adapted(tuple(LAYERS), 0.0)
    module.weight.data, module.bias.data, module.a = (
        t.bfloat16() for t in (module.weight, module.bias, module.a)
    )
    x_BLK = torch.randn(2, 5, 16).bfloat16()
    y: Tensor = LoRALinear.apply(
        x_BLK,
        module.weight,
        module.bias,
        module.a,
        module.a_RK,
        module.b_NR,
        Dropout(),
        FusedLayers(module.tag, module.spans, module.scale),
    )
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    for parameter in (module.a_RK, module.b_NR):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
