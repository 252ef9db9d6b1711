"""The fused LoRA linear: y = x W^T + b + scale * drop(x) A^T B^T, for several layers that read
the same x.

The base GEMM and the low-rank path are one GEMM: W is stored with B behind its columns, and x
with A x behind its own,

    y = [x | scale drop(x) A^T] [W | B]^T + b

so the large output is written once and never read again. This needs x in a buffer whose rows have
R spare columns: who makes x leaves them free when asked (train/kernels/pointwise.py, flash4), and
where x comes without them (the output of other attention) it is copied in the pass that projects
it. The same buffer is all that the backward pass keeps. There

    dlow = dy B,  dx = scale drop'(dlow A) + dy W

is a narrow GEMM, and one that starts from the low-rank part instead of from zero: no pass adds
that to dx afterwards, as [dx | dlow] = dy [W | B] would need. train/kernels/lowrank.py has the
narrow products, with dropout; one pass over dy makes both dlow and dB. With `gelu` the layer
reads GELU(u), which is made in that buffer in the pass that projects it, and made again from u in
the pass that makes dA and takes dx through GELU.

Gradients of A and B are float32: they are sums over thousands of tokens, and float16 would
overflow. Of the parameters that optim.flatten has marked, the pass that sums a gradient up adds
it to `.grad` where it lies, and autograd, which would do that in one more, gets None: such
parameters are for `backward()`, not for torch.autograd.grad.

The wide GEMMs are cuBLAS through torch, which is all that sm_70 has tensor cores for.

Shapes: M = B * L rows, K in, N out, R = number of adapted layers * rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.kernels.lowrank import dropped, gradient_a, project_down, project_up, through_b
from train.kernels.pointwise import empty_with_spare, row_stride
from train.lora.nf4 import NF4Weight


def lora_linear_eager(
    x_BLK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    scale: float,
    p: float,
    key_B: Tensor | None,
) -> Tensor:
    """The definition, and the twin that `LoRALinear` must agree with. `b_NR` is block diagonal
    over the layers.
    """
    low_BLR = F.linear(dropped(x_BLK, p, key_B, kernels=False), a_RK.to(x_BLK.dtype))
    return F.linear(x_BLK, weight_NK, bias_N) + scale * F.linear(low_BLR, b_NR.to(x_BLK.dtype))


def has_spare_columns(x_BLK: Tensor, num_spare: int) -> bool:
    """Whether x has the layout of `empty_with_spare`, so that A x can be written behind its
    rows.
    """
    stride = row_stride(x_BLK.shape[-1], num_spare)
    return x_BLK.stride() == (x_BLK.shape[1] * stride, stride, 1)


class LoRALinear(torch.autograd.Function):
    """See the module docstring. `weight` = [W | B], dense or NF4, and `a_RK` = scale * A are in
    the compute dtype; the float32 parameters `a_param` [R, K] and `b_param` [sum of adapted N,
    rank] only receive their gradients, or have them added to their `.grad` (see
    `grad_to_add_to`).

    `blocks` lists, per adapted layer in the order of A's rows, the (first row, end row) of its
    outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BLK: Tensor,
        weight: Tensor | NF4Weight,
        bias_N: Tensor,
        a_RK: Tensor,
        a_param: Tensor,
        b_param: Tensor,
        blocks: tuple[tuple[int, int], ...],
        scale: float,
        p: float,
        key_B: Tensor | None,
        gelu: bool = False,
    ) -> Tensor:
        num_low, width = a_RK.shape
        source_BLK, into_BLK = x_BLK, None
        if gelu or not has_spare_columns(x_BLK, num_low):
            x_BLK = into_BLK = empty_with_spare(x_BLK, width, num_low, x_BLK.dtype)
        # .data: writing behind x is no change of x, for autograd
        x_MKR = _with_its_spare(x_BLK.data, num_low)
        # the buffer itself is not kept then
        kept_MR = x_BLK.new_empty(x_MKR.shape[0], num_low) if gelu else None
        project_down(source_BLK, a_RK, p, key_B, x_MKR[:, width:], into_BLK, gelu, kept_MR)
        ctx.save_for_backward(
            source_BLK if gelu else x_BLK,
            kept_MR,
            weight if isinstance(weight, Tensor) else None,
            a_RK,
            key_B,
        )
        ctx.blocks, ctx.scale, ctx.p, ctx.gelu, ctx.parameters = (
            blocks,
            scale,
            p,
            gelu,
            (a_param, b_param),
        )
        ctx.nf4 = weight if isinstance(weight, NF4Weight) else None
        weight_NKR = weight.dense() if isinstance(weight, NF4Weight) else weight
        return F.linear(x_MKR, weight_NKR, bias_N).view(*x_BLK.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BLK, low_MR, weight_NKR, a_RK, key_B = ctx.saved_tensors  # x: u, with GELU
        weight_NKR = weight_NKR if ctx.nf4 is None else ctx.nf4.dense()
        num_low, width = a_RK.shape
        low_MR = _with_its_spare(x_BLK, num_low)[:, width:] if low_MR is None else low_MR
        dy_MN, dx_BLK = grads[0].flatten(0, 1), None
        a_grad, b_grad = (
            grad_to_add_to(parameter) if needed else None
            for parameter, needed in zip(ctx.parameters, ctx.needs_input_grad[4:6], strict=True)
        )
        dlow_MR, db = through_b(dy_MN, low_MR, weight_NKR[:, width:], ctx.blocks, b_grad)
        if ctx.needs_input_grad[0] or ctx.gelu:
            dx_BLK = project_up(dlow_MR, a_RK, ctx.p, key_B, x_BLK.shape)
            dx_MK = dx_BLK.view(-1, width)
            torch.addmm(dx_MK, dy_MN, weight_NKR[:, :width], out=dx_MK)
        da = gradient_a(
            dlow_MR, x_BLK, ctx.p, key_B, ctx.scale, dx_BLK if ctx.gelu else None, a_grad
        )
        return (
            dx_BLK if ctx.needs_input_grad[0] else None,
            None,
            None,
            None,
            da,
            db,
            None,
            None,
            None,
            None,
            None,
        )


def grad_to_add_to(parameter: Tensor) -> Tensor | None:
    """The `.grad` of a parameter whose owner allows adding to it in the middle of a backward
    pass: optim.flatten.
    """
    return parameter.grad if getattr(parameter, "adds_in_place", False) else None


def _with_its_spare(x_BLK: Tensor, num_spare: int) -> Tensor:
    """The rows of x together with the free columns behind them: [M, K + R]."""
    num_rows, width = x_BLK.shape[0] * x_BLK.shape[1], x_BLK.shape[2]
    return x_BLK.as_strided((num_rows, width + num_spare), (row_stride(width, num_spare), 1))
