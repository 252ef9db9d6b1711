"""Triton kernels of train/kernels/lowrank.py, whose eager lines are their twins. Dropout is a
hash of the element's place.

`_drop` and the sums are elementwise and compile for sm_70; the four with tl.dot are for sm_80 and
newer. x is read once each time, and where it is GELU(u), u is; dy is read once for both of its
products. Long sums are made in a number of parts that the shapes decide, added up afterwards in
order, so that equal inputs give equal bits. A program never works on rows of two samples where
dropout needs to know them: to tell them apart would take a division per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels.lowrank import threshold
from train.kernels.pointwise_triton import gelu_and_slope

# (rows, columns of a tile, warps, stages, parts), for R up to 64 and above (GELU: R = 32 only),
# and THROUGH_B for ranks up to 32 and above, with as many programs as an H200 has SMs in place of
# parts. Of 12 to 70 that were timed on an H200 at 11,440 rows of 3072 (GELU: 14336) in bf16 the
# fastest, or no slower where it counts: in the step. Short inputs were not tuned for.
DOWN, DOWN_GELU = ((32, 128, 4, 4, 1), (64, 64, 4, 4, 1)), (32, 128, 4, 3, 4)
UP = (64, 64, 4, 3, 16), (64, 64, 4, 3, 8)
GRADIENT, GRADIENT_GELU = ((32, 128, 4, 4, 16), (64, 128, 4, 3, 11)), (64, 64, 4, 3, 4)
THROUGH_B = (64, 256, 4, 4, 132), (64, 256, 4, 3, 132)


@triton.jit
def _mix32(x):
    """lowrank._mix32 of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _kept(value, keys, sample, token, k, THRESHOLD: tl.constexpr, scale=1.0):
    """The elements of a tile [token, k] that survive dropout, float32 times `scale`; without
    dropout all of them.

    Unlike the twin's, a float32 inf or NaN that is dropped becomes NaN: the step is lost to it
    anyway.
    """
    if THRESHOLD > 0:
        row = _mix32(token.to(tl.uint32) * 0x9E3779B1 + tl.load(keys + sample).to(tl.uint32))
        column = _mix32(k.to(tl.uint32) * 0x85EBCA77) | 1
        kept = row[:, None] * column[None, :] >= THRESHOLD
        # a choice would come after the packing to half precision, and cost twice as much
        if value.dtype == tl.float32:
            value *= tl.where(kept, scale, 0.0)
        else:
            value = tl.where(kept, value, 0.0)
    elif value.dtype == tl.float32:
        value *= scale
    return value


@triton.jit
def _inside(i, size: tl.constexpr, step: tl.constexpr):
    """i < size, for programs that go from 0 in whole steps: no test where these make up the
    size.
    """
    return i < size if size % step else i == i


@triton.jit
def _drop(
    x,
    out,
    keys,
    length,
    width,
    x_stride,
    scale,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, sample = tl.program_id(0), tl.program_id(1)
    row = sample.to(tl.int64) * length + token
    k = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    ok = k < width
    value = tl.load(x + row * x_stride + k, mask=ok, other=0.0).to(tl.float32)
    value = _kept(value[None, :], keys, sample, token + tl.arange(0, 1), k, THRESHOLD, scale)
    tl.store(out + row * width + k, tl.reshape(value, (BLOCK,)), mask=ok)


@triton.jit
def _down(
    x,
    a,
    out,
    into,
    keys,
    length,
    num_low: tl.constexpr,
    x_stride,
    out_stride,
    part_stride,
    into_stride,
    scale,
    THRESHOLD: tl.constexpr,
    GELU: tl.constexpr,
    COPY: tl.constexpr,
    width: tl.constexpr,
    columns_per_part: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    part, sample = tl.program_id(1), tl.program_id(2)
    token, r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    row, row_ok = sample.to(tl.int64) * length + token, token < length
    low, r_ok = tl.zeros((BLOCK_M, BLOCK_R), tl.float32), _inside(r, num_low, BLOCK_R)
    for start in range(0, columns_per_part, BLOCK_K):
        k = part * columns_per_part + start + tl.arange(0, BLOCK_K)
        k_ok = _inside(k, width, columns_per_part)
        ok = row_ok[:, None] & k_ok[None, :]
        a_KR = tl.load(
            a + r[None, :] * width + k[:, None], mask=r_ok[None, :] & k_ok[:, None], other=0.0
        )
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=ok, other=0.0)
        if GELU:
            value = gelu_and_slope(value.to(tl.float32))[0]
        if COPY:
            tl.store(into + row[:, None] * into_stride + k[None, :], value, mask=ok)
        value = _kept(value, keys, sample, token, k, THRESHOLD).to(a_KR.dtype)
        low = tl.dot(value, a_KR, low, input_precision="ieee")
    place = out + part * part_stride + row[:, None] * out_stride + r[None, :]
    tl.store(place, low * scale, mask=row_ok[:, None] & r_ok[None, :])


@triton.jit
def _up(
    dlow,
    a,
    out,
    keys,
    length,
    num_low: tl.constexpr,
    dlow_stride,
    scale,
    THRESHOLD: tl.constexpr,
    width: tl.constexpr,
    rows_per_part: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    part, sample = tl.program_id(1), tl.program_id(2)
    k, r = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    k_ok, r_ok = _inside(k, width, BLOCK_K), _inside(r, num_low, BLOCK_R)
    a_RK = tl.load(
        a + r[:, None] * width + k[None, :], mask=r_ok[:, None] & k_ok[None, :], other=0.0
    )
    for start in range(0, rows_per_part, BLOCK_M):
        token = part * rows_per_part + start + tl.arange(0, BLOCK_M)
        row, row_ok = sample.to(tl.int64) * length + token, token < length
        low_MR = tl.load(
            dlow + row[:, None] * dlow_stride + r[None, :],
            mask=row_ok[:, None] & r_ok[None, :],
            other=0.0,
        )
        update = _kept(
            tl.dot(low_MR, a_RK, input_precision="ieee"), keys, sample, token, k, THRESHOLD, scale
        )
        tl.store(
            out + row[:, None] * width + k[None, :], update, mask=row_ok[:, None] & k_ok[None, :]
        )


@triton.jit
def _gradient(
    dlow,
    x,
    grad,
    out,
    keys,
    length,
    num_low: tl.constexpr,
    x_stride,
    dlow_stride,
    scale,
    THRESHOLD: tl.constexpr,
    GELU: tl.constexpr,
    width: tl.constexpr,
    rows_per_part: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """With GELU, `grad` [rows, width], the gradient of GELU(x), becomes that of x on the way."""
    part, sample = tl.program_id(1), tl.program_id(2)
    k, r = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    k_ok, r_ok = _inside(k, width, BLOCK_K), _inside(r, num_low, BLOCK_R)
    for start in range(0, rows_per_part, BLOCK_M):
        token = part * rows_per_part + start + tl.arange(0, BLOCK_M)
        row, row_ok = sample.to(tl.int64) * length + token, token < length
        ok = row_ok[:, None] & k_ok[None, :]
        # first, because Triton starts only loads that tl.dot waits for ahead of their iteration
        if GELU:
            place = grad + row[:, None] * width + k[None, :]
            grad_MK = tl.load(place, mask=ok, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=ok, other=0.0)
        low_RM = tl.load(
            dlow + row[None, :] * dlow_stride + r[:, None],
            mask=r_ok[:, None] & row_ok[None, :],
            other=0.0,
        )
        if GELU:
            value, slope = gelu_and_slope(value.to(tl.float32))
            tl.store(place, slope * grad_MK, mask=ok)
        value = _kept(value, keys, sample, token, k, THRESHOLD).to(low_RM.dtype)
        total = tl.dot(low_RM, value, total, input_precision="ieee")
    part += sample * tl.num_programs(1)
    place = out + (part * num_low + r[:, None]) * width + k[None, :]
    tl.store(place, total * scale, mask=r_ok[:, None] & k_ok[None, :])


@triton.jit
def _through_b(
    dy,
    low,
    b,
    dlow,
    db,
    num_rows,
    num_low,
    rank: tl.constexpr,
    first,
    spacing,
    dy_stride,
    low_stride,
    b_stride,
    width: tl.constexpr,
    rows_per_part: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program's columns of dy lie in one layer, and so need that layer's columns of low and B
    alone.
    """
    tile, part, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, r = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    n_ok, r_ok = _inside(n, width, BLOCK_N), _inside(r, rank, BLOCK_R)
    column, begin = first + layer * spacing + n, part.to(tl.int64) * rows_per_part
    b_NR = tl.load(
        b + column[:, None] * b_stride + (layer * rank + r)[None, :],
        mask=n_ok[:, None] & r_ok[None, :],
        other=0.0,
    )
    dy += begin * dy_stride
    low += begin * low_stride + layer * rank
    dlow += (tile * num_rows + begin) * num_low + layer * rank
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, rows_per_part, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        row_ok = begin + row < num_rows
        dy_MN = tl.load(
            dy + row[:, None] * dy_stride + column[None, :],
            mask=row_ok[:, None] & n_ok[None, :],
            other=0.0,
        )
        low_ok = row_ok[:, None] & r_ok[None, :]
        low_MR = tl.load(low + row[:, None] * low_stride + r[None, :], mask=low_ok, other=0.0)
        total = tl.dot(tl.trans(dy_MN), low_MR, total, input_precision="ieee")
        tl.store(
            dlow + row[:, None] * num_low + r[None, :],
            tl.dot(dy_MN, b_NR, input_precision="ieee"),
            mask=low_ok,
        )
    place = db + ((part * tl.num_programs(2) + layer) * width + n[:, None]) * rank + r[None, :]
    tl.store(place, total, mask=n_ok[:, None] & r_ok[None, :])


@triton.jit
def _add_parts(
    parts,
    out,
    size,
    num_parts: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _sum(tl.program_id(0), parts, out, size, num_parts, ADD, BLOCK)


@triton.jit
def _add_both(
    parts,
    out,
    size,
    other_parts,
    other_out,
    other_size,
    num_parts: tl.constexpr,
    num_other_parts: tl.constexpr,
    ADD_OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two sums, for two launches would take longer than the work."""
    block, num_blocks = tl.program_id(0), tl.cdiv(size, BLOCK)
    if block < num_blocks:
        _sum(block, parts, out, size, num_parts, False, BLOCK)
    else:
        _sum(
            block - num_blocks,
            other_parts,
            other_out,
            other_size,
            num_other_parts,
            ADD_OTHER,
            BLOCK,
        )


@triton.jit
def _add_low(
    parts,
    out,
    kept,
    size,
    num_low,
    out_stride,
    num_parts: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum goes behind the rows of x, where the GEMM wants it, and with KEEP to `kept` as
    well.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    total = _total(parts, i, ok, size, num_parts)
    if KEEP:
        tl.store(kept + i, total, mask=ok)
    tl.store(out + (i // num_low).to(tl.int64) * out_stride + i % num_low, total, mask=ok)


@triton.jit
def _sum(
    block,
    parts,
    out,
    size,
    num_parts: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = block * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    total = _total(parts, i, ok, size, num_parts)
    if ADD:
        total += tl.load(out + i, mask=ok, other=0.0)
    tl.store(out + i, total, mask=ok)


@triton.jit
def _total(parts, i, ok, size, num_parts: tl.constexpr):
    total = tl.load(parts + i, mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(1, num_parts):  # unrolled: a load need not wait for the one before
        total += tl.load(parts + part * size + i, mask=ok, other=0.0).to(tl.float32)
    return total


def drop(x_BLK: Tensor, p: float, key_B: Tensor) -> Tensor:
    """drop(x), contiguous."""
    batch, length, width = x_BLK.shape
    out_BLK = x_BLK.new_empty(x_BLK.shape)
    _drop[(length, batch, triton.cdiv(width, 2048))](
        x_BLK,
        out_BLK,
        key_B,
        length,
        width,
        _row_stride(x_BLK),
        1 / (1 - p),
        THRESHOLD=threshold(p),
        BLOCK=2048,
        num_warps=4,
    )
    return out_BLK


def down(
    x_BLK: Tensor,
    a_RK: Tensor,
    p: float,
    key_B: Tensor | None,
    out_MR: Tensor,
    into_BLK: Tensor | None,
    gelu: bool,
    kept_MR: Tensor | None,
) -> None:
    batch, length, width = x_BLK.shape
    num_low, into_stride = a_RK.shape[0], 0 if into_BLK is None else _row_stride(into_BLK)
    block_m, block_k, num_warps, num_stages, num_parts = DOWN_GELU if gelu else DOWN[num_low > 64]
    columns_per_part = triton.cdiv(triton.cdiv(width, num_parts), block_k) * block_k
    num_parts = triton.cdiv(width, columns_per_part)
    parts = out_MR[None] if num_parts == 1 else out_MR.new_empty(num_parts, *out_MR.shape)
    assert kept_MR is None or kept_MR.is_contiguous()
    _down[(triton.cdiv(length, block_m), num_parts, batch)](
        x_BLK,
        a_RK,
        parts,
        into_BLK,
        key_B,
        length,
        num_low,
        _row_stride(x_BLK),
        parts.stride(1),
        parts.stride(0),
        into_stride,
        1 / (1 - p),
        THRESHOLD=threshold(p),
        GELU=gelu,
        COPY=into_BLK is not None,
        width=width,
        columns_per_part=columns_per_part,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=_block_r(num_low),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if num_parts > 1:
        _add_low[(triton.cdiv(out_MR.numel(), 1024),)](
            parts,
            out_MR,
            kept_MR,
            out_MR.numel(),
            num_low,
            out_MR.stride(0),
            num_parts=num_parts,
            KEEP=kept_MR is not None,
            BLOCK=1024,
            num_warps=4,
        )
    elif kept_MR is not None:
        kept_MR.copy_(out_MR)


def up(dlow_MR: Tensor, a_RK: Tensor, p: float, key_B: Tensor | None, out_BLK: Tensor) -> None:
    batch, length, width = out_BLK.shape
    num_low = a_RK.shape[0]
    block_m, block_k, num_warps, num_stages, num_parts = UP[num_low > 64]
    rows_per_part = triton.cdiv(triton.cdiv(length, num_parts), block_m) * block_m
    _up[(triton.cdiv(width, block_k), triton.cdiv(length, rows_per_part), batch)](
        dlow_MR,
        a_RK,
        out_BLK,
        key_B,
        length,
        num_low,
        dlow_MR.stride(0),
        1 / (1 - p),
        THRESHOLD=threshold(p),
        width=width,
        rows_per_part=rows_per_part,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=_block_r(num_low),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def gradient(
    dlow_MR: Tensor,
    x_BLK: Tensor,
    p: float,
    key_B: Tensor | None,
    scale: float,
    gelu_grad_BLK: Tensor | None,
    grad_RK: Tensor | None,
) -> Tensor | None:
    batch, length, width = x_BLK.shape
    num_low, gelu = dlow_MR.shape[1], gelu_grad_BLK is not None
    block_m, block_k, num_warps, num_stages, num_parts = (
        GRADIENT_GELU if gelu else GRADIENT[num_low > 64]
    )
    assert gelu_grad_BLK is None or gelu_grad_BLK.is_contiguous()
    # short text in as many parts would write more than it reads: at least two tiles each
    num_parts = max(min(num_parts, length // (2 * block_m)) // batch, 1)
    out = torch.empty(batch * num_parts, num_low, width, dtype=torch.float32, device=x_BLK.device)
    rows_per_part = triton.cdiv(triton.cdiv(length, num_parts), block_m) * block_m
    _gradient[(triton.cdiv(width, block_k), num_parts, batch)](
        dlow_MR,
        x_BLK,
        gelu_grad_BLK,
        out,
        key_B,
        length,
        num_low,
        _row_stride(x_BLK),
        dlow_MR.stride(0),
        scale / (1 - p),
        THRESHOLD=threshold(p),
        GELU=gelu,
        width=width,
        rows_per_part=rows_per_part,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=_block_r(num_low),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return _summed(out, grad_RK)


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
    """For layers of `width` outputs that begin at columns first, first + spacing, ... of dy."""
    (num_rows, _), num_low = dy_MN.shape, low_MR.shape[1]
    rank, dy_MN = num_low // num_layers, dy_MN if dy_MN.stride(1) == 1 else dy_MN.contiguous()
    block_m, block_n, num_warps, num_stages, num_programs = THROUGH_B[rank > 32]
    num_tiles = triton.cdiv(width, block_n)
    num_parts = max(num_programs // (num_tiles * num_layers), 1)
    rows_per_part = triton.cdiv(triton.cdiv(num_rows, num_parts), block_m) * block_m
    num_parts = triton.cdiv(num_rows, rows_per_part)
    assert max(rows_per_part * dy_MN.stride(0), num_tiles * num_rows * num_low) < 2**31, (
        "offsets are 32 bits wide"
    )
    # float16 would lose small parts, and overflow where their sum does not
    part_dtype = torch.float32 if dy_MN.dtype == torch.float16 else dy_MN.dtype
    dlow = torch.empty(num_tiles, num_rows, num_low, dtype=part_dtype, device=dy_MN.device)
    db = torch.empty(num_parts, num_layers * width, rank, dtype=torch.float32, device=dy_MN.device)
    _through_b[(num_tiles, num_parts, num_layers)](
        dy_MN,
        low_MR,
        b_NR,
        dlow,
        db,
        num_rows,
        num_low,
        rank,
        first,
        spacing,
        dy_MN.stride(0),
        low_MR.stride(0),
        b_NR.stride(0),
        width=width,
        rows_per_part=rows_per_part,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=_block_r(rank),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    out_MR, out_NR = (
        dy_MN.new_empty(num_rows, num_low),
        torch.empty_like(db[0]) if grad_NR is None else grad_NR,
    )
    assert out_NR.is_contiguous()
    _add_both[(triton.cdiv(out_MR.numel(), 1024) + triton.cdiv(out_NR.numel(), 1024),)](
        dlow,
        out_MR,
        out_MR.numel(),
        db,
        out_NR,
        out_NR.numel(),
        num_parts=num_tiles,
        num_other_parts=num_parts,
        ADD_OTHER=grad_NR is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return out_MR, out_NR if grad_NR is None else None


def _summed(parts: Tensor, grad: Tensor | None) -> Tensor | None:
    """The sum over the parts; or None, and it is added to `grad` in the same pass."""
    if grad is None and parts.shape[0] == 1:
        return parts[0]
    out = torch.empty_like(parts[0]) if grad is None else grad
    assert out.is_contiguous()
    _add_parts[(triton.cdiv(out.numel(), 1024),)](
        parts,
        out,
        out.numel(),
        num_parts=parts.shape[0],
        ADD=grad is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return out if grad is None else None


def _row_stride(x_BLK: Tensor) -> int:
    """Elements from a row to the next, which must be the same across samples."""
    assert x_BLK.stride(2) == 1 and (
        x_BLK.shape[0] == 1 or x_BLK.stride(0) == x_BLK.shape[1] * x_BLK.stride(1)
    )
    return x_BLK.stride(1)


def _block_r(num_low: int) -> int:
    return max(16, triton.next_power_of_2(num_low))
