"""The kernels between the GEMMs against their reference implementations, in Triton's interpreter
on the CPU (conftest.py), forward and gradients.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.kernels import pointwise, pointwise_launch
from train.kernels.layout import Rows
from train.model.wan import rope_tables

B, L, D, HEADS = 2, 6, 96, 3  # D is no power of two: lanes are masked
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def rows(seed: int, boundary_B: Tensor | None) -> Rows:
    torch.manual_seed(seed)
    if boundary_B is None:
        return Rows(torch.randn(D), None)
    # strided, each in its own way
    return Rows(torch.randn(B, 2, 4 + seed, D).unbind(2)[1], boundary_B)


def compare(results: list[tuple[Tensor, ...]], tolerance: float) -> None:
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("has_y", "gated", "per_token"),
    [(False, False, True), (True, True, False), (True, False, True), (True, True, True)],
)
@pytest.mark.parametrize("num_padding", [0, 8])
def test_residual_norm(
    dtype: torch.dtype, has_y: bool, gated: bool, per_token: bool, num_padding: int
) -> None:
    torch.manual_seed(0)
    boundary_B = torch.tensor([0, 4])
    x_BLD = torch.randn(B, L, D, requires_grad=True)
    y_BLD = torch.randn(B, L, D).to(dtype).requires_grad_() if has_y else None
    gate = rows(1, boundary_B) if gated else None
    shift, scale = (rows(seed, boundary_B if per_token else None) for seed in (2, 3))
    dx_BLD, dh_BLD = torch.randn(B, L, D), torch.randn(B, L, D).to(dtype)
    results = []
    for norm in (pointwise_launch.ResidualNorm.apply, pointwise.residual_norm_eager):
        out = norm(x_BLD, y_BLD, gate, shift, scale, 1e-6, dtype, num_padding)
        inputs = [x_BLD] if y_BLD is None else [x_BLD, y_BLD]
        assert out[1].stride(1) == (128 if num_padding else D)
        results.append(
            (*(o.detach() for o in out), *torch.autograd.grad(out, inputs, (dx_BLD, dh_BLD)))
        )
    compare(results, TOLERANCE[dtype])


def test_residual_norm_whose_stream_ends_here() -> None:
    """The last norm's x' is used by nobody: its gradient is None, not zeros."""
    x_BLD = torch.randn(B, L, D, requires_grad=True)
    shift, scale = rows(2, None), rows(3, None)
    results = []
    for norm in (pointwise_launch.ResidualNorm.apply, pointwise.residual_norm_eager):
        _, h_BLD = norm(x_BLD, None, None, shift, scale, 1e-6, torch.float32, 0)
        results.append(torch.autograd.grad(h_BLD.square().sum(), [x_BLD]))
    compare(results, 1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_parts", "num_normed"), [(3, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("rotated", [True, False])
def test_split_norm_rope(
    dtype: torch.dtype, num_parts: int, num_normed: int, rotated: bool
) -> None:
    torch.manual_seed(0)
    x_BLN = torch.randn(B, L, num_parts * D).to(dtype).requires_grad_()
    weights = tuple(torch.randn(D) for _ in range(num_normed))
    rope = rope_tables(1, 2, 3, D // HEADS, torch.device("cpu")) if rotated else None
    grads = [torch.randn(B, L, D).to(dtype) for _ in range(num_parts)]
    grads[0] = torch.randn(B, L, D + 8).to(dtype)[..., :D]  # gradients come strided as well
    results = []
    for split in (pointwise_launch.NormRope.apply, pointwise.split_norm_rope_eager):
        parts = split(x_BLN, weights, rope, HEADS, 1e-6)
        results.append((*(p.detach() for p in parts), *torch.autograd.grad(parts, [x_BLN], grads)))
    compare(results, TOLERANCE[dtype])


# e^(-2 z) is inf there, and GELU 0, as it should
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gelu(dtype: torch.dtype) -> None:
    u_BLK = (8 * torch.randn(B, L, 100)).to(dtype).requires_grad_()
    grad = torch.randn(B, L, 100).to(dtype)
    results = []
    for gelu in (pointwise_launch.Gelu.apply, pointwise.gelu_tanh_eager):
        out = gelu(u_BLK, 8)
        results.append((out.detach(), *torch.autograd.grad(out, [u_BLK], grad)))
    compare(results, TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # as in test_gelu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_gelu_of_every_value_below_10000(dtype: torch.dtype, tolerance: float) -> None:
    """Its slope is a difference times the value's cube."""
    u = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    u_BLK = u[u.abs() < 1e4].view(1, 1, -1).requires_grad_()
    results = []
    for gelu in (pointwise_launch.Gelu.apply, pointwise.gelu_tanh_eager):
        out = gelu(u_BLK, 0)
        results.append((out.detach(), *torch.autograd.grad(out, u_BLK, torch.ones_like(out))))
    compare(results, tolerance)


COMPILE = """
import sys

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from train.kernels import pointwise_triton as kernels
from train.kernels.refresh_triton import refresh

CAPABILITY, HALF_TYPE = int(sys.argv[1]), sys.argv[2]
FUNCTIONS = (
    kernels.residual_norm_forward,
    kernels.residual_norm_backward,
    kernels.norm_rope_forward,
    kernels.norm_rope_backward,
    kernels.gelu,
    refresh,
)
CONSTANTS = dict(
    HAS_Y=True, HAS_GATE=True, PER_TOKEN=True, HAS_DX_OUT=True, ROPE=True, BACKWARD=True,
    D=3072, BLOCK=4096, HALF_HEAD=64, NUM_NORMED=2, NUM_PARTS=3, HALF=tl.float16,
)
POINTERS = {
    "*i64": "boundary table",
    "*fp32": "x_out gate shift scale mean_out rstd_out mean_in rstd_in dx_out weight_0 weight_1"
    " cos sin",
    HALF_TYPE: "y h dh dy grad grad_0 grad_1 grad_2 u out",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()}


def type_of(function, parameter):
    if parameter.is_constexpr:
        return "constexpr"
    # the stream, or what a GEMM has put out
    if parameter.name in ("x", "dx"):
        return HALF_TYPE if "rope" in function.__name__ else "*fp32"
    return "fp32" if parameter.name == "eps" else TYPES.get(parameter.name, "i32")


for function in FUNCTIONS:
    types = {p.name: type_of(function, p) for p in function.params}
    constants = {
        (place,): CONSTANTS[name]
        for place, name in enumerate(types)
        if types[name] == "constexpr"
    }
    target = GPUTarget("cuda", CAPABILITY, 32)
    binary = compile(ASTSource(function, types, constants), target=target)
    assert f".target sm_{CAPABILITY}" in binary.asm["ptx"] and binary.asm["cubin"]
    print(function.__name__)
"""


@pytest.mark.parametrize(
    ("capability", "half_type"), [("70", "*fp16"), ("90", "*bf16")], ids=["V100", "Hopper"]
)
def test_every_kernel_compiles_for(capability: str, half_type: str) -> None:
    """To machine code, by the compiler in triton's wheel: no GPU is needed for that."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, capability, half_type],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == 6
