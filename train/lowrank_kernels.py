"""Triton kernels of train/lowrank.py, whose eager lines are their twins. Dropout is a hash of the element's place.

`_drop` is elementwise and compiles for sm_70; the three with tl.dot are for sm_80 and newer. x is read once each time,
and where it is GELU(u), u is. `_gradient` sums over the rows in a fixed number of parts, added up afterwards in order,
so that equal inputs give equal bits. A program never works on rows of two samples: to tell them apart would take a
division per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.kernels import gelu_and_slope
from train.lowrank import threshold

# (rows, columns of a tile, warps, stages[, parts]), for R up to 64 and above (GELU: R = 32 only): within 1% of
# the fastest of 7 to 16 on an H200 at 11,440 rows of 3072 (GELU: 14336) in bf16. Short inputs were not tuned for.
DOWN, DOWN_GELU, UP = ((32, 128, 4, 4), (64, 64, 4, 4)), (16, 256, 4, 3), ((32, 128, 4, 1), (128, 64, 4, 1))
GRADIENT, GRADIENT_GELU = ((32, 128, 4, 4, 16), (64, 128, 4, 3, 11)), (32, 64, 4, 4, 4)


@triton.jit
def _mix32(x):  # type: ignore[no-untyped-def]
    """lowrank._mix32 of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _kept(value, keys, sample, token, k, THRESHOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The elements of a tile [token, k] that survive dropout, not yet scaled; all of them without it."""
    if THRESHOLD > 0:
        row = _mix32(token.to(tl.uint32) * 0x9E3779B1 + tl.load(keys + sample).to(tl.uint32))
        column = _mix32(k.to(tl.uint32) * 0x85EBCA77) | 1
        value = tl.where(row[:, None] * column[None, :] >= THRESHOLD, value, 0.0)
    return value


@triton.jit
def _drop(x, out, keys, length, width, x_stride, scale, THRESHOLD: tl.constexpr,  # type: ignore[no-untyped-def]
          BLOCK: tl.constexpr):
    token, sample = tl.program_id(0), tl.program_id(1)
    row = sample.to(tl.int64) * length + token
    k = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    ok = k < width
    value = tl.load(x + row * x_stride + k, mask=ok, other=0.0).to(tl.float32) * scale
    value = _kept(value[None, :], keys, sample, token + tl.arange(0, 1), k, THRESHOLD)
    tl.store(out + row * width + k, tl.reshape(value, (BLOCK,)), mask=ok)


@triton.jit
def _down(x, a, out, into, keys, length, num_low, x_stride, out_stride, into_stride,  # type: ignore[no-untyped-def]
          scale, THRESHOLD: tl.constexpr, GELU: tl.constexpr, COPY: tl.constexpr, width: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    sample, token = tl.program_id(1), tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_ok = sample.to(tl.int64) * length + token, token < length
    r = tl.arange(0, BLOCK_R)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        ok = row_ok[:, None] & (k < width)[None, :]
        a_KR = tl.load(a + r[None, :] * width + k[:, None], mask=(r < num_low)[None, :] & (k < width)[:, None],
                       other=0.0)
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=ok, other=0.0)
        if GELU:
            value = gelu_and_slope(value.to(tl.float32))[0].to(a_KR.dtype)
        if COPY:
            tl.store(into + row[:, None] * into_stride + k[None, :], value, mask=ok)
        value = _kept(value, keys, sample, token, k, THRESHOLD).to(a_KR.dtype)
        low = tl.dot(value, a_KR, low, input_precision="ieee")
    tl.store(out + row[:, None] * out_stride + r[None, :], low * scale, mask=row_ok[:, None] & (r < num_low)[None, :])


@triton.jit
def _up(dlow, a, out, keys, length, num_low, dlow_stride, scale, THRESHOLD: tl.constexpr,  # type: ignore[no-untyped-def]
        width: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    sample, token = tl.program_id(1), tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, row_ok = sample.to(tl.int64) * length + token, token < length
    k, r = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    low_MR = tl.load(dlow + row[:, None] * dlow_stride + r[None, :], mask=row_ok[:, None] & (r < num_low)[None, :],
                     other=0.0)
    a_RK = tl.load(a + r[:, None] * width + k[None, :], mask=(r < num_low)[:, None] & (k < width)[None, :], other=0.0)
    update = _kept(tl.dot(low_MR, a_RK, input_precision="ieee") * scale, keys, sample, token, k, THRESHOLD)
    tl.store(out + row[:, None] * width + k[None, :], update, mask=row_ok[:, None] & (k < width)[None, :])


@triton.jit
def _gradient(dlow, x, out, keys, length, num_low, x_stride, dlow_stride, scale,  # type: ignore[no-untyped-def]
              THRESHOLD: tl.constexpr, GELU: tl.constexpr, width: tl.constexpr, rows_per_part: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    part, sample = tl.program_id(1), tl.program_id(2)
    k, r = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, rows_per_part, BLOCK_M):
        token = part * rows_per_part + start + tl.arange(0, BLOCK_M)
        row, row_ok = sample.to(tl.int64) * length + token, token < length
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=row_ok[:, None] & (k < width)[None, :],
                        other=0.0)
        low_RM = tl.load(dlow + row[None, :] * dlow_stride + r[:, None], mask=(r < num_low)[:, None] & row_ok[None, :],
                         other=0.0)
        if GELU:
            value = gelu_and_slope(value.to(tl.float32))[0].to(low_RM.dtype)
        value = _kept(value, keys, sample, token, k, THRESHOLD).to(low_RM.dtype)
        total = tl.dot(low_RM, value, total, input_precision="ieee")
    part += sample * tl.num_programs(1)
    place = out + (part * num_low + r[:, None]) * width + k[None, :]
    tl.store(place, total * scale, mask=(r < num_low)[:, None] & (k < width)[None, :])


def drop(x_BLK: Tensor, p: float, key_B: Tensor) -> Tensor:
    """drop(x), contiguous."""
    batch, length, width = x_BLK.shape
    out_BLK = x_BLK.new_empty(x_BLK.shape)
    _drop[(length, batch, triton.cdiv(width, 2048))](x_BLK, out_BLK, key_B, length, width, _row_stride(x_BLK),
                                                     1 / (1 - p), THRESHOLD=threshold(p), BLOCK=2048, num_warps=4)
    return out_BLK


def down(x_BLK: Tensor, a_RK: Tensor, p: float, key_B: Tensor | None, out_MR: Tensor, into_BLK: Tensor | None,
         gelu: bool) -> None:
    batch, length, width = x_BLK.shape
    num_low, into_stride = a_RK.shape[0], 0 if into_BLK is None else _row_stride(into_BLK)
    block_m, block_k, num_warps, num_stages = DOWN_GELU if gelu else DOWN[num_low > 64]
    _down[(triton.cdiv(length, block_m), batch)](
        x_BLK, a_RK, out_MR, into_BLK, key_B, length, num_low, _row_stride(x_BLK), out_MR.stride(0), into_stride,
        1 / (1 - p), THRESHOLD=threshold(p), GELU=gelu, COPY=into_BLK is not None, width=width, BLOCK_M=block_m,
        BLOCK_K=block_k, BLOCK_R=_block_r(num_low), num_warps=num_warps, num_stages=num_stages)


def up(dlow_MR: Tensor, a_RK: Tensor, p: float, key_B: Tensor | None, out_BLK: Tensor) -> None:
    batch, length, width = out_BLK.shape
    num_low = a_RK.shape[0]
    block_m, block_k, num_warps, num_stages = UP[num_low > 64]
    _up[(triton.cdiv(length, block_m), batch, triton.cdiv(width, block_k))](
        dlow_MR, a_RK, out_BLK, key_B, length, num_low, dlow_MR.stride(0), 1 / (1 - p), THRESHOLD=threshold(p),
        width=width, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=_block_r(num_low), num_warps=num_warps,
        num_stages=num_stages)


def gradient(dlow_MR: Tensor, x_BLK: Tensor, p: float, key_B: Tensor | None, gelu: bool) -> Tensor:
    batch, length, width = x_BLK.shape
    num_low = dlow_MR.shape[1]
    block_m, block_k, num_warps, num_stages, num_parts = GRADIENT_GELU if gelu else GRADIENT[num_low > 64]
    num_parts = max(num_parts // batch, 1)
    out = torch.empty(batch * num_parts, num_low, width, dtype=torch.float32, device=x_BLK.device)
    rows_per_part = triton.cdiv(triton.cdiv(length, num_parts), block_m) * block_m
    _gradient[(triton.cdiv(width, block_k), num_parts, batch)](
        dlow_MR, x_BLK, out, key_B, length, num_low, _row_stride(x_BLK), dlow_MR.stride(0), 1 / (1 - p),
        THRESHOLD=threshold(p), GELU=gelu, width=width, rows_per_part=rows_per_part, BLOCK_M=block_m, BLOCK_K=block_k,
        BLOCK_R=_block_r(num_low), num_warps=num_warps, num_stages=num_stages)
    return out.sum(0)


def _row_stride(x_BLK: Tensor) -> int:
    """Elements from a row to the next, which must be the same across samples."""
    assert x_BLK.stride(2) == 1 and (x_BLK.shape[0] == 1 or x_BLK.stride(0) == x_BLK.shape[1] * x_BLK.stride(1))
    return x_BLK.stride(1)


def _block_r(num_low: int) -> int:
    return max(16, triton.next_power_of_2(num_low))
