"""The low-rank products with dropout: Triton kernels, in the interpreter, against their eager
twins.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.kernels import lowrank
from train.kernels import lowrank_triton as lowrank_kernels

B = 2
KEY_B = lowrank.dropout_keys(torch.tensor([2**62 + 5, 77]), 4)[3]


def strided(width: int, spare: int, dtype: torch.dtype, length: int = 37) -> Tensor:
    """[B, length, width] whose rows lie `spare` elements apart."""
    return torch.randn(B, length, width + spare).to(dtype)[..., :width]


def many_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every loop goes round several times, in several parts, as at the real sizes."""
    for name in ("DOWN", "UP", "GRADIENT"):
        monkeypatch.setattr(lowrank_kernels, name, ((16, 32, 4, 1, 4),) * 2)
    for name in ("DOWN_GELU", "GRADIENT_GELU"):
        monkeypatch.setattr(lowrank_kernels, name, (16, 32, 4, 1, 4))
    monkeypatch.setattr(lowrank_kernels, "THROUGH_B", ((16, 64, 4, 1, 60),) * 2)


@pytest.mark.parametrize(
    ("num_low", "p", "dtype", "length", "K"),
    [
        (8, 0.1, torch.float32, 37, 200),
        (24, 0.6, torch.float32, 37, 200),
        (24, 0.0, torch.float32, 37, 200),
        (8, 0.1, torch.float16, 37, 200),
        (24, 0.6, torch.float16, 37, 200),
        (24, 0.1, torch.float32, 150, 200),
        (32, 0.1, torch.float32, 150, 256),
        (32, 0.1, torch.float32, 150, 320),
    ],
)
def test_kernels_equal_their_twins(
    num_low: int, p: float, dtype: torch.dtype, length: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = 256 is made up of whole tiles and parts, 320 of whole tiles alone, 200 of neither."""
    if length == 150:
        many_small_tiles(monkeypatch)
    torch.manual_seed(0)
    x_BLK, a_RK = strided(K, num_low, dtype, length), torch.randn(num_low, K).to(dtype)
    dlow_MR = torch.randn(B * length, num_low + 5).to(dtype)[:, :num_low]
    atol, rtol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 5e-3)
    torch.testing.assert_close(
        lowrank_kernels.drop(x_BLK, p, KEY_B), lowrank.dropped(x_BLK, p, KEY_B)
    )
    for into, gelu in ((False, False), (True, False), (True, True)):
        low, twin = (torch.zeros(B * length, num_low + 3).to(dtype)[:, :num_low] for _ in range(2))
        copy, twin_copy = (strided(K, num_low, dtype, length) if into else None for _ in range(2))
        kept, twin_kept = (
            torch.zeros(B * length, num_low).to(dtype) if gelu else None for _ in range(2)
        )
        lowrank_kernels.down(x_BLK, a_RK, p, KEY_B, low, copy, gelu, kept)
        lowrank.project_down(x_BLK, a_RK, p, KEY_B, twin, twin_copy, gelu, twin_kept)
        torch.testing.assert_close(low, twin, atol=atol, rtol=rtol)
        if kept is not None and twin_kept is not None:
            assert torch.equal(kept, low) and torch.equal(twin_kept, twin)
        if copy is not None and twin_copy is not None:
            torch.testing.assert_close(copy, twin_copy)
    up_BLK = torch.zeros(B, length, K, dtype=dtype)
    lowrank_kernels.up(dlow_MR, a_RK, p, KEY_B, up_BLK)
    torch.testing.assert_close(
        up_BLK, lowrank.project_up(dlow_MR, a_RK, p, KEY_B, x_BLK.shape), atol=atol, rtol=rtol
    )
    for gelu in (False, True):
        grad, twin_grad = (
            torch.ones(B, length, K, dtype=dtype) if gelu else None for _ in range(2)
        )
        da, added = (
            lowrank_kernels.gradient(dlow_MR, x_BLK, p, KEY_B, 2.5, grad, None),
            torch.ones(num_low, K),
        )
        torch.testing.assert_close(
            da, lowrank.gradient_a(dlow_MR, x_BLK, p, KEY_B, 2.5, twin_grad), atol=atol, rtol=rtol
        )
        if grad is not None and twin_grad is not None:
            torch.testing.assert_close(grad, twin_grad)
        assert lowrank_kernels.gradient(dlow_MR, x_BLK, p, KEY_B, 2.5, grad, added) is None
        assert da is not None
        torch.testing.assert_close(added, 1 + da)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,)])
def test_dlow_and_db_of_one_reading_of_dy_equal_their_twins(
    dtype: torch.dtype, adapted: tuple[int, ...], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of 300 outputs, more than one tile."""
    if small:
        many_small_tiles(monkeypatch)
    torch.manual_seed(0)
    rank, width, num_rows = 8, 300, 150
    num_low, blocks = rank * len(adapted), tuple((i * width, (i + 1) * width) for i in adapted)
    dy_MN, low_MR = (
        strided(n, 4, dtype).flatten(0, 1).repeat(3, 1)[:num_rows] for n in (3 * width, num_low)
    )
    b_NR = torch.zeros(3 * width, num_low + 3).to(dtype)[:, :num_low]
    for i, (first, end) in enumerate(blocks):
        b_NR[first:end, i * rank : (i + 1) * rank] = torch.randn(width, rank).to(dtype)
    added = torch.ones(len(adapted) * width, rank)
    ours, again = (
        lowrank_kernels.through_b(
            dy_MN,
            low_MR,
            b_NR,
            blocks[0][0],
            2 * width if len(adapted) == 2 else width,
            width,
            len(adapted),
            grad,
        )
        for grad in (None, added)
    )
    assert ours[1] is not None and again[1] is None
    torch.testing.assert_close(added, 1 + ours[1])
    atol, rtol = (1e-4, 1e-5) if dtype == torch.float32 else (0.1, 5e-3)
    for found, twin in zip(ours, lowrank.through_b(dy_MN, low_MR, b_NR, blocks), strict=True):
        torch.testing.assert_close(found, twin, atol=atol, rtol=rtol)


def test_small_float16_gradients_are_not_lost_between_the_parts_of_dlow() -> None:
    torch.manual_seed(0)
    dy_MN, b_NR = 1e-6 * torch.randn(64, 4096), torch.randn(4096, 8)
    dlow_MR, _ = lowrank_kernels.through_b(
        dy_MN.half(), torch.zeros(64, 8).half(), b_NR.half(), 0, 0, 4096, 1, None
    )
    once_MR = (dy_MN.half().float() @ b_NR.half().float()).half()
    # two of float16's smallest steps
    torch.testing.assert_close(dlow_MR, once_MR, atol=1.2e-7, rtol=2e-3)


def test_adapted_layers_of_several_widths_go_through_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_has_dot", lambda *_: True)
    torch.manual_seed(0)
    blocks, b_NR = ((0, 24), (24, 64)), torch.zeros(64, 16)
    for i, (first, end) in enumerate(blocks):
        b_NR[first:end, i * 8 : (i + 1) * 8].normal_()
    dy_MN, low_MR = torch.randn(50, 64), torch.randn(50, 16)
    for found, twin in zip(
        lowrank.through_b(dy_MN, low_MR, b_NR, blocks),
        lowrank.through_b(dy_MN, low_MR, b_NR, blocks, kernels=False),
        strict=True,
    ):
        torch.testing.assert_close(found, twin)


COMPILE = """
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from train.kernels import lowrank_triton as kernels

CAPABILITY, NUM_LOW = int(sys.argv[1]), int(sys.argv[2])
HALF = "x a out into kept dlow grad dy low b parts".split()


def shared_bytes(name, num_low, block_m, block_k, num_warps, num_stages, gelu=False):
    function, types = getattr(kernels, name), {}
    for parameter in function.params:
        n = parameter.name
        float32 = (n in ("db", "other_parts", "other_out") or name == "_add_parts" and n in ("parts", "out")
                   or name == "_gradient" and n == "out")
        types[n] = ("constexpr" if parameter.is_constexpr else "*i64" if n == "keys" else "fp32" if n == "scale" else
                    "*fp32" if float32 else "*fp16" if n in HALF else "i32")
    flags = dict(THRESHOLD=2**28, width=3072, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_N=block_k, GELU=gelu, COPY=True,
                 BLOCK_R=kernels._block_r(num_low), columns_per_part=3072, rows_per_part=768, num_parts=16, ADD=True,
                 BLOCK=2048, num_other_parts=11, ADD_OTHER=True, KEEP=True, num_low=num_low, rank=num_low)
    names = list(types)
    constants = {(names.index(n),): flags[n] for n in names if types[n] == "constexpr"}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if types[n][0] == "*" or types[n] == "i32"}
    binary = compile(ASTSource(function, types, constants, aligned), target=GPUTarget("cuda", CAPABILITY, 32),
                     options=dict(num_warps=num_warps, num_stages=num_stages))
    return binary.metadata.shared


print("_drop", shared_bytes("_drop", 16, 16, 16, 4, 1))
for name in ("_add_parts", "_add_both", "_add_low"):
    print(name, shared_bytes(name, 16, 16, 16, 4, 1))
if NUM_LOW:
    for name, tiles in (("_down", kernels.DOWN), ("_up", kernels.UP), ("_gradient", kernels.GRADIENT)):
        for num_low in (64, NUM_LOW):
            print(name, shared_bytes(name, num_low, *tiles[num_low > 64][:4]))
    for name, tile in (("_down", kernels.DOWN_GELU), ("_gradient", kernels.GRADIENT_GELU)):
        print(name + " gelu", shared_bytes(name, NUM_LOW, *tile[:4], gelu=True))
    for rank, tile in zip((32, 64), kernels.THROUGH_B):
        print("_through_b", shared_bytes("_through_b", rank, *tile[:4]))
"""


@pytest.mark.parametrize(
    ("capability", "num_low", "limit_kib"),
    [(70, 0, 96), (80, 256, 163), (89, 128, 99), (90, 256, 227)],
)
def test_every_kernel_compiles_and_fits_into_shared_memory_at_the_largest_rank(
    capability: int, num_low: int, limit_kib: int
) -> None:
    """Up to the R that `_has_dot` allows; the limits are those of CUDA's programming guide."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), str(num_low)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environment,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    sizes = [int(line.split()[-1]) for line in run.stdout.splitlines()]
    assert len(sizes) == (14 if num_low else 4) and max(sizes) <= limit_kib * 1024, run.stdout
