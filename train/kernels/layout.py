"""Layouts of tensors that producers, GEMMs and kernels agree on.

Padded rows. The GEMM of an adapted layer reads [x | A x] (train/lora/linear.py), so x is allocated
with padding: R more elements behind each row of K, into which A x is written later. A row then
begins `row_stride(K, R)` elements after the one before. What allocates x (a norm, GELU, an
attention kernel) is told the number of padding elements and calls `empty_padded`; 0 means plain
contiguous rows.

The [W | B] buffer. The same GEMM reads the frozen weight W [N, K] with the adapters' B in the R
columns behind it: `widen_weight`, or `weight_with_columns` where W was allocated with room for
them. Layer i of those that share the input has the outputs `spans[i]` and the i-th group of `rank`
columns; everywhere else B is zero. Rows of the buffer are `row_stride(K, R)` apart, as those of x
are.

Shapes: B samples, L tokens, M = B * L rows, D model width, K in, N out, R = rank of all adapters
of a layer together.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# elements: in half precision the 128 bytes of a cache line
_ROW_ALIGNMENT = 64


class Rows(NamedTuple):
    """A modulation vector per token.

    `values` is float32 [B, 2, D]: tokens before `boundary_B` (int64 [B]) use row 0, the others
    row 1. Or [D] for all tokens, and no boundary.
    """

    values: Tensor
    boundary_B: Tensor | None

    def per_token(self, length: int) -> Tensor:
        """[B, L, D], or [D]."""
        if self.boundary_B is None:
            return self.values
        token_L = torch.arange(length, device=self.values.device)
        uses_row_1_BL = token_L >= self.boundary_B[:, None]
        return torch.where(uses_row_1_BL[..., None], self.values[:, 1:], self.values[:, :1])


class Span(NamedTuple):
    """Rows `first` to `end` - 1 of W: the outputs of one layer among those that share an input."""

    first: int
    end: int


def round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def row_stride(width: int, num_padding: int) -> int:
    """Elements from a row to the next: a multiple of 64 if there is any padding."""
    return round_up(width + num_padding, _ROW_ALIGNMENT) if num_padding else width


def empty_padded(like: Tensor, width: int, num_padding: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, L, width] on the device of `like` [B, L, ...], with padded rows."""
    stride = row_stride(width, num_padding)
    buffer = torch.empty(*like.shape[:2], stride, dtype=dtype, device=like.device)
    return buffer[..., :width]


def pad_rows(x_BLK: Tensor, num_padding: int) -> Tensor:
    """A copy of x with padded rows; x itself for 0."""
    if num_padding == 0:
        return x_BLK
    return empty_padded(x_BLK, x_BLK.shape[-1], num_padding, x_BLK.dtype).copy_(x_BLK)


def has_padding(x_BLK: Tensor, num_padding: int) -> bool:
    """Whether x has the layout of `empty_padded`, so that A x can be written behind its rows."""
    stride = row_stride(x_BLK.shape[-1], num_padding)
    return x_BLK.stride() == (x_BLK.shape[1] * stride, stride, 1)


def rows_with_padding(x_BLK: Tensor, num_padding: int) -> Tensor:
    """The rows of a padded x together with their padding: [M, K + R], a view."""
    num_rows, width = x_BLK.shape[0] * x_BLK.shape[1], x_BLK.shape[2]
    return x_BLK.as_strided((num_rows, width + num_padding), (row_stride(width, num_padding), 1))


def as_rows(x_BLK: Tensor) -> Tensor:
    """[M, K], a view; rows of x may be padded."""
    if x_BLK.is_contiguous():
        return x_BLK.view(-1, x_BLK.shape[-1])
    return x_BLK.as_strided(
        (x_BLK.shape[0] * x_BLK.shape[1], x_BLK.shape[2]),
        (x_BLK.stride(1), 1),
        x_BLK.storage_offset(),
    )


def evenly_strided(x_BLK: Tensor) -> Tensor:
    """x if its rows are one stride apart through all samples, else a contiguous copy."""
    if x_BLK.stride(-1) == 1 and x_BLK.stride(0) == x_BLK.shape[1] * x_BLK.stride(1):
        return x_BLK
    return x_BLK.contiguous()


def common_row_stride(x_BLK: Tensor) -> int:
    """Elements from a row of x to the next, which must be the same through all samples."""
    assert x_BLK.stride(2) == 1
    assert x_BLK.shape[0] == 1 or x_BLK.stride(0) == x_BLK.shape[1] * x_BLK.stride(1)
    return x_BLK.stride(1)


def widen_weight(weight_NK: Tensor, num_low: int) -> Tensor:
    """[W | B] with B = 0: [N, K + R], rows `row_stride(K, R)` apart."""
    num_out, width = weight_NK.shape
    buffer = torch.zeros(
        num_out, row_stride(width, num_low), dtype=weight_NK.dtype, device=weight_NK.device
    )
    weight_NKR = buffer[:, : width + num_low]
    weight_NKR[:, :width] = weight_NK
    return weight_NKR


def has_columns(weight_NK: Tensor, num_low: int) -> bool:
    """Whether W lies in a [W | B] buffer for `num_low` columns of B. A contiguous W never does."""
    return num_low > 0 and weight_NK.stride() == (row_stride(weight_NK.shape[1], num_low), 1)


def weight_with_columns(weight_NK: Tensor, num_low: int) -> Tensor:
    """The [W | B] buffer that W lies in: [N, K + R], a view."""
    assert has_columns(weight_NK, num_low)
    num_out, width = weight_NK.shape
    return weight_NK.as_strided((num_out, width + num_low), weight_NK.stride())
