"""The elementwise and row-wise work between the GEMMs, in float32 inside.

Every function here is the eager twin of its kernel: what it computes is what the kernel must agree with. None of them
sends a gradient to the modulation: timesteps and the base model's tables are frozen.

Shapes: B samples, L tokens, D model width, H heads, E = D / H, R = 2 modulation rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Modulation(NamedTuple):
    """normalised * scale + shift. With `boundary_B` (int64, tokens at the start that use row 0) both are float32
    [B, R, D]; without it they are [D]."""

    shift: Tensor
    scale: Tensor
    boundary_B: Tensor | None


def select_rows(rows_BRD: Tensor, boundary_B: Tensor, length: int) -> Tensor:
    """Per token the row it uses: [B, L, D]; row 0 before the boundary, row 1 from it on."""
    after_BL1 = (torch.arange(length, device=rows_BRD.device) >= boundary_B[:, None])[..., None]
    return torch.where(after_BL1, rows_BRD[:, 1:], rows_BRD[:, :1])


def modulated_norm(x_BLD: Tensor, modulation: Modulation, eps: float, dtype: torch.dtype,
                   num_spare: int = 0) -> Tensor:
    """LayerNorm without parameters of float32 x, then scale and shift; the result in `dtype`, a GEMM's input.

    `num_spare` columns stay free behind each row of the result, here and in `gelu_tanh`: see train/fused.py.
    """
    shift, scale, boundary_B = modulation
    normalised_BLD = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
    if boundary_B is not None:
        shift = select_rows(shift, boundary_B, x_BLD.shape[1])
        scale = select_rows(scale, boundary_B, x_BLD.shape[1])
    return _with_spare((normalised_BLD * scale + shift).to(dtype), num_spare)


def gated_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BRD: Tensor | None, boundary_B: Tensor | None) -> Tensor:
    """x + gate * y in float32; gate None means 1."""
    if gate_BRD is None or boundary_B is None:
        return x_BLD + y_BLD
    return x_BLD + select_rows(gate_BRD, boundary_B, x_BLD.shape[1]) * y_BLD


def qk_norm_rope(x_BLD: Tensor, weight_D: Tensor, rope: tuple[Tensor, Tensor] | None, num_heads: int,
                 eps: float) -> Tensor:
    """RMSNorm over all heads together, then (with `rope`) rotation of neighbouring pairs; in and out [B, L, D]."""
    y_BLD = F.rms_norm(x_BLD.float(), x_BLD.shape[-1:], weight_D, eps)
    if rope is not None:
        cos_L1E, sin_L1E = (table[:, None] for table in rope)  # one angle per pair, the same for every head
        even, odd = y_BLD.unflatten(-1, (num_heads, -1, 2)).unbind(-1)
        y_BLD = torch.stack([even * cos_L1E - odd * sin_L1E, even * sin_L1E + odd * cos_L1E], dim=-1).flatten(2)
    return y_BLD.to(x_BLD.dtype)


def gelu_tanh(x_BLK: Tensor, num_spare: int = 0) -> Tensor:
    return _with_spare(F.gelu(x_BLK, approximate="tanh"), num_spare)


def _with_spare(x_BLK: Tensor, num_spare: int) -> Tensor:
    if num_spare == 0:
        return x_BLK
    width = x_BLK.shape[-1]
    buffer = x_BLK.new_empty(*x_BLK.shape[:-1], width + num_spare)
    buffer[..., :width] = x_BLK
    return buffer[..., :width]
