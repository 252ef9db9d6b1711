"""Attention as plain GEMMs with row-wise kernels between them: for cards whose fused kernels leave
the tensor cores idle, V100 above all, and for long sequences.

Forward: S = scale q k^T, P = softmax(S), out = P v. Backward: S and P again, dP = dout v^T,
dS = P (dP - delta) with delta = rowsum(dout out), then dv = P^T dout, dk = scale dS^T q and
dq = scale dS k (FlashAttention's backward pass, arXiv 2205.14135, without its tiles). The GEMMs are
cuBLAS's. Between them run the kernels of train/kernels/attention_gemm_triton.py, whose reference
implementations stand here.

S, P, dP and dS lie in a scratch of bounded size (train/kernels/attention_chunks.py), in the dtype
of the inputs. Four things follow from what float16 can hold:

- The scale is applied inside the GEMM, in float32: S holds logits up to 65504.
- A probability is about 1 / S. From 16,000 keys on that is below float16's normal numbers (6e-5),
  and dS is smaller still. So both are stored times a power of two, which the next GEMM divides by
  in float32. P is at most 1, so P_SCALE takes all the room; dS may be as large as dP, so DS_SCALE
  takes half of the room, in binary orders of magnitude.
- Row statistics (the log-sum-exp and delta) are float32.
- Large logits are too far apart. In long sequences, which this kernel is for, each row of S is less
  by a shift, the same backward as forward (train/kernels/attention_shift.py).

Shapes: B samples, H heads, L queries, S keys, E width of a head; N heads of one chunk.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from train.kernels.attention_chunks import Chunk, chunk, has_shift, row_stride
from train.kernels.attention_shift import Operands, sample_of_keys, shift_column
from train.kernels.layout import empty_padded

P_SCALE, DS_SCALE = 2.0**15, 2.0**8


def attention_eager(q_BHLE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
    """The reference implementation: softmax(q k^T / sqrt(E)) v in float32, in q's dtype."""
    s_BHLS = q_BHLE.float() @ k_BHSE.float().mT * q_BHLE.shape[-1] ** -0.5
    return (s_BHLS.softmax(-1) @ v_BHSE.float()).to(q_BHLE.dtype)


def forward(
    q_BHLE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, num_padding: int, part: Chunk
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [B, H, L, E], a view of rows [B, L, H * E] with `num_padding` columns of padding
    behind each; the log-sum-exp of each row of S, less its shift, float32 [B, H, L]; and what makes
    that shift, q's additional column [B, H, L], in short sequences empty.
    """
    num_samples, num_heads, num_queries, width = q_BHLE.shape
    out_BLD = empty_padded(
        q_BHLE.transpose(1, 2), num_heads * v_BHSE.shape[3], num_padding, q_BHLE.dtype
    )
    out_BHLE = out_BLD.unflatten(2, (num_heads, -1)).transpose(1, 2)
    lse_BHL = q_BHLE.new_empty(q_BHLE.shape[:3], dtype=torch.float32)
    scratch_NLS = _scratch(part, q_BHLE)
    chunks = list(
        product(
            range(num_samples), _slices(num_heads, part.heads), _slices(num_queries, part.queries)
        )
    )
    column_BHL = q_BHLE.new_empty(0)
    if has_shift(k_BHSE.shape[2]):
        # the log-sum-exp over some of the keys first, in the same places
        some_BHSE = sample_of_keys(k_BHSE)
        num_keys = some_BHSE.shape[2]
        for sample, heads, queries in chunks:
            q_NLE, lse_NL = (x[sample, heads, queries] for x in (q_BHLE, lse_BHL))
            s_NLS = scratch_NLS[: q_NLE.shape[0], : q_NLE.shape[1], :num_keys]
            s_NLS.baddbmm_(q_NLE, some_BHSE[sample, heads].mT, beta=0, alpha=width**-0.5)
            softmax_(s_NLS, lse_NL)
        column_BHL = shift_column(lse_BHL, num_keys, k_BHSE.shape[2], width, q_BHLE.dtype)
    operands = Operands(q_BHLE, k_BHSE, column_BHL, part)
    for sample, heads, queries in chunks:
        lse_NL, out_NLE = (x[sample, heads, queries] for x in (lse_BHL, out_BHLE))
        num, height = lse_NL.shape
        s_NLS = scratch_NLS[:num, :height]
        q_NLE, k_NSE = operands.of(sample, heads, queries, slice(None))
        s_NLS.baddbmm_(q_NLE, k_NSE.mT, beta=0, alpha=width**-0.5)
        p_NLS = softmax_(s_NLS, lse_NL)
        out_NLE.baddbmm_(p_NLS, v_BHSE[sample, heads], beta=0, alpha=1 / P_SCALE)
    return out_BHLE, lse_BHL, column_BHL


def backward(
    q_BHLE: Tensor,
    k_BHSE: Tensor,
    v_BHSE: Tensor,
    out_BHLE: Tensor,
    lse_BHL: Tensor,
    column_BHL: Tensor,
    dout_BHLE: Tensor,
    part: Chunk,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq [B, H, L, E], dk and dv [B, H, S, E], views of [B, L or S, H, E]."""
    num_samples, num_heads, _, width = q_BHLE.shape
    dq_BHLE, dk_BHSE, dv_BHSE = (
        x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q_BHLE, k_BHSE, v_BHSE)
    )
    delta_BHL = row_dots(out_BHLE, dout_BHLE)
    s_scratch_NLS, dp_scratch_NLS = _scratch(part, q_BHLE), _scratch(part, q_BHLE)
    scale, ds_scale = width**-0.5, width**-0.5 / DS_SCALE
    operands = Operands(q_BHLE, k_BHSE, column_BHL, part)
    for sample, heads, keys in product(
        range(num_samples), _slices(num_heads, part.heads), _slices(k_BHSE.shape[2], part.keys)
    ):
        q_NLE, dout_NLE, lse_NL, delta_NL, dq_NLE = (
            x[sample, heads] for x in (q_BHLE, dout_BHLE, lse_BHL, delta_BHL, dq_BHLE)
        )
        k_NSE, v_NSE, dk_NSE, dv_NSE = (
            x[sample, heads, keys] for x in (k_BHSE, v_BHSE, dk_BHSE, dv_BHSE)
        )
        num, num_keys = k_NSE.shape[:2]
        s_NLS, dp_NLS = (x[:num, :, :num_keys] for x in (s_scratch_NLS, dp_scratch_NLS))
        q_wide_NLE, k_wide_NSE = operands.of(sample, heads, slice(None), keys)
        s_NLS.baddbmm_(q_wide_NLE, k_wide_NSE.mT, beta=0, alpha=scale)
        dp_NLS.baddbmm_(dout_NLE, v_NSE.mT, beta=0)
        p_NLS, ds_NLS = softmax_backward_(s_NLS, dp_NLS, lse_NL, delta_NL)
        dv_NSE.baddbmm_(p_NLS.mT, dout_NLE, beta=0, alpha=1 / P_SCALE)
        dk_NSE.baddbmm_(ds_NLS.mT, q_NLE, beta=0, alpha=ds_scale)
        dq_NLE.baddbmm_(ds_NLS, k_NSE, beta=int(keys.start > 0), alpha=ds_scale)
    return dq_BHLE, dk_BHSE, dv_BHSE


def _slices(total: int, step: int) -> Iterator[slice]:
    for first in range(0, total, step):
        yield slice(first, min(first + step, total))


def _scratch(part: Chunk, like: Tensor) -> Tensor:
    """A place for scores, [N, L, S], with padding behind its rows."""
    padded = row_stride(part.keys)
    return like.new_empty(part.heads, part.queries, padded)[..., : part.keys]


# The row-wise work between the GEMMs: each function chooses its Triton kernel on a GPU, else its
# reference implementation below it. Those that end in an underscore overwrite their inputs, whose
# rows have padding behind them (attention_chunks.row_stride).


def softmax_(s_NLS: Tensor, lse_NL: Tensor) -> Tensor:
    """Turns S into P_SCALE * softmax(S) and returns it; fills in the log-sum-exp of its rows."""
    if s_NLS.is_cuda:
        from train.kernels import attention_gemm_triton

        attention_gemm_triton.softmax_(s_NLS, lse_NL, P_SCALE)
        return s_NLS
    return softmax_eager_(s_NLS, lse_NL)


def softmax_eager_(s_NLS: Tensor, lse_NL: Tensor) -> Tensor:
    lse_NL.copy_(s_NLS.float().logsumexp(-1))
    return s_NLS.copy_((s_NLS.float() - lse_NL[..., None]).exp() * P_SCALE)


def softmax_backward_(
    s_NLS: Tensor, dp_NLS: Tensor, lse_NL: Tensor, delta_NL: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns S into P_SCALE * P and dP into DS_SCALE * P * (dP - delta); returns both."""
    if s_NLS.is_cuda:
        from train.kernels import attention_gemm_triton

        attention_gemm_triton.softmax_backward_(s_NLS, dp_NLS, lse_NL, delta_NL, P_SCALE, DS_SCALE)
        return s_NLS, dp_NLS
    return softmax_backward_eager_(s_NLS, dp_NLS, lse_NL, delta_NL)


def softmax_backward_eager_(
    s_NLS: Tensor, dp_NLS: Tensor, lse_NL: Tensor, delta_NL: Tensor
) -> tuple[Tensor, Tensor]:
    probability_NLS = (s_NLS.float() - lse_NL[..., None]).exp()
    dp_NLS.copy_(DS_SCALE * probability_NLS * (dp_NLS.float() - delta_NL[..., None]))
    return s_NLS.copy_(P_SCALE * probability_NLS), dp_NLS


def row_dots(x_BHLE: Tensor, y_BHLE: Tensor) -> Tensor:
    """The sum of x * y over each row, float32 [B, H, L]."""
    if x_BHLE.is_cuda:
        from train.kernels import attention_gemm_triton

        return attention_gemm_triton.row_dots(x_BHLE, y_BHLE)
    return row_dots_eager(x_BHLE, y_BHLE)


def row_dots_eager(x_BHLE: Tensor, y_BHLE: Tensor) -> Tensor:
    return (x_BHLE.float() * y_BHLE.float()).sum(-1)


# Operations of torch's own, so that train/activations/runner.py can tell them from others and save
# what they put out.


@torch.library.custom_op("newsreel::gemm_attention_forward", mutates_args=())
def gemm_attention_forward(
    q_BHLE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, num_padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `forward`."""
    return forward(q_BHLE, k_BHSE, v_BHSE, num_padding, _chunk(q_BHLE, k_BHSE, backward=False))


@torch.library.custom_op("newsreel::gemm_attention_backward", mutates_args=())
def gemm_attention_backward(
    q_BHLE: Tensor,
    k_BHSE: Tensor,
    v_BHSE: Tensor,
    out_BHLE: Tensor,
    lse_BHL: Tensor,
    column_BHL: Tensor,
    dout_BHLE: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `backward`."""
    part = _chunk(q_BHLE, k_BHSE, backward=True)
    return backward(q_BHLE, k_BHSE, v_BHSE, out_BHLE, lse_BHL, column_BHL, dout_BHLE, part)


def _chunk(q_BHLE: Tensor, k_BHSE: Tensor, backward: bool) -> Chunk:
    num_heads, num_queries = q_BHLE.shape[1:3]
    return chunk(num_heads, num_queries, k_BHSE.shape[2], q_BHLE.element_size(), backward)


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dout_BHLE: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *gemm_attention_backward(*ctx.saved_tensors, dout_BHLE), None


gemm_attention_forward.register_autograd(_backward, setup_context=_save_for_backward)
