"""The fused LoRA linear: y = x W^T + b + scale * drop(x) A^T B^T, for several layers that read the same x.

The base GEMM and the low-rank path are one GEMM: W is stored with B behind its columns, and x with A x behind its own,

    y = [x | scale drop(x) A^T] [W | B]^T + b        [dx | dh] = dy [W | B],  dx += scale drop'(dh A)

so the large output is written once and never read again. This needs x in a buffer whose rows have R spare columns:
who makes x leaves them free when asked (train/elementwise.py), and where x comes without them (attention's output) it
is copied. The same buffer is all that the backward pass keeps. Dropout masks are computed from a seed both times: none
is kept (while one is made, it costs several int64 tensors of x's size), and they depend on the sample alone, never on
the rank or micro-batch.
Gradients of A and B are float32: they are sums over thousands of tokens, and float16 would overflow.

Everything here is cuBLAS through torch, which is all that sm_70 has tensor cores for.

Shapes: M = B * L rows, K in, N out, R = number of adapted layers * rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.elementwise import with_spare_columns

_MASK32 = 0xFFFFFFFF


def dropout_keep(seeds_B: Tensor, layer: int, length: int, width: int, p: float) -> Tensor:
    """Which elements survive: bool [B, L, K], a pure function of (sample seed, layer, token, channel).

    A 32-bit integer hash in int64 arithmetic, so that the CPU, the GPU and a kernel give the same mask.
    """
    key_B = _mix32((seeds_B & _MASK32) ^ _mix32((seeds_B >> 32) ^ (layer * 0x9E3779B1 & _MASK32)))
    index_LK = torch.arange(length * width, device=seeds_B.device).view(length, width)
    return _mix32((index_LK * 0x9E3779B1 + key_B[:, None, None]) & _MASK32) >= int(p * 2**32)


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit finaliser (the constants of MurmurHash3) on int64 values below 2**32."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def dropped(x_BLK: Tensor, p: float, seeds_B: Tensor | None, layer: int) -> Tensor:
    """drop(x): surviving elements divided by 1 - p. p = 0 returns x itself."""
    if p == 0.0:
        return x_BLK
    assert seeds_B is not None, "LoRA dropout needs the samples' seeds"
    keep_BLK = dropout_keep(seeds_B, layer, x_BLK.shape[1], x_BLK.shape[2], p)
    return torch.where(keep_BLK, x_BLK / (1 - p), 0)


def lora_linear_eager(x_BLK: Tensor, weight_NK: Tensor, bias_N: Tensor, a_RK: Tensor, b_NR: Tensor, scale: float,
                      p: float, seeds_B: Tensor | None, layer: int) -> Tensor:
    """The definition, and the twin that `LoRALinear` must agree with. `b_NR` is block diagonal over the layers."""
    low_BLR = F.linear(dropped(x_BLK, p, seeds_B, layer), a_RK.to(x_BLK.dtype))
    return F.linear(x_BLK, weight_NK, bias_N) + scale * F.linear(low_BLR, b_NR.to(x_BLK.dtype))


def has_spare_columns(x_BLK: Tensor, num_spare: int) -> bool:
    """Whether the rows of x lie `num_spare` free elements apart, so that A x can be written behind them."""
    width = x_BLK.shape[-1] + num_spare
    return x_BLK.stride() == (x_BLK.shape[1] * width, width, 1)


class LoRALinear(torch.autograd.Function):
    """See the module docstring. `weight_NKR` = [W | B] and `a_RK` are in the compute dtype; the float32 parameters
    `a_param` [R, K] and `b_param` [sum of adapted N, rank] are passed only to receive their gradients.

    `blocks` lists, per adapted layer in the order of A's rows, the (first row, end row) of its outputs.
    """

    @staticmethod
    def forward(ctx: Any, x_BLK: Tensor, weight_NKR: Tensor, bias_N: Tensor, a_RK: Tensor, a_param: Tensor,
                b_param: Tensor, blocks: tuple[tuple[int, int], ...], scale: float, p: float, seeds_B: Tensor | None,
                layer: int) -> Tensor:
        num_low, width = a_RK.shape
        if not has_spare_columns(x_BLK, num_low):
            x_BLK = with_spare_columns(x_BLK, num_low)
        x_MKR = _with_its_spare(x_BLK, num_low)
        torch.addmm(x_MKR.new_zeros(()), dropped(x_BLK, p, seeds_B, layer).flatten(0, 1), a_RK.T, beta=0, alpha=scale,
                    out=x_MKR[:, width:])
        ctx.save_for_backward(x_BLK, weight_NKR, a_RK, seeds_B)
        ctx.blocks, ctx.scale, ctx.p, ctx.layer = blocks, scale, p, layer
        return F.linear(x_MKR, weight_NKR, bias_N).view(*x_BLK.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BLK, weight_NKR, a_RK, seeds_B = ctx.saved_tensors
        num_low, width = a_RK.shape
        dy_MN, low_MR = grads[0].flatten(0, 1), _with_its_spare(x_BLK, num_low)[:, width:]
        db_NR = _mm_float32(dy_MN.T, low_MR)
        rank = num_low // len(ctx.blocks)
        db = torch.cat([db_NR[start:end, i * rank:(i + 1) * rank] for i, (start, end) in enumerate(ctx.blocks)])
        dx_BLK = None
        if ctx.needs_input_grad[0]:
            dx_MKR = dy_MN @ weight_NKR
            dx_MK, dlow_MR = dx_MKR[:, :width], dx_MKR[:, width:]
            if ctx.p == 0.0:
                dx_MK.addmm_(dlow_MR, a_RK, alpha=ctx.scale)
            else:
                dx_MK += dropped((ctx.scale * (dlow_MR @ a_RK)).view(x_BLK.shape), ctx.p, seeds_B,
                                 ctx.layer).flatten(0, 1)
            dx_BLK = dx_MK.view(x_BLK.shape)
        else:
            dlow_MR = dy_MN @ weight_NKR[:, width:]
        da = _mm_float32(dlow_MR.T, dropped(x_BLK, ctx.p, seeds_B, ctx.layer).flatten(0, 1)) * ctx.scale
        return dx_BLK, None, None, None, da, db, None, None, None, None, None


def _with_its_spare(x_BLK: Tensor, num_spare: int) -> Tensor:
    """The rows of x together with the free columns behind them: [M, K + R]."""
    num_rows, width = x_BLK.shape[0] * x_BLK.shape[1], x_BLK.shape[2] + num_spare
    return x_BLK.as_strided((num_rows, width), (width, 1))


def _mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
