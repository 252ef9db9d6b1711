"""The elementwise and row-wise work between the GEMMs, in float32 inside.

Of each operation there are two implementations: `f_eager` is the reference in plain torch, and
`f` runs the Triton kernels on a GPU (pointwise_launch.py, pointwise_triton.py) and the reference
on the CPU. None of them sends a gradient to modulation rows or norm weights: timesteps and the
base model are frozen.

`num_padding` asks for padded rows of the result, see layout.py.

Shapes: B samples, L tokens, D model width, H heads, E = D / H, K any width, N = parts * D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.kernels.layout import Rows, pad_rows


def residual_norm(
    x_BLD: Tensor,
    y_BLD: Tensor | None,
    gate: Rows | None,
    shift: Rows,
    scale: Rows,
    eps: float,
    dtype: torch.dtype,
    num_padding: int = 0,
) -> tuple[Tensor, Tensor]:
    """Add a pending residual to the stream and normalise it, in one pass.

    Returns x' = x + gate * y in float32 (y None: x itself; gate None: 1), and LayerNorm(x') *
    scale + shift in `dtype`, the latter with padded rows. x is float32.
    """
    if not x_BLD.is_cuda:
        return residual_norm_eager(x_BLD, y_BLD, gate, shift, scale, eps, dtype, num_padding)
    from train.kernels.pointwise_launch import ResidualNorm

    out: tuple[Tensor, Tensor] = ResidualNorm.apply(
        x_BLD, y_BLD, gate, shift, scale, eps, dtype, num_padding
    )
    return out


def residual_norm_eager(
    x_BLD: Tensor,
    y_BLD: Tensor | None,
    gate: Rows | None,
    shift: Rows,
    scale: Rows,
    eps: float,
    dtype: torch.dtype,
    num_padding: int = 0,
) -> tuple[Tensor, Tensor]:
    length = x_BLD.shape[1]
    if y_BLD is not None:
        x_BLD = x_BLD + (y_BLD if gate is None else gate.per_token(length) * y_BLD)
    normalised_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
    h_BLD = (normalised_BLD * scale.per_token(length) + shift.per_token(length)).to(dtype)
    return x_BLD, pad_rows(h_BLD, num_padding)


def split_norm_rope(
    x_BLN: Tensor,
    weights: tuple[Tensor, ...],
    rope: tuple[Tensor, Tensor] | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Split x into parts of D. The first len(weights) get RMSNorm over all heads together, with
    their weight, and (with `rope`: cosines and sines, float32 [L, E/2]) rotation of neighbouring
    pairs; the others pass unchanged. Each part is [B, L, D].
    """
    if not x_BLN.is_cuda:
        return split_norm_rope_eager(x_BLN, weights, rope, num_heads, eps)
    from train.kernels.pointwise_launch import NormRope

    out: tuple[Tensor, ...] = NormRope.apply(x_BLN, weights, rope, num_heads, eps)
    return out


def split_norm_rope_eager(
    x_BLN: Tensor,
    weights: tuple[Tensor, ...],
    rope: tuple[Tensor, Tensor] | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    parts = list(x_BLN.split(weights[0].shape[0], dim=-1))
    for i, weight_D in enumerate(weights):
        y_BLD = F.rms_norm(parts[i].float(), weight_D.shape, weight_D, eps)
        if rope is not None:
            # one angle per pair, the same for every head
            cos_L1E, sin_L1E = (table[:, None] for table in rope)
            even, odd = y_BLD.unflatten(-1, (num_heads, -1, 2)).unbind(-1)
            rotated = [even * cos_L1E - odd * sin_L1E, even * sin_L1E + odd * cos_L1E]
            y_BLD = torch.stack(rotated, dim=-1).flatten(2)
        parts[i] = y_BLD.to(x_BLN.dtype)
    return tuple(parts)


def gelu_tanh(x_BLK: Tensor, num_padding: int = 0) -> Tensor:
    """GELU by its tanh approximation, with padded rows."""
    if not x_BLK.is_cuda:
        return gelu_tanh_eager(x_BLK, num_padding)
    from train.kernels.pointwise_launch import Gelu

    out: Tensor = Gelu.apply(x_BLK, num_padding)
    return out


def gelu_tanh_eager(x_BLK: Tensor, num_padding: int = 0) -> Tensor:
    return pad_rows(F.gelu(x_BLK, approximate="tanh"), num_padding)


def gelu_tanh_into(x_BLK: Tensor, out_BLK: Tensor) -> None:
    """gelu_tanh(x) into `out`, without a gradient."""
    if not x_BLK.is_cuda:
        gelu_tanh_into_eager(x_BLK, out_BLK)
        return
    from train.kernels.pointwise_launch import gelu

    gelu(x_BLK, None, out_BLK)


def gelu_tanh_into_eager(x_BLK: Tensor, out_BLK: Tensor) -> None:
    out_BLK.copy_(F.gelu(x_BLK, approximate="tanh"))


def gelu_tanh_backward_(grad_BLK: Tensor, x_BLK: Tensor) -> None:
    """The gradient of gelu_tanh(x) becomes that of x, in place."""
    if not x_BLK.is_cuda:
        gelu_tanh_backward_eager_(grad_BLK, x_BLK)
        return
    from train.kernels.pointwise_launch import gelu

    gelu(x_BLK, grad_BLK, grad_BLK)


def gelu_tanh_backward_eager_(grad_BLK: Tensor, x_BLK: Tensor) -> None:
    grad_BLK.copy_(torch.ops.aten.gelu_backward(grad_BLK, x_BLK, approximate="tanh"))
