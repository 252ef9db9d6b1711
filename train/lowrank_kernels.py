"""Triton kernels of train/lowrank.py, whose eager lines are their twins. Dropout is a hash of the element's place.

`_drop` is elementwise and compiles for sm_70; the three with tl.dot are for sm_80 and newer. x is read once each time;
`_drop_gradient` sums over the rows in a fixed number of parts, added up afterwards in order, so that equal inputs give
equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.lowrank import threshold

NUM_PARTS = 16


@triton.jit
def _mix32(x):  # type: ignore[no-untyped-def]
    """lowrank._mix32 of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _row_hash(keys, row, ok, length):  # type: ignore[no-untyped-def]
    """Of the tokens in `row`, from their samples' keys."""
    key = tl.load(keys + row // length, mask=ok, other=0).to(tl.uint32)
    return _mix32((row % length).to(tl.uint32) * 0x9E3779B1 + key)


@triton.jit
def _column_hash(k):  # type: ignore[no-untyped-def]
    return _mix32(k.to(tl.uint32) * 0x85EBCA77) | 1


@triton.jit
def _drop(x, out, keys, length, width, x_stride, scale, THRESHOLD: tl.constexpr,  # type: ignore[no-untyped-def]
          BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = k < width
    keep = _row_hash(keys, row, True, length) * _column_hash(k) >= THRESHOLD
    value = tl.load(x + row * x_stride + k, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * width + k, tl.where(keep, value * scale, 0.0), mask=ok)


@triton.jit
def _drop_down(x, a, out, keys, num_rows, length, num_low, x_stride, out_stride, scale,  # type: ignore[no-untyped-def]
               THRESHOLD: tl.constexpr, width: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
               BLOCK_R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < num_rows
    hash_M = _row_hash(keys, row, row_ok, length)
    r = tl.arange(0, BLOCK_R)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        ok = row_ok[:, None] & (k < width)[None, :]
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=ok, other=0.0)
        value = tl.where(hash_M[:, None] * _column_hash(k)[None, :] >= THRESHOLD, value, 0.0)
        a_KR = tl.load(a + r[None, :] * width + k[:, None], mask=(r < num_low)[None, :] & (k < width)[:, None],
                       other=0.0)
        low = tl.dot(value.to(a_KR.dtype), a_KR, low, input_precision="ieee")
    tl.store(out + row[:, None] * out_stride + r[None, :], low * scale, mask=row_ok[:, None] & (r < num_low)[None, :])


@triton.jit
def _drop_up_add(dx, dlow, a, keys, num_rows, length, num_low, dx_stride, dlow_stride,  # type: ignore[no-untyped-def]
                 scale, THRESHOLD: tl.constexpr, width: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                 BLOCK_R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    row_ok, ok = row < num_rows, (row < num_rows)[:, None] & (k < width)[None, :]
    hash_M = _row_hash(keys, row, row_ok, length)
    low_MR = tl.load(dlow + row[:, None] * dlow_stride + r[None, :], mask=row_ok[:, None] & (r < num_low)[None, :],
                     other=0.0)
    a_RK = tl.load(a + r[:, None] * width + k[None, :], mask=(r < num_low)[:, None] & (k < width)[None, :], other=0.0)
    update = tl.dot(low_MR, a_RK, input_precision="ieee") * scale
    update = tl.where(hash_M[:, None] * _column_hash(k)[None, :] >= THRESHOLD, update, 0.0)
    place = dx + row[:, None] * dx_stride + k[None, :]
    tl.store(place, tl.load(place, mask=ok, other=0.0).to(tl.float32) + update, mask=ok)


@triton.jit
def _drop_gradient(dlow, x, out, keys, num_rows, length, num_low, x_stride, dlow_stride,  # type: ignore[no-untyped-def]
                   scale, THRESHOLD: tl.constexpr, width: tl.constexpr, rows_per_part: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    part = tl.program_id(1)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, rows_per_part, BLOCK_M):
        row = part.to(tl.int64) * rows_per_part + start + tl.arange(0, BLOCK_M)
        row_ok = row < num_rows
        hash_M = _row_hash(keys, row, row_ok, length)
        ok = row_ok[:, None] & (k < width)[None, :]
        value = tl.load(x + row[:, None] * x_stride + k[None, :], mask=ok, other=0.0)
        value = tl.where(hash_M[:, None] * _column_hash(k)[None, :] >= THRESHOLD, value, 0.0)
        low_RM = tl.load(dlow + row[None, :] * dlow_stride + r[:, None], mask=(r < num_low)[:, None] & row_ok[None, :],
                         other=0.0)
        total = tl.dot(low_RM, value.to(low_RM.dtype), total, input_precision="ieee")
    place = out + (part * num_low + r[:, None]) * width + k[None, :]
    tl.store(place, total * scale, mask=(r < num_low)[:, None] & (k < width)[None, :])


def drop(x_BLK: Tensor, p: float, key_B: Tensor) -> Tensor:
    """drop(x), contiguous."""
    batch, length, width = x_BLK.shape
    out_BLK = x_BLK.new_empty(x_BLK.shape)
    assert x_BLK.stride(2) == 1 and (batch == 1 or x_BLK.stride(0) == length * x_BLK.stride(1))
    _drop[(batch * length, triton.cdiv(width, 2048))](x_BLK, out_BLK, key_B, length, width, x_BLK.stride(1),
                                                      1 / (1 - p), THRESHOLD=threshold(p), BLOCK=2048, num_warps=4)
    return out_BLK


def drop_down(x_BLK: Tensor, a_RK: Tensor, p: float, key_B: Tensor | None, out_MR: Tensor) -> None:
    batch, length, width = x_BLK.shape
    num_low = a_RK.shape[0]
    _drop_down[(triton.cdiv(batch * length, 32),)](
        x_BLK, a_RK, out_MR, key_B, batch * length, length, num_low, x_BLK.stride(1), out_MR.stride(0), 1 / (1 - p),
        THRESHOLD=threshold(p), width=width, BLOCK_M=32, BLOCK_K=128, BLOCK_R=_block_r(num_low), num_warps=4)


def drop_up_add(dx_BLK: Tensor, dlow_MR: Tensor, a_RK: Tensor, p: float, key_B: Tensor | None) -> None:
    batch, length, width = dx_BLK.shape
    num_low = a_RK.shape[0]
    _drop_up_add[(triton.cdiv(batch * length, 64), triton.cdiv(width, 128))](
        dx_BLK, dlow_MR, a_RK, key_B, batch * length, length, num_low, dx_BLK.stride(1), dlow_MR.stride(0), 1 / (1 - p),
        THRESHOLD=threshold(p), width=width, BLOCK_M=64, BLOCK_K=128, BLOCK_R=_block_r(num_low), num_warps=4)


def drop_gradient(dlow_MR: Tensor, x_BLK: Tensor, p: float, key_B: Tensor | None) -> Tensor:
    batch, length, width = x_BLK.shape
    num_low, num_rows = dlow_MR.shape[1], batch * length
    parts = torch.empty(NUM_PARTS, num_low, width, dtype=torch.float32, device=x_BLK.device)
    rows_per_part = triton.cdiv(triton.cdiv(num_rows, NUM_PARTS), 64) * 64
    _drop_gradient[(triton.cdiv(width, 128), NUM_PARTS)](
        dlow_MR, x_BLK, parts, key_B, num_rows, length, num_low, x_BLK.stride(1), dlow_MR.stride(0), 1 / (1 - p),
        THRESHOLD=threshold(p), width=width, rows_per_part=rows_per_part, BLOCK_M=64, BLOCK_K=128,
        BLOCK_R=_block_r(num_low), num_warps=4)
    return parts.sum(0)


def _block_r(num_low: int) -> int:
    return max(16, triton.next_power_of_2(num_low))
