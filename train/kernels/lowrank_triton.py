"""Triton code of the low-rank products with tensor cores, for sm_80 and newer.

The reference implementations are in lowrank.py, the launches in lowrank_launch.py. x is read once
each time, and where it is GELU(u), u is; dy is read once for both of its products. A program
never works on rows of two samples where dropout needs to know them: telling them apart would take
a division per row. Long sums are made in parts, which sums_triton.py adds up.
"""

import triton
import triton.language as tl

from train.kernels.dropout_triton import surviving
from train.kernels.pointwise_triton import gelu_and_slope


@triton.jit
def _inside(i, size: tl.constexpr, step: tl.constexpr):
    """i < size, for programs that go from 0 in whole steps: no test where whole steps make up the
    size.
    """
    return i < size if size % step else i == i


@triton.jit
def down(
    x,
    a,
    out,
    copy,
    keys,
    length,
    num_low: tl.constexpr,
    x_stride,
    out_stride,
    part_stride,
    copy_stride,
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
    """out [parts, rows, R] = scale drop(x) A^T over one part of the K columns. With GELU, x is
    GELU of what is read; with COPY, x is written to `copy` as well.
    """
    # grid: tiles of tokens, parts of K, samples
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
            tl.store(copy + row[:, None] * copy_stride + k[None, :], value, mask=ok)
        # 1 / (1 - p) is in `scale`, once for the whole sum
        value = surviving(value, keys, sample, token, k, THRESHOLD).to(a_KR.dtype)
        low = tl.dot(value, a_KR, low, input_precision="ieee")
    place = out + part * part_stride + row[:, None] * out_stride + r[None, :]
    tl.store(place, low * scale, mask=row_ok[:, None] & r_ok[None, :])


@triton.jit
def up(
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
    """out [rows, K] = scale drop'(dlow A). A program keeps its columns of A and walks over the
    tokens of one part.
    """
    # grid: tiles of K, parts of the tokens, samples
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
        update = surviving(
            tl.dot(low_MR, a_RK, input_precision="ieee"), keys, sample, token, k, THRESHOLD, scale
        )
        tl.store(
            out + row[:, None] * width + k[None, :], update, mask=row_ok[:, None] & k_ok[None, :]
        )


@triton.jit
def gradient(
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
    """out [samples * parts, R, K] = scale dlow^T drop(x) over one part of a sample's tokens. With
    GELU, x is GELU of what is read, and `grad` [rows, K], the gradient of GELU(x), becomes the
    gradient of what is read.
    """
    # grid: tiles of K, parts of the tokens, samples
    part, sample = tl.program_id(1), tl.program_id(2)
    k, r = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    k_ok, r_ok = _inside(k, width, BLOCK_K), _inside(r, num_low, BLOCK_R)
    for start in range(0, rows_per_part, BLOCK_M):
        token = part * rows_per_part + start + tl.arange(0, BLOCK_M)
        row, row_ok = sample.to(tl.int64) * length + token, token < length
        ok = row_ok[:, None] & k_ok[None, :]
        # first, because only loads that a tl.dot waits for are started an iteration ahead
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
        value = surviving(value, keys, sample, token, k, THRESHOLD).to(low_RM.dtype)
        total = tl.dot(low_RM, value, total, input_precision="ieee")
    # parts of all samples are added up together
    part += sample * tl.num_programs(1)
    place = out + (part * num_low + r[:, None]) * width + k[None, :]
    tl.store(place, total * scale, mask=r_ok[:, None] & k_ok[None, :])


@triton.jit
def through_b(
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
    """dlow [tiles, rows, R] = dy B over one tile of columns, and db [parts, layers * width, rank]
    = dy^T low over one part of the rows, from one reading of dy.

    A program's columns of dy lie in one layer, and so need that layer's columns of low and B
    alone.
    """
    # grid: tiles of a layer's outputs, parts of the rows, layers
    tile, part, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, r = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    n_ok, r_ok = _inside(n, width, BLOCK_N), _inside(r, rank, BLOCK_R)
    column, begin = first + layer * spacing + n, part.to(tl.int64) * rows_per_part
    b_NR = tl.load(
        b + column[:, None] * b_stride + (layer * rank + r)[None, :],
        mask=n_ok[:, None] & r_ok[None, :],
        other=0.0,
    )
    # 64 bits wide once, and 32 in the loop
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
        # both products from the one tile of dy
        total = tl.dot(tl.trans(dy_MN), low_MR, total, input_precision="ieee")
        tl.store(
            dlow + row[:, None] * num_low + r[None, :],
            tl.dot(dy_MN, b_NR, input_precision="ieee"),
            mask=low_ok,
        )
    place = db + ((part * tl.num_programs(2) + layer) * width + n[:, None]) * rank + r[None, :]
    tl.store(place, total, mask=n_ok[:, None] & r_ok[None, :])
