"""The low-rank products with dropout: Triton kernels, in the interpreter, against their reference
implementations.
"""

import subprocess

import pytest
import torch
from compiled import outputs
from torch import Tensor

from train.kernels import lowrank, lowrank_launch
from train.kernels.dropout import Dropout, dropout_keys
from train.kernels.layout import Span
from train.kernels.lowrank_launch import Tile, Tiles

B = 2
KEY_B = dropout_keys(torch.tensor([2**62 + 5, 77]), 4)[3]


def strided(width: int, padding: int, dtype: torch.dtype, length: int = 37) -> Tensor:
    """[B, length, width] whose rows have `padding` elements behind them."""
    return torch.randn(B, length, width + padding).to(dtype)[..., :width]


def many_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every loop goes round several times, in several parts, as at the real sizes. Of 64
    columns, because the interpreter takes as long for 32.
    """
    small = Tile(rows=16, columns=64, num_warps=4, num_stages=1, num_parts=4)
    for name in lowrank_launch.TILES:
        monkeypatch.setitem(lowrank_launch.TILES, name, Tiles(small, small, limit=64))
    # along the columns of x
    for name in ("down", "down_gelu"):
        few = small._replace(num_parts=2)
        monkeypatch.setitem(lowrank_launch.TILES, name, Tiles(few, few, limit=64))
    small = small._replace(num_parts=60)
    monkeypatch.setitem(lowrank_launch.TILES, "through_b", Tiles(small, small, limit=32))


@pytest.mark.parametrize(
    ("num_low", "p", "dtype", "length", "K"),
    [
        (8, 0.1, torch.float32, 37, 200),
        (24, 0.6, torch.float32, 37, 200),
        (24, 0.0, torch.float32, 37, 200),
        (8, 0.1, torch.float16, 37, 200),
        (24, 0.6, torch.float16, 37, 200),
        (24, 0.1, torch.float32, 130, 200),
        (32, 0.1, torch.float32, 130, 256),
        (32, 0.1, torch.float32, 130, 320),
    ],
)
def test_kernels_equal_their_references(
    num_low: int, p: float, dtype: torch.dtype, length: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = 256 is made up of whole tiles and parts, 320 of whole tiles alone, 200 of neither."""
    if length == 130:
        many_small_tiles(monkeypatch)
    torch.manual_seed(0)
    x_BLK, a_RK = strided(K, num_low, dtype, length), torch.randn(num_low, K).to(dtype)
    dlow_MR = torch.randn(B * length, num_low + 5).to(dtype)[:, :num_low]
    atol, rtol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 5e-3)
    dropout = Dropout(p, KEY_B)
    if length == 37:  # it goes row by row, without tiles
        torch.testing.assert_close(
            lowrank_launch.drop(x_BLK, dropout), lowrank.drop_eager(x_BLK, dropout)
        )
    for copied, gelu in ((False, False), (True, False), (True, True)):
        low, expected_low = (
            torch.zeros(B * length, num_low + 3).to(dtype)[:, :num_low] for _ in range(2)
        )
        copy, expected_copy = (
            strided(K, num_low, dtype, length) if copied else None for _ in range(2)
        )
        saved, expected_saved = (
            torch.zeros(B * length, num_low).to(dtype) if gelu else None for _ in range(2)
        )
        lowrank_launch.down(x_BLK, a_RK, dropout, low, copy, gelu, saved)
        lowrank.project_down_eager(
            x_BLK, a_RK, dropout, expected_low, expected_copy, gelu, expected_saved
        )
        torch.testing.assert_close(low, expected_low, atol=atol, rtol=rtol)
        if saved is not None and expected_saved is not None:
            assert torch.equal(saved, low) and torch.equal(expected_saved, expected_low)
        if copy is not None and expected_copy is not None:
            torch.testing.assert_close(copy, expected_copy)
    up_BLK = torch.zeros(B, length, K, dtype=dtype)
    lowrank_launch.up(dlow_MR, a_RK, dropout, up_BLK)
    expected_up_BLK = lowrank.project_up_eager(dlow_MR, a_RK, dropout, x_BLK.shape)
    torch.testing.assert_close(up_BLK, expected_up_BLK, atol=atol, rtol=rtol)
    for gelu in (False, True):
        grad, again, expected_grad = (
            torch.ones(B, length, K, dtype=dtype) if gelu else None for _ in range(3)
        )
        da = lowrank_launch.gradient(dlow_MR, x_BLK, dropout, 2.5, grad, None)
        expected_da = lowrank.gradient_a_eager(dlow_MR, x_BLK, dropout, 2.5, expected_grad)
        torch.testing.assert_close(da, expected_da, atol=atol, rtol=rtol)
        if grad is not None and expected_grad is not None:
            torch.testing.assert_close(grad, expected_grad)
        added = torch.ones(num_low, K)
        assert lowrank_launch.gradient(dlow_MR, x_BLK, dropout, 2.5, again, added) is None
        assert da is not None
        torch.testing.assert_close(added, 1 + da)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,)])
def test_dlow_and_db_from_one_reading_of_dy_equal_their_references(
    dtype: torch.dtype, adapted: tuple[int, ...], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of 300 outputs, more than one tile."""
    if small:
        many_small_tiles(monkeypatch)
    torch.manual_seed(0)
    rank, width, num_rows = 8, 300, 150
    num_low = rank * len(adapted)
    spans = tuple(Span(i * width, (i + 1) * width) for i in adapted)
    dy_MN, low_MR = (
        strided(n, 4, dtype).flatten(0, 1).repeat(3, 1)[:num_rows] for n in (3 * width, num_low)
    )
    b_NR = torch.zeros(3 * width, num_low + 3).to(dtype)[:, :num_low]
    for i, (first, end) in enumerate(spans):
        b_NR[first:end, i * rank : (i + 1) * rank] = torch.randn(width, rank).to(dtype)
    added = torch.ones(len(adapted) * width, rank)
    ours, again = (
        lowrank_launch.through_b(
            dy_MN,
            low_MR,
            b_NR,
            spans[0].first,
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
    references = lowrank.through_b_eager(dy_MN, low_MR, b_NR, spans)
    for found, reference in zip(ours, references, strict=True):
        torch.testing.assert_close(found, reference, atol=atol, rtol=rtol)


def test_small_float16_gradients_are_not_lost_between_the_parts_of_dlow() -> None:
    torch.manual_seed(0)
    dy_MN, b_NR = 1e-6 * torch.randn(64, 4096), torch.randn(4096, 8)
    dlow_MR, _ = lowrank_launch.through_b(
        dy_MN.half(), torch.zeros(64, 8).half(), b_NR.half(), 0, 0, 4096, 1, None
    )
    once_MR = (dy_MN.half().float() @ b_NR.half().float()).half()
    # two of float16's smallest steps
    torch.testing.assert_close(dlow_MR, once_MR, atol=1.2e-7, rtol=2e-3)


def test_adapted_layers_of_several_widths_go_through_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "has_kernels", lambda *_: True)
    torch.manual_seed(0)
    spans, b_NR = (Span(0, 24), Span(24, 64)), torch.zeros(64, 16)
    for i, (first, end) in enumerate(spans):
        b_NR[first:end, i * 8 : (i + 1) * 8].normal_()
    dy_MN, low_MR = torch.randn(50, 64), torch.randn(50, 16)
    for found, reference in zip(
        lowrank.through_b(dy_MN, low_MR, b_NR, spans),
        lowrank.through_b_eager(dy_MN, low_MR, b_NR, spans),
        strict=True,
    ):
        torch.testing.assert_close(found, reference)


def test_spans_are_evenly_spaced_or_not() -> None:
    assert lowrank.evenly_spaced([Span(4, 7)]) == (4, 0, 3)
    assert lowrank.evenly_spaced([Span(0, 3), Span(6, 9), Span(12, 15)]) == (0, 6, 3)
    assert lowrank.evenly_spaced([Span(0, 3), Span(6, 9), Span(9, 12)]) is None
    assert lowrank.evenly_spaced([Span(0, 3), Span(6, 10)]) is None


COMPILE = """
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from train.kernels import dropout_triton, lowrank_triton, sums_triton
from train.kernels.lowrank_launch import Tile, low_block, tile_for

CAPABILITY, NUM_LOW = int(sys.argv[1]), int(sys.argv[2])
HALF = "x a out copy saved dlow grad dy low b parts".split()
FLOAT32 = "db other_parts other_out".split()
# long sums are float32, though other kernels have half precision under these names
FLOAT32_OF = {"add_parts": ("parts", "out"), "gradient": ("out",)}


def type_of(function, parameter):
    name = parameter.name
    if parameter.is_constexpr:
        return "constexpr"
    if name in FLOAT32 or name in FLOAT32_OF.get(function.__name__, ()):
        return "*fp32"
    if name in HALF:
        return "*fp16"
    return {"keys": "*i64", "scale": "fp32"}.get(name, "i32")


def shared_bytes(function, num_low, tile, gelu=False):
    constants = dict(
        THRESHOLD=2**28, GELU=gelu, COPY=True, ADD=True, ADD_OTHER=True, SAVE=True, BLOCK=2048,
        BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_N=tile.columns, BLOCK_R=low_block(num_low),
        width=3072, columns_per_part=3072, rows_per_part=768, num_parts=16, num_other_parts=11,
        num_low=num_low, rank=num_low,
    )
    types = {parameter.name: type_of(function, parameter) for parameter in function.params}
    places = {name: (place,) for place, name in enumerate(types)}
    given = {places[n]: constants[n] for n, kind in types.items() if kind == "constexpr"}
    aligned = {
        places[name]: [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind[0] == "*" or kind == "i32"
    }
    binary = compile(
        ASTSource(function, types, given, aligned),
        target=GPUTarget("cuda", CAPABILITY, 32),
        options=dict(num_warps=tile.num_warps, num_stages=tile.num_stages),
    )
    return binary.metadata.shared


small = Tile(rows=16, columns=16, num_warps=4, num_stages=1, num_parts=1)
elementwise = (dropout_triton.drop, sums_triton.add_parts, sums_triton.add_both,
               sums_triton.add_low)
for function in elementwise:
    print(function.__name__, shared_bytes(function, 16, small))
if NUM_LOW:
    for name in ("down", "up", "gradient"):
        for num_low in (64, NUM_LOW):
            function, tile = getattr(lowrank_triton, name), tile_for(name, num_low)
            print(name, shared_bytes(function, num_low, tile))
    for name in ("down", "gradient"):
        function, tile = getattr(lowrank_triton, name), tile_for(f"{name}_gelu", NUM_LOW)
        print(name, "gelu", shared_bytes(function, NUM_LOW, tile, gelu=True))
    for rank in (32, 64):
        tile = tile_for("through_b", rank)
        print("through_b", shared_bytes(lowrank_triton.through_b, rank, tile))
"""


# Capability, R, KiB of shared memory.
TARGETS = [(70, 0, 96), (80, 256, 163), (89, 128, 99), (90, 256, 227)]


@pytest.fixture(scope="module")
def compilations() -> dict[tuple[str, ...], subprocess.CompletedProcess[str]]:
    commands = [(str(capability), str(num_low)) for capability, num_low, _ in TARGETS]
    return outputs(COMPILE, commands, timeout_s=900)


@pytest.mark.parametrize(("capability", "num_low", "limit_kib"), TARGETS)
def test_every_kernel_compiles_and_fits_into_shared_memory_at_the_largest_rank(
    capability: int,
    num_low: int,
    limit_kib: int,
    compilations: dict[tuple[str, ...], subprocess.CompletedProcess[str]],
) -> None:
    """Up to the R that `has_kernels` allows; the limits are those of CUDA's programming guide."""
    run = compilations[str(capability), str(num_low)]
    assert run.returncode == 0, run.stderr
    sizes = [int(line.split()[-1]) for line in run.stdout.splitlines()]
    assert len(sizes) == (14 if num_low else 4) and max(sizes) <= limit_kib * 1024, run.stdout
