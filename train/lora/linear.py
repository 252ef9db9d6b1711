"""The fused LoRA linear: y = x W^T + b + scale * drop(x) A^T B^T, for several layers that read
the same x.

The base GEMM and the low-rank path are one GEMM: W is stored with B in the columns behind it, and
x with A x in its padding (train/kernels/layout.py),

    y = [x | scale drop(x) A^T] [W | B]^T + b

so the large output is written once and never read again. Norms, GELU and some attention kernels
allocate x with that padding; where x comes without it, it is copied in the pass that projects it.
The same buffer is all that is saved for the backward pass. There

    dlow = dy B,  dx = scale drop'(dlow A) + dy W

is a narrow GEMM, and one that starts from the low-rank part instead of from zero: no pass adds
that to dx afterwards, as [dx | dlow] = dy [W | B] would need. train/kernels/lowrank.py has the
narrow products, with dropout; one pass over dy makes both dlow and dB. With `gelu` the layer
reads GELU(u). It is computed into that buffer in the pass that projects it, and computed again
from u in the pass that makes dA and takes dx back through GELU.

Gradients of A and B are float32: they are sums over thousands of tokens, and float16 would
overflow.

The wide GEMMs are cuBLAS through torch, which is all that sm_70 has tensor cores for.

Shapes: B samples, L tokens, M = B * L rows, K in, N out, R = number of adapted layers * rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.kernels.dropout import Dropout
from train.kernels.layout import Span, empty_padded, has_padding, rows_with_padding
from train.kernels.lowrank import drop_eager, gradient_a, project_down, project_up, through_b
from train.lora.nf4 import NF4Weight
from train.model.tag import tagged


class AdapterParameter(nn.Parameter):
    """A float32 parameter of an adapter, whose gradient `LoRALinear` may add to `.grad` itself.

    The protocol: optim.flatten gives the parameter a `.grad` whose memory never moves, and sets
    `adds_in_place`. The kernel that sums the gradient up then adds it there, and autograd, which
    would do that in one more pass, gets None. So such a parameter is for `backward()`, not for
    torch.autograd.grad.
    """

    adds_in_place: bool = False

    def grad_to_add_to(self) -> Tensor | None:
        return self.grad if self.adds_in_place else None


class FusedLayers(NamedTuple):
    """What a `LoRALinear` call has to know beside its tensors."""

    tag: str  # of the GEMM, see train/model/tag.py
    spans: tuple[Span, ...]  # outputs of each adapted layer, in the order of A's rows
    scale: float
    gelu: bool = False
    tensor_cores: bool = True  # see train/kernels/lowrank.py


def lora_linear_eager(
    x_BLK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    scale: float,
    dropout: Dropout,
) -> Tensor:
    """The definition, and the reference implementation of `LoRALinear`. `b_NR` is block diagonal
    over the layers.
    """
    low_BLR = F.linear(drop_eager(x_BLK, dropout), a_RK.to(x_BLK.dtype))
    return F.linear(x_BLK, weight_NK, bias_N) + scale * F.linear(low_BLR, b_NR.to(x_BLK.dtype))


class LoRALinear(torch.autograd.Function):
    """See the module docstring. `weight` = [W | B], dense or NF4, and `a_RK` = scale * A are in
    the compute dtype. The float32 parameters `a_param` [R, K] and `b_param` [sum of adapted N,
    rank] are not read: they only receive their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BLK: Tensor,
        weight: Tensor | NF4Weight,
        bias_N: Tensor,
        a_RK: Tensor,
        a_param: AdapterParameter,
        b_param: AdapterParameter,
        dropout: Dropout,
        layers: FusedLayers,
    ) -> Tensor:
        num_low, width = a_RK.shape
        input_BLK, copy_BLK = x_BLK, None
        if layers.gelu or not has_padding(x_BLK, num_low):
            input_BLK = copy_BLK = empty_padded(x_BLK, width, num_low, x_BLK.dtype)
        # .data: writing into the padding of x is no change of x, for autograd
        input_MKR = rows_with_padding(input_BLK.data, num_low)
        # with GELU the buffer is not saved, but u and A x are
        low_MR = x_BLK.new_empty(input_MKR.shape[0], num_low) if layers.gelu else None
        project_down(
            x_BLK,
            a_RK,
            dropout,
            out_MR=input_MKR[:, width:],
            copy_BLK=copy_BLK,
            gelu=layers.gelu,
            saved_MR=low_MR,
            tensor_cores=layers.tensor_cores,
        )
        ctx.save_for_backward(
            x_BLK if layers.gelu else input_BLK,
            low_MR,
            weight if isinstance(weight, Tensor) else None,
            a_RK,
            dropout.key_B,
        )
        ctx.nf4 = weight if isinstance(weight, NF4Weight) else None
        ctx.p, ctx.layers, ctx.parameters = dropout.p, layers, (a_param, b_param)
        weight_NKR = weight.dense() if isinstance(weight, NF4Weight) else weight
        with tagged(layers.tag):
            y_MN = F.linear(input_MKR, weight_NKR, bias_N)
        return y_MN.view(*x_BLK.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # x is u, with GELU
        x_BLK, low_MR, weight_NKR, a_RK, key_B = ctx.saved_tensors
        layers, dropout = ctx.layers, Dropout(ctx.p, key_B)
        num_low, width = a_RK.shape
        if ctx.nf4 is not None:
            weight_NKR = ctx.nf4.dense()
        if low_MR is None:
            low_MR = rows_with_padding(x_BLK, num_low)[:, width:]
        grad_a, grad_b = (
            parameter.grad_to_add_to() if needed else None
            for parameter, needed in zip(ctx.parameters, ctx.needs_input_grad[4:6], strict=True)
        )
        dy_MN = grads[0].flatten(0, 1)
        dlow_MR, db = through_b(
            dy_MN,
            low_MR,
            b_NR=weight_NKR[:, width:],
            spans=layers.spans,
            grad_NR=grad_b,
            tensor_cores=layers.tensor_cores,
        )
        dx_BLK = None
        # dA goes through GELU only together with dx
        if ctx.needs_input_grad[0] or layers.gelu:
            dx_BLK = project_up(
                dlow_MR, a_RK, dropout, shape=x_BLK.shape, tensor_cores=layers.tensor_cores
            )
            dx_MK = dx_BLK.view(-1, width)
            torch.addmm(dx_MK, dy_MN, weight_NKR[:, :width], out=dx_MK)
        da = gradient_a(
            dlow_MR,
            x_BLK,
            dropout,
            layers.scale,
            gelu_grad_BLK=dx_BLK if layers.gelu else None,
            grad_RK=grad_a,
            tensor_cores=layers.tensor_cores,
        )
        dx = dx_BLK if ctx.needs_input_grad[0] else None
        return dx, None, None, None, da, db, None, None
