"""Triton kernels of train/kernels/attention_gemm.py, where their reference implementations stand.

Only elementwise arithmetic and row reductions, so they compile for sm_70; no tl.dot. Rows may be
of any length: each program loops over blocks of columns. A row of 46,800 float16 values doesn't
fit into registers, but what a program reads twice it finds in the L1 or L2 cache.

Rows have padding behind them up to a multiple of 64 elements. Programs read and write it, so that
loads stay wide where the length is no multiple of anything, and leave zeros there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that a program has in registers at a time, and how many of them are a warp's.
MAX_BLOCK, WARP_COLUMNS = 4096, 512
DOT_ROWS = 16


def block_and_warps(num_keys: int) -> tuple[int, int]:
    """The size of a block of columns for rows of this length, and the warps of a program."""
    block = min(max(triton.next_power_of_2(num_keys), WARP_COLUMNS), MAX_BLOCK)
    return block, block // WARP_COLUMNS


@triton.jit
def _softmax(
    s,
    lse,
    num_keys,
    row_stride,
    s_head,
    lse_head,
    P_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    s += head * s_head + row * row_stride
    columns = tl.arange(0, BLOCK)
    # The first maximum is finite: -inf less -inf would be NaN.
    largest, total = -1e30, 0.0
    for block in range(NUM_BLOCKS):
        at = block * BLOCK + columns
        x = tl.load(s + at, mask=at < row_stride, other=0.0).to(tl.float32)
        x = tl.where(at < num_keys, x, float("-inf"))
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    log_sum = largest + tl.log(total)
    tl.store(lse + head * lse_head + row, log_sum)
    for block in range(NUM_BLOCKS):
        at = block * BLOCK + columns
        x = tl.load(s + at, mask=at < row_stride, other=0.0).to(tl.float32)
        x = tl.where(at < num_keys, x, float("-inf"))
        tl.store(s + at, tl.exp(x - log_sum) * P_SCALE, mask=at < row_stride)


@triton.jit
def _softmax_backward(
    s,
    dp,
    lse,
    delta,
    num_keys,
    row_stride,
    s_head,
    statistics_head,
    P_SCALE: tl.constexpr,
    DS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok, inside = at < row_stride, at < num_keys
    place = head * s_head + row * row_stride + at
    statistics = head * statistics_head + row
    x = tl.load(s + place, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(dp + place, mask=ok, other=0.0).to(tl.float32)
    # The padding may hold anything, NaN too.
    x = tl.where(inside, x, float("-inf"))
    grad = tl.where(inside, grad, 0.0) - tl.load(delta + statistics)
    probability = tl.exp(x - tl.load(lse + statistics))
    tl.store(s + place, probability * P_SCALE, mask=ok)
    tl.store(dp + place, probability * grad * DS_SCALE, mask=ok)


@triton.jit
def _row_dots(
    x,
    y,
    out,
    num_heads,
    num_rows,
    x_sample,
    x_head,
    x_row,
    y_sample,
    y_head,
    y_row,
    y_column,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample_and_head = tl.program_id(1)
    sample = (sample_and_head // num_heads).to(tl.int64)
    head = (sample_and_head % num_heads).to(tl.int64)
    e = tl.arange(0, BLOCK)[None, :]
    ok = (rows < num_rows)[:, None] & (e < WIDTH)
    at = rows[:, None].to(tl.int64)
    x += sample * x_sample + head * x_head
    y += sample * y_sample + head * y_head
    product = tl.load(x + at * x_row + e, mask=ok, other=0.0).to(tl.float32)
    product *= tl.load(y + at * y_row + e * y_column, mask=ok, other=0.0).to(tl.float32)
    place = out + sample_and_head.to(tl.int64) * num_rows + rows
    tl.store(place, tl.sum(product, 1), mask=rows < num_rows)


def softmax_(s_NLS: Tensor, lse_NL: Tensor, p_scale: float) -> None:
    num_heads, num_rows, num_keys = s_NLS.shape
    block, num_warps = block_and_warps(num_keys)
    _softmax[(num_rows, num_heads)](
        s_NLS,
        lse_NL,
        num_keys,
        s_NLS.stride(1),
        s_NLS.stride(0),
        lse_NL.stride(0),
        P_SCALE=p_scale,
        BLOCK=block,
        NUM_BLOCKS=triton.cdiv(num_keys, block),
        num_warps=num_warps,
    )


def softmax_backward_(
    s_NLS: Tensor,
    dp_NLS: Tensor,
    lse_NL: Tensor,
    delta_NL: Tensor,
    p_scale: float,
    ds_scale: float,
) -> None:
    num_heads, num_rows, num_keys = s_NLS.shape
    block, num_warps = block_and_warps(num_keys)
    _softmax_backward[(num_rows, triton.cdiv(num_keys, block), num_heads)](
        s_NLS,
        dp_NLS,
        lse_NL,
        delta_NL,
        num_keys,
        s_NLS.stride(1),
        s_NLS.stride(0),
        lse_NL.stride(0),
        P_SCALE=p_scale,
        DS_SCALE=ds_scale,
        BLOCK=block,
        num_warps=num_warps,
    )


def row_dots(x_BHLE: Tensor, y_BHLE: Tensor) -> Tensor:
    num_samples, num_heads, num_rows, width = x_BHLE.shape
    out_BHL = x_BHLE.new_empty(x_BHLE.shape[:3], dtype=torch.float32)
    _row_dots[(triton.cdiv(num_rows, DOT_ROWS), num_samples * num_heads)](
        x_BHLE,
        y_BHLE,
        out_BHL,
        num_heads,
        num_rows,
        *x_BHLE.stride()[:3],
        *y_BHLE.stride(),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        ROWS=DOT_ROWS,
        num_warps=4,
    )
    return out_BHL
