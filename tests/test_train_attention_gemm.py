"""Attention from GEMMs against float32 attention: forward and gradients, on the CPU, with the
kernels' reference implementations and with the kernels themselves in Triton's interpreter.
"""

import math
from functools import partial
from itertools import product

import pytest
import torch
from attention_gemm_runs import (
    expected,
    gemm,
    gradients,
    inputs,
    relative,
    shift_from,
    through_kernels,
)
from torch import Tensor

from train.kernels import attention_gemm
from train.kernels.attention_chunks import Chunk, chunk, row_stride, scores_bytes
from train.kernels.attention_gemm import (
    attention_eager,
    row_dots_eager,
    softmax_backward_eager_,
    softmax_eager_,
)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}  # of a relative L2 distance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "width", "deviation", "kernels", "shifted"),
    [
        (150, 150, 128, 1.0, False, False),
        (150, 150, 128, 4.0, False, False),
        (150, 150, 128, 4.0, False, True),
        (1, 5, 16, 1.0, False, False),
        (1, 5, 16, 1.0, False, True),
        (13, 131, 96, 1.0, True, False),
        (13, 131, 128, 4.0, True, True),
    ],
)
def test_outputs_and_gradients_are_those_of_float32_attention(
    num_queries: int,
    num_keys: int,
    width: int,
    deviation: float,
    dtype: torch.dtype,
    kernels: bool,
    shifted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shift_from(1 if shifted else 2**30, monkeypatch)
    if kernels:
        through_kernels(monkeypatch)
    tensors = inputs(dtype, num_queries, num_keys, deviation, width)
    for ours, reference in zip(gradients(gemm, *tensors), expected(*tensors), strict=True):
        assert ours.dtype == dtype and ours.shape == reference.shape
        assert relative(ours, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kernels", "shifted"),
    [(False, False), (True, False), (False, True)],
    ids=["eager", "triton", "shifted"],
)
def test_logits_of_200_and_minus_200_give_finite_outputs_and_gradients(
    kernels: bool, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_from(1 if shifted else 2**30, monkeypatch)
    if kernels:
        through_kernels(monkeypatch)
    q, k, v, dout = inputs(torch.float16, 17, 150)
    largest = (q.float() @ k.float().mT).abs().amax() * 128**-0.5
    q = (q.float() * (200 / largest)).half()
    logits = q.float() @ k.float().mT * 128**-0.5
    assert logits.amax() > 150 and logits.amin() < -150
    for ours, reference in zip(
        gradients(gemm, q, k, v, dout), expected(q, k, v, dout), strict=True
    ):
        assert ours.isfinite().all()
        # float16 is an eighth apart at 200
        assert relative(ours, reference) < 0.1


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_small_probabilities_and_gradients_keep_their_precision(scale: float) -> None:
    """With 20,000 keys a probability is 5e-5, below the normal numbers of float16, and P dP is
    less than its smallest number where dP is 1e-3. What remains is how the results are rounded.
    """
    q, k, v, dout = inputs(torch.float16, 64, 20_000, batch=1, num_heads=1, width=32)
    dout = (dout.float() * scale).half()
    for ours, reference in zip(
        gradients(gemm, q, k, v, dout), expected(q, k, v, dout), strict=True
    ):
        assert relative(ours, reference) < max(1e-3, 2 * relative(reference.half(), reference))


@pytest.mark.parametrize("shifted", [False, True], ids=["as is", "shifted"])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_chunks_change_nothing(heads: int, shifted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither their rows nor their columns divide the lengths."""
    shift_from(1 if shifted else 2**30, monkeypatch)
    q, k, v, dout = inputs(torch.float32, 300, 280)
    reference = expected(q, k, v, dout)
    saved = attention_gemm.forward(q, k, v, 0, Chunk(heads, 128, 280))
    grads = attention_gemm.backward(q, k, v, *saved, dout, Chunk(heads, 300, 128))
    for ours, theirs in zip((saved[0], *grads), reference, strict=True):
        assert relative(ours, theirs) < TOLERANCE[torch.float32]


def test_the_output_lies_in_rows_with_the_padding_that_was_asked_for() -> None:
    q, k, v, _ = inputs(torch.float32, 20, 30)
    out_BLD = gemm(q, k, v, num_padding=24).transpose(1, 2).flatten(2)
    assert out_BLD.shape == (2, 20, 384) and out_BLD.stride() == (20 * 448, 448, 1)
    assert relative(out_BLD.unflatten(2, (3, 128)).transpose(1, 2), attention_eager(q, k, v)) < 1e-5
    assert gemm(q, k, v).transpose(1, 2).flatten(2).is_contiguous()


def test_a_gradient_that_is_expanded_or_transposed_is_read_where_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    through_kernels(monkeypatch)
    q, k, v, dout = inputs(torch.float32, 10, 30)
    for grad in (torch.ones(()).expand(dout.shape), dout.transpose(2, 3).contiguous().mT):
        for ours, theirs in zip(
            gradients(gemm, q, k, v, grad), expected(q, k, v, grad), strict=True
        ):
            # v's rows are not centred: with equal gradients those of q and k are almost nothing
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_keys", [5, 64, 200])
def test_each_kernel_equals_its_reference_implementation(
    num_keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NaN in the padding, where the kernels leave zeros."""
    through_kernels(monkeypatch)
    torch.manual_seed(0)
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=TOLERANCE[dtype])

    def scratch(values: Tensor) -> Tensor:
        padded = torch.full((*values.shape[:2], row_stride(num_keys)), math.nan, dtype=dtype)
        padded[..., :num_keys] = values
        return padded[..., :num_keys]

    def padding(x: Tensor) -> Tensor:
        return x.as_strided((2, 7, x.stride(1)), x.stride())[..., num_keys:]

    s, dp = (3 * torch.randn(2, 7, num_keys) for _ in range(2))
    lse, lse_eager, delta = (torch.randn(2, 9)[:, 1:8] for _ in range(3))
    p_eager = softmax_eager_(scratch(s), lse_eager)
    p = attention_gemm.softmax_(scratch(s), lse)
    torch.testing.assert_close(lse, lse_eager)
    close(p, p_eager)
    assert not padding(p).any()
    reference = softmax_backward_eager_(scratch(s), scratch(dp), lse_eager, delta)
    for ours, theirs in zip(
        attention_gemm.softmax_backward_(scratch(s), scratch(dp), lse_eager, delta),
        reference,
        strict=True,
    ):
        close(ours, theirs)
        assert not padding(ours).any()
    q, _, _, dout = inputs(dtype, 37, 1, width=96)
    torch.testing.assert_close(
        attention_gemm.row_dots(q, dout), row_dots_eager(q, dout), atol=1e-4, rtol=1e-4
    )


def test_chunks_stay_within_the_scratch() -> None:
    """And are no more than the limit asks for, but for what multiples of 128 cost."""
    for num_tokens, text, backward, limit_bytes in product(
        (1, 1170, 5070, 11_440, 27_280, 46_800, 75_600),
        (None, 512),
        (False, True),
        (2**26, 2**30, 2**33),
    ):
        keys = text or num_tokens
        part = chunk(24, num_tokens, keys, 2, backward, limit_bytes)
        assert 1 <= part.heads <= 24
        assert part.queries == num_tokens if backward else part.keys == keys
        assert scores_bytes(part, 2, backward) <= limit_bytes
        all_bytes = (4 if backward else 2) * num_tokens * keys
        num_chunks = -(-num_tokens // part.queries) * -(-keys // part.keys)
        if part.queries > 128 and part.keys > 128:
            assert num_chunks <= 1.5 * all_bytes / limit_bytes + 1


def test_heads_are_divided_equally() -> None:
    one_head = 2 * 1170 * row_stride(1170)
    assert chunk(24, 1170, 1170, 2, False, 24 * one_head) == Chunk(24, 1170, 1170)
    assert chunk(24, 1170, 1170, 2, False, 23 * one_head).heads == 12
    assert chunk(24, 1170, 1170, 2, True, 23 * one_head).heads == 8


def test_the_chunks_are_those_that_were_measured() -> None:
    """With a scratch of 1 GiB: bench/records/2026-11-26_attention_h200.md."""
    assert chunk(24, 11_440, 11_440, 2, False) == Chunk(4, 11_440, 11_440)
    assert chunk(24, 11_440, 11_440, 2, True) == Chunk(2, 11_440, 11_440)
    assert chunk(24, 27_280, 27_280, 2, False) == Chunk(1, 13_696, 27_280)
    assert chunk(24, 27_280, 27_280, 2, True) == Chunk(1, 27_280, 9216)
