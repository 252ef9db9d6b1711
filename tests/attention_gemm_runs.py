"""Attention from GEMMs on the CPU: inputs, its outputs and gradients, and those to be expected."""

import pytest
import torch
from torch import Tensor

from train.kernels import attention_chunks, attention_gemm, attention_gemm_triton
from train.kernels.attention_gemm import (
    DS_SCALE,
    P_SCALE,
    attention_eager,
    gemm_attention_forward,
)


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


def through_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in the interpreter, in several blocks of columns."""
    monkeypatch.setattr(attention_gemm_triton, "MAX_BLOCK", 64)

    def softmax_(s_NLS: Tensor, lse_NL: Tensor) -> Tensor:
        attention_gemm_triton.softmax_(s_NLS, lse_NL, P_SCALE)
        return s_NLS

    def softmax_backward_(
        s_NLS: Tensor, dp_NLS: Tensor, lse_NL: Tensor, delta_NL: Tensor
    ) -> tuple[Tensor, Tensor]:
        attention_gemm_triton.softmax_backward_(s_NLS, dp_NLS, lse_NL, delta_NL, P_SCALE, DS_SCALE)
        return s_NLS, dp_NLS

    monkeypatch.setattr(attention_gemm, "softmax_", softmax_)
    monkeypatch.setattr(attention_gemm, "softmax_backward_", softmax_backward_)
    monkeypatch.setattr(attention_gemm, "row_dots", attention_gemm_triton.row_dots)


def inputs(
    dtype: torch.dtype,
    num_queries: int,
    num_keys: int,
    deviation: float = 1.0,
    width: int = 128,
    batch: int = 2,
    num_heads: int = 3,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the output's gradient as the model makes them: [B, L, H * E] with rows apart,
    seen as [B, H, L, E]. `deviation`: of the logits.
    """
    torch.manual_seed(seed)
    lengths = (num_queries, num_keys, num_keys, num_queries)
    q, k, v, dout = (
        torch.randn(batch, length, num_heads * width + 64)[..., : num_heads * width]
        .to(dtype)
        .unflatten(2, (num_heads, width))
        .transpose(1, 2)
        for length in lengths
    )
    return (q.float() * deviation).to(dtype), k, v, dout


def gradients(
    attention: object, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    assert callable(attention)
    out = attention(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def gemm(q: Tensor, k: Tensor, v: Tensor, num_padding: int = 0) -> Tensor:
    out: Tensor = gemm_attention_forward(q, k, v, num_padding)[0]
    return out


def expected(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    return gradients(attention_eager, *(x.float() for x in (q, k, v, dout)))


def shift_from(num_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits are shifted from so many keys on."""
    monkeypatch.setattr(attention_chunks, "SHIFT_MIN_KEYS", num_keys)
