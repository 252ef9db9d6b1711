"""Launches of the Triton kernels of lowrank_triton.py, sums_triton.py and dropout_triton.py:
tiles, parts and strides.

Long sums are made in a number of parts that the shapes decide, and added up afterwards in order,
so that equal inputs give equal bits.

Shapes: B samples, L tokens, M = B * L rows, K width of x, N outputs, R = rank of all adapters
together.
"""

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from train.kernels import dropout_triton, lowrank_triton, sums_triton
from train.kernels.dropout import Dropout, threshold
from train.kernels.layout import common_row_stride, round_up

_DROP_BLOCK, _SUM_BLOCK = 2048, 1024
Kernel = Literal["down", "down_gelu", "up", "gradient", "gradient_gelu", "through_b"]


class Tile(NamedTuple):
    """The block of `rows` x `columns` that one iteration of a program works on."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    # in how many the long sum is split; through_b: how many programs there are, an H200's SMs
    num_parts: int


class Tiles(NamedTuple):
    """Of one kernel, by the low-rank columns that a program holds."""

    few: Tile  # up to `limit` of them
    many: Tile
    limit: int


# Of 12 to 70 that were timed on an H200 at 11,440 rows of 3072 (GELU: 14336) in bf16 the fastest,
# or no slower where it counts: in the step. GELU was timed at R = 32 only, short inputs not at
# all.
_DOWN_GELU = Tile(rows=32, columns=128, num_warps=4, num_stages=3, num_parts=4)
_GRADIENT_GELU = Tile(rows=64, columns=64, num_warps=4, num_stages=3, num_parts=4)
TILES: dict[Kernel, Tiles] = {
    "down": Tiles(
        few=Tile(rows=32, columns=128, num_warps=4, num_stages=4, num_parts=1),
        many=Tile(rows=64, columns=64, num_warps=4, num_stages=4, num_parts=1),
        limit=64,
    ),
    "down_gelu": Tiles(few=_DOWN_GELU, many=_DOWN_GELU, limit=64),
    "up": Tiles(
        few=Tile(rows=64, columns=64, num_warps=4, num_stages=3, num_parts=16),
        many=Tile(rows=64, columns=64, num_warps=4, num_stages=3, num_parts=8),
        limit=64,
    ),
    "gradient": Tiles(
        few=Tile(rows=32, columns=128, num_warps=4, num_stages=4, num_parts=16),
        many=Tile(rows=64, columns=128, num_warps=4, num_stages=3, num_parts=11),
        limit=64,
    ),
    "gradient_gelu": Tiles(few=_GRADIENT_GELU, many=_GRADIENT_GELU, limit=64),
    "through_b": Tiles(
        few=Tile(rows=64, columns=256, num_warps=4, num_stages=4, num_parts=132),
        many=Tile(rows=64, columns=256, num_warps=4, num_stages=3, num_parts=132),
        limit=32,
    ),
}


def tile_for(kernel: Kernel, num_low: int) -> Tile:
    tiles = TILES[kernel]
    return tiles.few if num_low <= tiles.limit else tiles.many


def low_block(num_low: int) -> int:
    """Low-rank columns of a tile: a power of two, at least the 16 that tl.dot needs."""
    return max(16, triton.next_power_of_2(num_low))


def drop(x_BLK: Tensor, dropout: Dropout) -> Tensor:
    """lowrank.drop: contiguous."""
    batch, length, width = x_BLK.shape
    # contiguous, whatever the row stride of x
    out_BLK = x_BLK.new_empty(x_BLK.shape)
    dropout_triton.drop[(length, batch, triton.cdiv(width, _DROP_BLOCK))](
        x=x_BLK,
        out=out_BLK,
        keys=dropout.key_B,
        length=length,
        width=width,
        x_stride=common_row_stride(x_BLK),
        scale=1 / (1 - dropout.p),
        THRESHOLD=threshold(dropout.p),
        BLOCK=_DROP_BLOCK,
        num_warps=4,
    )
    return out_BLK


def down(
    x_BLK: Tensor,
    a_RK: Tensor,
    dropout: Dropout,
    out_MR: Tensor,
    copy_BLK: Tensor | None,
    gelu: bool,
    saved_MR: Tensor | None,
) -> None:
    """lowrank.project_down."""
    batch, length, width = x_BLK.shape
    num_low = a_RK.shape[0]
    tile = tile_for("down_gelu" if gelu else "down", num_low)
    columns_per_part = round_up(triton.cdiv(width, tile.num_parts), tile.columns)
    num_parts = triton.cdiv(width, columns_per_part)
    # one part goes where it belongs at once
    parts = out_MR[None] if num_parts == 1 else out_MR.new_empty(num_parts, *out_MR.shape)
    assert saved_MR is None or saved_MR.is_contiguous()
    lowrank_triton.down[(triton.cdiv(length, tile.rows), num_parts, batch)](
        x=x_BLK,
        a=a_RK,
        out=parts,
        copy=copy_BLK,
        keys=dropout.key_B,
        length=length,
        num_low=num_low,
        x_stride=common_row_stride(x_BLK),
        out_stride=parts.stride(1),
        part_stride=parts.stride(0),
        copy_stride=0 if copy_BLK is None else common_row_stride(copy_BLK),
        scale=1 / (1 - dropout.p),
        THRESHOLD=threshold(dropout.p),
        GELU=gelu,
        COPY=copy_BLK is not None,
        width=width,
        columns_per_part=columns_per_part,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=low_block(num_low),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_parts > 1:
        sums_triton.add_low[(triton.cdiv(out_MR.numel(), _SUM_BLOCK),)](
            parts=parts,
            out=out_MR,
            saved=saved_MR,
            size=out_MR.numel(),
            num_low=num_low,
            out_stride=out_MR.stride(0),
            num_parts=num_parts,
            SAVE=saved_MR is not None,
            BLOCK=_SUM_BLOCK,
            num_warps=4,
        )
    elif saved_MR is not None:
        saved_MR.copy_(out_MR)


def up(dlow_MR: Tensor, a_RK: Tensor, dropout: Dropout, out_BLK: Tensor) -> None:
    """lowrank.project_up, into `out_BLK`."""
    batch, length, width = out_BLK.shape
    num_low = a_RK.shape[0]
    tile = tile_for("up", num_low)
    rows_per_part = round_up(triton.cdiv(length, tile.num_parts), tile.rows)
    num_parts = triton.cdiv(length, rows_per_part)
    lowrank_triton.up[(triton.cdiv(width, tile.columns), num_parts, batch)](
        dlow=dlow_MR,
        a=a_RK,
        out=out_BLK,
        keys=dropout.key_B,
        length=length,
        num_low=num_low,
        dlow_stride=dlow_MR.stride(0),
        scale=1 / (1 - dropout.p),
        THRESHOLD=threshold(dropout.p),
        width=width,
        rows_per_part=rows_per_part,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=low_block(num_low),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def gradient(
    dlow_MR: Tensor,
    x_BLK: Tensor,
    dropout: Dropout,
    scale: float,
    gelu_grad_BLK: Tensor | None,
    grad_RK: Tensor | None,
) -> Tensor | None:
    """lowrank.gradient_a."""
    batch, length, width = x_BLK.shape
    num_low, gelu = dlow_MR.shape[1], gelu_grad_BLK is not None
    tile = tile_for("gradient_gelu" if gelu else "gradient", num_low)
    assert gelu_grad_BLK is None or gelu_grad_BLK.is_contiguous()
    # short text in as many parts would write more than it reads: at least two tiles each
    num_parts = max(min(tile.num_parts, length // (2 * tile.rows)) // batch, 1)
    parts = torch.empty(batch * num_parts, num_low, width, dtype=torch.float32, device=x_BLK.device)
    rows_per_part = round_up(triton.cdiv(length, num_parts), tile.rows)
    lowrank_triton.gradient[(triton.cdiv(width, tile.columns), num_parts, batch)](
        dlow=dlow_MR,
        x=x_BLK,
        grad=gelu_grad_BLK,
        out=parts,
        keys=dropout.key_B,
        length=length,
        num_low=num_low,
        x_stride=common_row_stride(x_BLK),
        dlow_stride=dlow_MR.stride(0),
        scale=scale / (1 - dropout.p),
        THRESHOLD=threshold(dropout.p),
        GELU=gelu,
        width=width,
        rows_per_part=rows_per_part,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=low_block(num_low),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return _sum_of_parts(parts, grad_RK)


def through_b(
    dy_MN: Tensor,
    low_MR: Tensor,
    b_NR: Tensor,
    first: int,
    spacing: int,
    width: int,
    num_layers: int,
    grad_NR: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """lowrank.through_b, for layers of `width` outputs that begin at columns first, first +
    spacing, ... of dy.
    """
    (num_rows, _), num_low = dy_MN.shape, low_MR.shape[1]
    rank = num_low // num_layers
    if dy_MN.stride(1) != 1:
        dy_MN = dy_MN.contiguous()
    tile = tile_for("through_b", rank)
    num_tiles = triton.cdiv(width, tile.columns)
    # as many parts as fill the programs, each of whole tiles
    num_parts = max(tile.num_parts // (num_tiles * num_layers), 1)
    rows_per_part = round_up(triton.cdiv(num_rows, num_parts), tile.rows)
    num_parts = triton.cdiv(num_rows, rows_per_part)
    largest_offset = max(rows_per_part * dy_MN.stride(0), num_tiles * num_rows * num_low)
    assert largest_offset < 2**31, "offsets are 32 bits wide"
    # float16 would lose small parts, and overflow where their sum does not
    part_dtype = torch.float32 if dy_MN.dtype == torch.float16 else dy_MN.dtype
    dlow_parts = torch.empty(num_tiles, num_rows, num_low, dtype=part_dtype, device=dy_MN.device)
    db_parts = torch.empty(
        num_parts, num_layers * width, rank, dtype=torch.float32, device=dy_MN.device
    )
    lowrank_triton.through_b[(num_tiles, num_parts, num_layers)](
        dy=dy_MN,
        low=low_MR,
        b=b_NR,
        dlow=dlow_parts,
        db=db_parts,
        num_rows=num_rows,
        num_low=num_low,
        rank=rank,
        first=first,
        spacing=spacing,
        dy_stride=dy_MN.stride(0),
        low_stride=low_MR.stride(0),
        b_stride=b_NR.stride(0),
        width=width,
        rows_per_part=rows_per_part,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_R=low_block(rank),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    dlow_MR = dy_MN.new_empty(num_rows, num_low)
    db_NR = torch.empty_like(db_parts[0]) if grad_NR is None else grad_NR
    assert db_NR.is_contiguous()
    num_blocks = triton.cdiv(dlow_MR.numel(), _SUM_BLOCK) + triton.cdiv(db_NR.numel(), _SUM_BLOCK)
    sums_triton.add_both[(num_blocks,)](
        parts=dlow_parts,
        out=dlow_MR,
        size=dlow_MR.numel(),
        other_parts=db_parts,
        other_out=db_NR,
        other_size=db_NR.numel(),
        num_parts=num_tiles,
        num_other_parts=num_parts,
        ADD_OTHER=grad_NR is not None,
        BLOCK=_SUM_BLOCK,
        num_warps=4,
    )
    return dlow_MR, db_NR if grad_NR is None else None


def _sum_of_parts(parts: Tensor, grad: Tensor | None) -> Tensor | None:
    """The sum over the parts; or None, and it is added to `grad` in the same pass."""
    if grad is None and parts.shape[0] == 1:
        return parts[0]
    out = torch.empty_like(parts[0]) if grad is None else grad
    assert out.is_contiguous()
    sums_triton.add_parts[(triton.cdiv(out.numel(), _SUM_BLOCK),)](
        parts=parts,
        out=out,
        size=out.numel(),
        num_parts=parts.shape[0],
        ADD=grad is not None,
        BLOCK=_SUM_BLOCK,
        num_warps=4,
    )
    return out if grad is None else None
