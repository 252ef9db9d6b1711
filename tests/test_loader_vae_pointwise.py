"""The pass between two convolutions: the Triton kernel, in the interpreter (conftest.py), against
its reference implementation; and it compiles for the GPUs that matter.
"""

import subprocess

import pytest
import torch
from compiled import outputs
from torch import Tensor

from loader.vae import pointwise_triton
from loader.vae.pending import GroupMean, Pending, Stream
from loader.vae.pointwise import finish, finish_eager

B, T, H, W = 2, 2, 9, 8  # 72 pixels: no whole number of programs
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(
    pending: Pending,
    buffer_shape: tuple[int, ...],
    gamma_C: Tensor | None,
    past_BPHWC: Tensor | None = None,
    silu: bool = False,
    stores_sum: bool = False,
) -> None:
    """Both implementations fill all of the buffer, with the same; and store the same sum, or
    none.
    """
    results = []
    for run in (finish_eager, pointwise_triton.finish):
        own = Pending(
            pending.x_BTHWC.clone(), pending.bias_C, pending.residual_BTHWC, pending.shortcut
        )
        buffer = torch.full(buffer_shape, float("nan"), dtype=own.x_BTHWC.dtype)
        run(own, buffer, gamma_C, past_BPHWC, silu, stores_sum)
        results.append((buffer, own.x_BTHWC))
    tolerance = TOLERANCE[pending.x_BTHWC.dtype]
    for reference, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, reference, atol=tolerance, rtol=tolerance)
    assert torch.equal(results[1][1], pending.x_BTHWC) != stores_sum


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [48, 40, 32])
@pytest.mark.parametrize("num_stored", [1, 2])
def test_norm_and_silu_go_behind_the_past(
    dtype: torch.dtype, channels: int, num_stored: int
) -> None:
    compare(
        Pending(
            random(B, T, H, W, channels, seed=0, dtype=dtype),
            random(channels, seed=1, dtype=dtype),
        ),
        buffer_shape=(B, 2 + T, H, W, channels),
        gamma_C=random(channels, seed=2, dtype=dtype),
        past_BPHWC=random(B, num_stored, H, W, channels, seed=3, dtype=dtype),
        silu=True,
    )


@pytest.mark.parametrize("stores_sum", [False, True])
@pytest.mark.parametrize("has_norm", [False, True])
def test_a_residual_is_added_and_the_sum_stored(stores_sum: bool, has_norm: bool) -> None:
    shape = (B, T, H, W, 40)
    x, residual = (random(*shape, seed=seed, dtype=torch.float16) for seed in (0, 1))
    compare(
        Pending(x, random(40, seed=2, dtype=torch.float32), residual),
        buffer_shape=shape,
        gamma_C=random(40, seed=3, dtype=torch.float16) if has_norm else None,
        stores_sum=stores_sum,
    )


@pytest.mark.parametrize(
    ("time_factor", "space_factor", "source_channels", "source_frames"),
    [(1, 2, 40, T), (2, 2, 20, 2 * T), (2, 2, 20, 2 * T - 1), (1, 1, 40, T)],
)
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_shortcut_of_means_is_added(
    time_factor: int,
    space_factor: int,
    source_channels: int,
    source_frames: int,
    has_residual: bool,
) -> None:
    shape = (B, T, H, W, 40)
    source_shape = (B, source_frames, H * space_factor, W * space_factor, source_channels)
    source = Stream(
        random(*source_shape, seed=1, dtype=torch.float16),
        random(source_channels, seed=2, dtype=torch.float16),
    )
    compare(
        Pending(
            random(*shape, seed=0, dtype=torch.float16),
            random(40, seed=3, dtype=torch.float16),
            random(*shape, seed=4, dtype=torch.float16) if has_residual else None,
            GroupMean(source, time_factor, space_factor),
        ),
        buffer_shape=shape,
        gamma_C=random(40, seed=5, dtype=torch.float16),
        silu=True,
        stores_sum=True,
    )


def test_padding_at_the_bottom_and_right_is_zeros() -> None:
    shape = (B, T, H, W, 40)
    compare(
        Pending(random(*shape, seed=0, dtype=torch.float16), None, torch.ones(shape).half()),
        buffer_shape=(B, T, H + 1, W + 1, 40),
        gamma_C=None,
    )


def test_a_sum_of_a_bias_alone_is_left_where_it_is() -> None:
    x, bias = torch.ones(1, 1, 2, 2, 32), torch.ones(32)
    buffer = torch.empty_like(x)
    stream = finish(Pending(x, bias), buffer)
    assert stream is not None and stream.x_BTHWC is x and stream.bias_C is bias
    assert torch.equal(x, torch.ones_like(x)) and torch.equal(buffer, x + 1)


def test_a_pending_sum_holds_no_memory_once_it_is_finished() -> None:
    x = torch.ones(1, 1, 2, 2, 32)
    pending = Pending(x.clone(), None, x)
    finish(pending, torch.empty_like(x), keep_sum=False)
    with pytest.raises(AttributeError):
        _ = pending.x_BTHWC


COMPILE = """
import re
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from loader.vae import pointwise_triton as kernels

CAPABILITY, HALF, MAX_SPILLED_BYTES = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
POINTERS = ["x", "bias", "residual", "source", "source_bias", "gamma", "past", "buffer"]


def spilled_bytes(channels, given, shortcut=(0, 1, 1), **flags):
    parts, width = kernels.split_channels(channels)
    constants = dict(zip(("SOURCE_C", "TIME_FACTOR", "SPACE_FACTOR"), shortcut))
    constants |= dict(PARTS=parts, WIDTH=width, ROWS=kernels.TILE // width)
    constants |= dict(STORES_SUM=False, SILU=False, PADDING=0) | flags
    constants |= {name: None for name in POINTERS if name not in given}
    types = {}
    for parameter in kernels._finish.params:
        name = parameter.name
        is_pointer, is_float = name in POINTERS, name == "eps"
        scalar = "fp32" if is_float else "i32"
        types[name] = "constexpr" if name in constants else HALF if is_pointer else scalar
    names = list(types)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in given}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernels._finish, types, values, aligned)
    target = GPUTarget("cuda", CAPABILITY, 32)
    ptx = compile(source, target=target, options={"num_warps": kernels.NUM_WARPS}).asm["ptx"]
    gpu = ptx.partition(".target ")[2].split()[0].rstrip(",")  # sm_70, or sm_90a
    assert gpu.startswith(f"sm_{CAPABILITY}")
    command = [PTXAS, "-v", f"--gpu-name={gpu}", "-o", "/dev/null", "-"]
    log = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    print(channels, *given, *shortcut, *flags, *log.splitlines()[-2:])
    return int(re.search(r"(\\d+) bytes spill stores", log)[1])


plain, full = ["x", "bias", "buffer"], ["x", "bias", "residual", "gamma", "buffer"]
kinds = 0
for channels in (96, 160, 192, 320, 384, 640):
    places = [
        (["x", "bias", "gamma", "past", "buffer"], dict(SILU=True)),
        ([*full, "past"], dict(SILU=True, STORES_SUM=True)),
        (full, dict(STORES_SUM=True)),
        (["x", "bias", "residual", "buffer"], dict(PADDING=1)),
        ([*plain, "past"], {}),
    ]
    shortcuts = {160: [(160, 1, 2)], 320: [(160, 2, 2)], 640: [(320, 2, 2), (640, 1, 1)]}
    for shortcut in shortcuts.get(channels, []):
        given = [*full, "past", "source", "source_bias"]
        places.append((given, dict(SILU=True, STORES_SUM=True, shortcut=shortcut)))
    for given, options in places:
        assert spilled_bytes(channels, given, **options) <= MAX_SPILLED_BYTES
        kinds += 1
print("kinds", kinds)
"""


# Capability, pointers, bytes that may spill: on Hopper ptxas spills a register or two of one kind
# to fit six programs on a processor.
TARGETS = [("70", "*fp16", "0"), ("90", "*bf16", "8")]


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, ...], subprocess.CompletedProcess[str]]:
    return outputs(COMPILE, TARGETS, timeout_s=900)


@pytest.mark.parametrize("target", TARGETS, ids=["V100", "Hopper"])
def test_the_kernel_compiles_without_spills_for(
    target: tuple[str, ...], runs: dict[tuple[str, ...], subprocess.CompletedProcess[str]]
) -> None:
    """To machine code, by the compiler in triton's wheel: no GPU is needed for that."""
    run = runs[target]
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "kinds 34"
