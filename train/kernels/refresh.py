"""Bring the adapters' copies in the compute dtype up to date: A, scaled, and B's columns of the
[W | B] buffer (layout.py) are copies of float32 parameters.

A model has hundreds of them, and one launch for each would cost milliseconds a step. So on a GPU
one kernel makes all copies, driven by a table in device memory with a row per copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.kernels.layout import round_up

_BLOCK = 4096
# the kernel moves this many elements at a time
_ALIGNMENT, _ALIGNMENT_BYTES = 8, 16


class Copy(NamedTuple):
    """destination = factor * source. Rows of the destination may lie apart; the source is a
    contiguous float32 matrix.
    """

    destination: Tensor
    source: Tensor
    factor: float


class CopyTable(NamedTuple):
    """What the kernel reads: int64 [copies, 6], see `copy_table`. Valid as long as the tensors of
    its copies keep their memory.
    """

    rows: Tensor
    max_size: int  # elements of the largest copy
    dtype: torch.dtype  # of all destinations


def refresh_eager(copies: Sequence[Copy]) -> None:
    """Make all copies, one after another."""
    with torch.no_grad():
        for copy in copies:
            copy.destination.copy_(copy.source * copy.factor)


def copy_table(copies: Sequence[Copy]) -> CopyTable:
    """The table that `refresh` takes. Widths and row strides must be multiples of 8 elements."""
    dtype = copies[0].destination.dtype
    rows = []
    for copy in copies:
        assert copy.source.is_contiguous() and copy.source.dtype == torch.float32
        assert copy.destination.stride(1) == 1 and copy.destination.dtype == dtype
        for tensor in (copy.destination, copy.source):
            assert tensor.data_ptr() % _ALIGNMENT_BYTES == 0, "moved 8 at a time"
            assert tensor.shape[1] % _ALIGNMENT == tensor.stride(0) % _ALIGNMENT == 0
        # the columns that refresh_triton.refresh reads, by position
        rows.append(
            (
                copy.source.data_ptr(),
                copy.destination.data_ptr(),
                copy.source.numel(),
                copy.source.shape[1],  # width of a row, of source and destination
                copy.destination.stride(0),  # elements from a row to the next
                _float32_bits(copy.factor),
            )
        )
    return CopyTable(
        rows=torch.tensor(rows, dtype=torch.int64).to(copies[0].destination.device),
        max_size=max(copy.source.numel() for copy in copies),
        dtype=dtype,
    )


def refresh(table: CopyTable) -> None:
    """Make all copies of `table`, in one launch of the Triton kernel."""
    import triton.language as tl

    from train.kernels import refresh_triton as kernels

    half_types = {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }
    num_blocks = round_up(table.max_size, _BLOCK) // _BLOCK
    kernels.refresh[(num_blocks, table.rows.shape[0])](
        table=table.rows,
        HALF=half_types[table.dtype],
        BLOCK=_BLOCK,
        num_warps=8,
    )


def _float32_bits(value: float) -> int:
    """The bits of a float32, as the int32 that has the same."""
    return int(torch.tensor(value).view(torch.int32).item())
