"""Triton code of dropout.py: which elements survive, as a hash of the element's place.

Elementwise, so it compiles for sm_70 as well.
"""

import triton
import triton.language as tl


@triton.jit
def _mix32(x):
    """dropout._mix32, of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def surviving(value, keys, sample, token, k, THRESHOLD: tl.constexpr, scale=1.0):
    """A tile [token, k] with the elements set to zero that dropout drops. float32 values are
    multiplied by `scale` as well. Without dropout (THRESHOLD = 0) nothing is dropped.

    Unlike in the reference implementation, a float32 inf or NaN that is dropped becomes NaN: the
    step is lost to it anyway.
    """
    if THRESHOLD > 0:
        row = _mix32(token.to(tl.uint32) * 0x9E3779B1 + tl.load(keys + sample).to(tl.uint32))
        column = _mix32(k.to(tl.uint32) * 0x85EBCA77) | 1
        survives = row[:, None] * column[None, :] >= THRESHOLD
        # a tl.where of float32 values would come after they are packed to half precision, and
        # cost twice as much as this product
        if value.dtype == tl.float32:
            value *= tl.where(survives, scale, 0.0)
        else:
            value = tl.where(survives, value, 0.0)
    elif value.dtype == tl.float32:
        value *= scale
    return value


@triton.jit
def drop(
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
    value = surviving(value[None, :], keys, sample, token + tl.arange(0, 1), k, THRESHOLD, scale)
    tl.store(out + row * width + k, tl.reshape(value, (BLOCK,)), mask=ok)
