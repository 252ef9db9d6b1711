"""The elementwise and row-wise work between the GEMMs, in float32 inside.

Each public function is the eager twin of a kernel in train/kernels/pointwise_triton.py and
chooses between the two: the kernel on a GPU, its own lines on the CPU (`kernels=False` asks for
these anywhere). None of them sends a gradient to modulation rows or norm weights: timesteps and
the base model are frozen.

Shapes: B samples, L tokens, D model width, H heads, E = D / H, K any width, N = parts * D.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """A modulation vector per token. `values` is float32 [B, 2, D]: tokens before `boundary_B`
    (int64) use row 0, the others row 1. Or [D] for all tokens, and no boundary.
    """

    values: Tensor
    boundary_B: Tensor | None

    def per_token(self, length: int) -> Tensor:
        """[B, L, D], or [D]."""
        if self.boundary_B is None:
            return self.values
        late_BL1 = (torch.arange(length, device=self.values.device) >= self.boundary_B[:, None])[
            ..., None
        ]
        return torch.where(late_BL1, self.values[:, 1:], self.values[:, :1])


def residual_norm(
    x_BLD: Tensor,
    y_BLD: Tensor | None,
    gate: Rows | None,
    shift: Rows,
    scale: Rows,
    eps: float,
    dtype: torch.dtype,
    num_spare: int = 0,
    kernels: bool = True,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * y (y None: x itself; gate None: 1) in float32, and LayerNorm(x') * scale +
    shift in `dtype`.

    `num_spare` columns stay free behind each row of the second result, here and in `gelu_tanh`:
    see train/lora/linear.py.
    """
    if kernels and x_BLD.is_cuda:
        from train.kernels.pointwise_triton import ResidualNorm

        out: tuple[Tensor, Tensor] = ResidualNorm.apply(
            x_BLD, y_BLD, gate, shift, scale, eps, dtype, num_spare
        )
        return out
    if y_BLD is not None:
        x_BLD = x_BLD + (y_BLD if gate is None else gate.per_token(x_BLD.shape[1]) * y_BLD)
    normalised_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
    length = x_BLD.shape[1]
    h_BLD = (normalised_BLD * scale.per_token(length) + shift.per_token(length)).to(dtype)
    return x_BLD, with_spare_columns(h_BLD, num_spare)


def split_norm_rope(
    x_BLN: Tensor,
    weights: tuple[Tensor, ...],
    rope: tuple[Tensor, Tensor] | None,
    num_heads: int,
    eps: float,
    kernels: bool = True,
) -> tuple[Tensor, ...]:
    """Split x into parts of D. The first len(weights) get RMSNorm over all heads together, with
    their weight, and (with `rope`: cosines and sines [L, E/2]) rotation of neighbouring pairs;
    the others pass. Each part is [B, L, D].
    """
    if kernels and x_BLN.is_cuda:
        from train.kernels.pointwise_triton import NormRope

        out: tuple[Tensor, ...] = NormRope.apply(x_BLN, weights, rope, num_heads, eps)
        return out
    parts = list(x_BLN.split(weights[0].shape[0], dim=-1))
    for i, weight_D in enumerate(weights):
        y_BLD = F.rms_norm(parts[i].float(), weight_D.shape, weight_D, eps)
        if rope is not None:
            # one angle per pair, the same for every head
            cos_L1E, sin_L1E = (table[:, None] for table in rope)
            even, odd = y_BLD.unflatten(-1, (num_heads, -1, 2)).unbind(-1)
            y_BLD = torch.stack(
                [even * cos_L1E - odd * sin_L1E, even * sin_L1E + odd * cos_L1E], dim=-1
            ).flatten(2)
        parts[i] = y_BLD.to(x_BLN.dtype)
    return tuple(parts)


def gelu_tanh(x_BLK: Tensor, num_spare: int = 0, kernels: bool = True) -> Tensor:
    if kernels and x_BLK.is_cuda:
        from train.kernels.pointwise_triton import Gelu

        out: Tensor = Gelu.apply(x_BLK, num_spare)
        return out
    return with_spare_columns(F.gelu(x_BLK, approximate="tanh"), num_spare)


def gelu_tanh_into(x_BLK: Tensor, out_BLK: Tensor, kernels: bool = True) -> None:
    """gelu_tanh(x), without a gradient."""
    if kernels and x_BLK.is_cuda:
        from train.kernels.pointwise_triton import gelu

        gelu(x_BLK, None, out_BLK)
    else:
        out_BLK.copy_(F.gelu(x_BLK, approximate="tanh"))


def gelu_tanh_backward_(grad_BLK: Tensor, x_BLK: Tensor, kernels: bool = True) -> None:
    """The gradient of gelu_tanh(x) becomes that of x, in place."""
    if kernels and x_BLK.is_cuda:
        from train.kernels.pointwise_triton import gelu

        gelu(x_BLK, grad_BLK, grad_BLK)
    else:
        grad_BLK.copy_(torch.ops.aten.gelu_backward(grad_BLK, x_BLK, approximate="tanh"))


def empty_with_spare(like: Tensor, width: int, num_spare: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, L, width] whose rows have `num_spare` free columns behind them."""
    return torch.empty(
        *like.shape[:2], row_stride(width, num_spare), dtype=dtype, device=like.device
    )[..., :width]


def row_stride(width: int, num_spare: int) -> int:
    """Elements from a row to the next: a multiple of 64 (in half precision a cache line) if any
    is spare.
    """
    return -(-(width + num_spare) // 64) * 64 if num_spare else width


def with_spare_columns(x_BLK: Tensor, num_spare: int) -> Tensor:
    """A copy of x whose rows have `num_spare` free elements behind them; x itself for 0."""
    if num_spare == 0:
        return x_BLK
    return empty_with_spare(x_BLK, x_BLK.shape[-1], num_spare, x_BLK.dtype).copy_(x_BLK)
