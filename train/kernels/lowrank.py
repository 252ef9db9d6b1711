"""The low-rank half of a LoRA linear: products that read the wide activations once each, with
dropout by seed (dropout.py).

    forward:   low = drop(x) A^T
    backward:  dlow = dy B       dx = drop'(dlow A) + ...
               dA = dlow^T drop(x)       dB = dy^T low

Of each there are two implementations: `f_eager` is the reference in plain torch, and `f` chooses
among three ways by the device:

- sm_80 and newer, in half precision: Triton kernels with tensor cores (lowrank_launch.py) that
  hash while they read x, up to R = 256, or 128 where shared memory is small. Without dropout they
  run only where they save a pass: copying x, applying GELU, or (up to rank 64, layers of one
  width) making dlow and dB from one reading of dy;
- otherwise on a GPU, or with `tensor_cores` False: an elementwise kernel makes drop(x) and cuBLAS
  multiplies. On sm_70 tl.dot has no tensor cores;
- the CPU: the reference.

Without dropout all are plain GEMMs.

Shapes: B samples, L tokens, M = B * L, K width of x, N outputs, R = rank of all adapters
together. Rows of x may be padded (layout.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.kernels.dropout import Dropout, dropout_survivors
from train.kernels.layout import Span, as_rows
from train.kernels.pointwise import (
    gelu_tanh_backward_,
    gelu_tanh_backward_eager_,
    gelu_tanh_into,
    gelu_tanh_into_eager,
)

# largest R whose tiles fit into shared memory: sm_80 and sm_90, and all others from sm_80 on
MAX_LOW_LARGE, MAX_LOW_SMALL = 256, 128
# largest rank of one layer in the kernel that makes dlow and dB together
MAX_RANK_THROUGH_B = 64


class EvenSpans(NamedTuple):
    """Spans of `width` outputs each that begin at first, first + spacing, first + 2 spacing..."""

    first: int
    spacing: int
    width: int


def drop(x_BLK: Tensor, dropout: Dropout) -> Tensor:
    """drop(x): the elements that survive, divided by 1 - p. p = 0 returns x itself."""
    if dropout.p == 0.0 or not x_BLK.is_cuda:
        return drop_eager(x_BLK, dropout)
    from train.kernels import lowrank_launch

    return lowrank_launch.drop(x_BLK, dropout)


def drop_eager(x_BLK: Tensor, dropout: Dropout) -> Tensor:
    if dropout.p == 0.0:
        return x_BLK
    assert dropout.key_B is not None, "LoRA dropout needs the samples' seeds"
    survivors_BLK = dropout_survivors(dropout.key_B, x_BLK.shape[1], x_BLK.shape[2], dropout.p)
    return torch.where(survivors_BLK, x_BLK / (1 - dropout.p), 0)


def project_down(
    x_BLK: Tensor,
    a_RK: Tensor,
    dropout: Dropout,
    out_MR: Tensor,
    copy_BLK: Tensor | None = None,
    gelu: bool = False,
    saved_MR: Tensor | None = None,
    tensor_cores: bool = True,
) -> None:
    """out = drop(x) A^T, in x's dtype; `saved_MR`, contiguous, gets the same.

    With `copy_BLK`, x is copied there in the same pass; with `gelu` as well, GELU(x) is, and that
    is projected.
    """
    saves_a_pass = dropout.p > 0.0 or copy_BLK is not None
    if saves_a_pass and has_kernels(x_BLK, a_RK.shape[0], tensor_cores):
        from train.kernels import lowrank_launch

        lowrank_launch.down(x_BLK, a_RK, dropout, out_MR, copy_BLK, gelu, saved_MR)
    else:
        _down_by_gemm(_CHOSEN, x_BLK, a_RK, dropout, out_MR, copy_BLK, gelu, saved_MR)


def project_down_eager(
    x_BLK: Tensor,
    a_RK: Tensor,
    dropout: Dropout,
    out_MR: Tensor,
    copy_BLK: Tensor | None = None,
    gelu: bool = False,
    saved_MR: Tensor | None = None,
) -> None:
    _down_by_gemm(_EAGER, x_BLK, a_RK, dropout, out_MR, copy_BLK, gelu, saved_MR)


def project_up(
    dlow_MR: Tensor,
    a_RK: Tensor,
    dropout: Dropout,
    shape: torch.Size,
    tensor_cores: bool = True,
) -> Tensor:
    """drop'(dlow A) of `shape` [B, L, K], contiguous: dx's low-rank part."""
    if dropout.p > 0.0 and has_kernels(dlow_MR, a_RK.shape[0], tensor_cores):
        from train.kernels import lowrank_launch

        out_BLK = dlow_MR.new_empty(shape)
        lowrank_launch.up(dlow_MR, a_RK, dropout, out_BLK)
        return out_BLK
    return drop((dlow_MR @ a_RK).view(shape), dropout)


def project_up_eager(dlow_MR: Tensor, a_RK: Tensor, dropout: Dropout, shape: torch.Size) -> Tensor:
    return drop_eager((dlow_MR @ a_RK).view(shape), dropout)


def gradient_a(
    dlow_MR: Tensor,
    x_BLK: Tensor,
    dropout: Dropout,
    scale: float,
    gelu_grad_BLK: Tensor | None = None,
    grad_RK: Tensor | None = None,
    tensor_cores: bool = True,
) -> Tensor | None:
    """dA = scale dlow^T drop(x): float32 [R, K], or None where it was added to `grad_RK`.

    With `gelu_grad_BLK`, contiguous, dA is of drop(GELU(x)), and that gradient of GELU(x) becomes
    the gradient of x, in place.
    """
    saves_a_pass = dropout.p > 0.0 or gelu_grad_BLK is not None
    if saves_a_pass and has_kernels(x_BLK, dlow_MR.shape[1], tensor_cores):
        from train.kernels import lowrank_launch

        return lowrank_launch.gradient(dlow_MR, x_BLK, dropout, scale, gelu_grad_BLK, grad_RK)
    return _gradient_by_gemm(_CHOSEN, dlow_MR, x_BLK, dropout, scale, gelu_grad_BLK, grad_RK)


def gradient_a_eager(
    dlow_MR: Tensor,
    x_BLK: Tensor,
    dropout: Dropout,
    scale: float,
    gelu_grad_BLK: Tensor | None = None,
    grad_RK: Tensor | None = None,
) -> Tensor | None:
    return _gradient_by_gemm(_EAGER, dlow_MR, x_BLK, dropout, scale, gelu_grad_BLK, grad_RK)


def through_b(
    dy_MN: Tensor,
    low_MR: Tensor,
    b_NR: Tensor,
    spans: tuple[Span, ...],
    grad_NR: Tensor | None = None,
    tensor_cores: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dlow = dy B, and dB = dy^T low: float32 [sum of the adapted N, rank], or None where it was
    added to `grad_NR`.

    Layer i has the outputs `spans[i]`; in all other rows the i-th group of B's `rank` columns is
    zero.
    """
    even, rank = evenly_spaced(spans), low_MR.shape[1] // len(spans)
    if even and rank <= MAX_RANK_THROUGH_B and has_kernels(dy_MN, rank, tensor_cores):
        from train.kernels import lowrank_launch

        return lowrank_launch.through_b(
            dy_MN,
            low_MR,
            b_NR,
            first=even.first,
            spacing=even.spacing,
            width=even.width,
            num_layers=len(spans),
            grad_NR=grad_NR,
        )
    return through_b_eager(dy_MN, low_MR, b_NR, spans, grad_NR)


def through_b_eager(
    dy_MN: Tensor,
    low_MR: Tensor,
    b_NR: Tensor,
    spans: tuple[Span, ...],
    grad_NR: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    rank = low_MR.shape[1] // len(spans)
    # of all outputs and all low-rank columns, and then the blocks on its diagonal
    whole_NR = mm_float32(dy_MN.T, low_MR)
    blocks = [
        whole_NR[span.first : span.end, i * rank : (i + 1) * rank] for i, span in enumerate(spans)
    ]
    return dy_MN @ b_NR, _scaled_or_added(torch.cat(blocks), 1.0, grad_NR)


def evenly_spaced(spans: Sequence[Span]) -> EvenSpans | None:
    """What the spans have in common if all are of one width and one distance apart, else None."""
    first, width = spans[0].first, spans[0].end - spans[0].first
    spacing = spans[1].first - first if len(spans) > 1 else 0
    for i, span in enumerate(spans):
        start = first + i * spacing
        if span != (start, start + width):
            return None
    return EvenSpans(first, spacing, width)


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32: sums over thousands of tokens would overflow
    float16.
    """
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Elementwise(NamedTuple):
    """The passes beside a GEMM: chosen by the device, or the reference."""

    drop: Callable[[Tensor, Dropout], Tensor]
    gelu_into: Callable[[Tensor, Tensor], None]
    gelu_backward_: Callable[[Tensor, Tensor], None]


_CHOSEN = _Elementwise(drop, gelu_tanh_into, gelu_tanh_backward_)
_EAGER = _Elementwise(drop_eager, gelu_tanh_into_eager, gelu_tanh_backward_eager_)


def _down_by_gemm(
    passes: _Elementwise,
    x_BLK: Tensor,
    a_RK: Tensor,
    dropout: Dropout,
    out_MR: Tensor,
    copy_BLK: Tensor | None,
    gelu: bool,
    saved_MR: Tensor | None,
) -> None:
    if copy_BLK is not None:
        if gelu:
            passes.gelu_into(x_BLK, copy_BLK)
        else:
            copy_BLK.copy_(x_BLK)
        x_BLK = copy_BLK
    torch.mm(as_rows(passes.drop(x_BLK, dropout)), a_RK.T, out=out_MR)
    if saved_MR is not None:
        saved_MR.copy_(out_MR)


def _gradient_by_gemm(
    passes: _Elementwise,
    dlow_MR: Tensor,
    x_BLK: Tensor,
    dropout: Dropout,
    scale: float,
    gelu_grad_BLK: Tensor | None,
    grad_RK: Tensor | None,
) -> Tensor | None:
    value_BLK = x_BLK
    if gelu_grad_BLK is not None:
        value_BLK = torch.empty_like(gelu_grad_BLK)
        passes.gelu_into(x_BLK, value_BLK)
    da_RK = mm_float32(dlow_MR.T, as_rows(passes.drop(value_BLK, dropout)))
    if gelu_grad_BLK is not None:
        passes.gelu_backward_(gelu_grad_BLK, x_BLK)
    return _scaled_or_added(da_RK, scale, grad_RK)


def _scaled_or_added(value: Tensor, scale: float, grad: Tensor | None) -> Tensor | None:
    """scale * value; or None, and it is added to `grad`."""
    if grad is None:
        return value if scale == 1.0 else value.mul_(scale)
    grad.add_(value, alpha=scale)
    return None


def has_kernels(x: Tensor, num_low: int, tensor_cores: bool) -> bool:
    """Whether the kernels with tensor cores run here: their tiles of all R must fit into shared
    memory.
    """
    if not (tensor_cores and x.is_cuda and x.element_size() == 2):
        return False
    capability = torch.cuda.get_device_capability(x.device)
    largest = MAX_LOW_LARGE if capability in ((8, 0), (9, 0)) else MAX_LOW_SMALL
    return capability >= (8, 0) and num_low <= largest
