"""Triton code that adds up the parts in which lowrank_triton.py makes long sums.

In order, so that equal inputs give equal bits. Elementwise, so it compiles for sm_70 as well.
"""

import triton
import triton.language as tl


@triton.jit
def add_parts(
    parts,
    out,
    size,
    num_parts: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [size] = the sum of parts [num_parts, size]; with ADD it is added to `out`."""
    _sum(tl.program_id(0), parts, out, size, num_parts, ADD, BLOCK)


@triton.jit
def add_both(
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
    """Two sums in one launch: two launches would take longer than the work."""
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
def add_low(
    parts,
    out,
    saved,
    size,
    num_low,
    out_stride,
    num_parts: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum goes to rows `out_stride` apart, into the padding of x where the GEMM reads it, and
    with SAVE to the contiguous `saved` as well.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    total = _total(parts, i, ok, size, num_parts)
    if SAVE:
        tl.store(saved + i, total, mask=ok)
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
    # unrolled, so that a load need not wait for the one before
    for part in tl.static_range(1, num_parts):
        total += tl.load(parts + part * size + i, mask=ok, other=0.0).to(tl.float32)
    return total
