"""Triton code of refresh.py: many small copies in one launch."""

import triton
import triton.language as tl


@triton.jit
def refresh(table, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, n) moves the i-th BLOCK elements of copy n; refresh.py documents the rows of
    `table` [copies, 6].

    Sizes are multiples of 8 elements and addresses of 16 bytes, so a thread moves eight at a
    time.
    """
    row = table + tl.program_id(1) * 6
    source = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    destination = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(HALF)), 16)
    size, width, stride = tl.load(row + 2), tl.load(row + 3).to(tl.int32), tl.load(row + 4)
    i, lane = (tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)) * 8, tl.arange(0, 8)
    ok = (i < size)[:, None]
    value = tl.load(source + i[:, None] + lane[None, :], mask=ok, other=0.0)
    value *= tl.load(row + 5).to(tl.int32).to(tl.float32, bitcast=True)
    # the source is dense, rows of the destination are `stride` apart
    place = tl.multiple_of((i // width) * stride + i % width, 8)
    tl.store(destination + place[:, None] + lane[None, :], value, mask=ok)
