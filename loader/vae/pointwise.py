"""What the encoder computes between two convolutions, in one pass over memory.

A convolution leaves its output without a bias: a `Pending` sum. Whatever comes next reads that
output anyway, so it adds the bias, the residual and the shortcut's means, takes the norm and SiLU,
and writes the result to where the next convolution reads it: behind the frames that this
convolution must remember, with the padding that it needs. `finish` is that pass. It chooses the
Triton kernel of loader/vae/pointwise_triton.py on a GPU and `finish_eager`, the reference
implementation, elsewhere. All arithmetic is in float32.

Shapes: B batch, T frames, H height, W width, C channels (last, dense), P frames of the past.
"""

import torch.nn.functional as F
from torch import Tensor

from loader.vae.blocks import group_mean
from loader.vae.pending import NORM_EPS, Pending, Stream


def finish(
    pending: Pending,
    buffer_BTHWC: Tensor,
    gamma_C: Tensor | None = None,
    past_BPHWC: Tensor | None = None,
    silu: bool = True,
    keep_sum: bool = True,
) -> Stream | None:
    """Write silu(rms_norm(sum) * gamma) into the buffer, and return the sum as a stream.

    `buffer_BTHWC` [B, P+T, H+p, W+p, C] is filled completely: the last T frames with the result
    (without gamma: the sum itself, and no SiLU), the P frames before them with the last ones of
    `past_BPHWC`, and zeros where it has fewer. The p rows and columns at the bottom and right are
    zeros (p is 0, or 1 if P is 0).

    Returns None without `keep_sum`. A sum of a bias alone is not stored: the stream is x and its
    bias. Any other overwrites `pending.x_BTHWC`. The pending sum is cleared.
    """
    if buffer_BTHWC.is_cuda:
        from loader.vae.pointwise_triton import finish as finish_kernel

        run = finish_kernel
    else:
        run = finish_eager
    stores_sum = keep_sum and not pending.is_biased_only
    run(pending, buffer_BTHWC, gamma_C, past_BPHWC, silu and gamma_C is not None, stores_sum)
    stream = Stream(pending.x_BTHWC, None if stores_sum else pending.bias_C)
    pending.clear()
    return stream if keep_sum else None


def finish_eager(
    pending: Pending,
    buffer_BTHWC: Tensor,
    gamma_C: Tensor | None,
    past_BPHWC: Tensor | None,
    silu: bool,
    stores_sum: bool,
) -> None:
    """The reference implementation of `finish`'s pass."""
    sum_BTHWC = _add(pending.x_BTHWC, pending.bias_C)
    if pending.residual_BTHWC is not None:
        sum_BTHWC = sum_BTHWC + pending.residual_BTHWC.float()
    if pending.shortcut is not None:
        source, time_factor, space_factor = pending.shortcut
        source_BCTHW = _add(*source).movedim(-1, 1)
        mean_BCTHW = group_mean(source_BCTHW, sum_BTHWC.shape[-1], time_factor, space_factor)
        sum_BTHWC = sum_BTHWC + mean_BCTHW.movedim(1, -1)
    if stores_sum:
        pending.x_BTHWC.copy_(sum_BTHWC)
    h_BTHWC = sum_BTHWC
    if gamma_C is not None:
        h_BTHWC = F.rms_norm(h_BTHWC, h_BTHWC.shape[-1:], gamma_C.float(), NORM_EPS)
    if silu:
        h_BTHWC = F.silu(h_BTHWC)
    frames, height, width = h_BTHWC.shape[1:4]
    num_past = buffer_BTHWC.shape[1] - frames
    buffer_BTHWC.zero_()
    buffer_BTHWC[:, num_past:, :height, :width] = h_BTHWC.to(buffer_BTHWC.dtype)
    if num_past and past_BPHWC is not None:
        known_BPHWC = past_BPHWC[:, -num_past:]
        buffer_BTHWC[:, num_past - known_BPHWC.shape[1] : num_past] = known_BPHWC


def add_biases(a_C: Tensor | None, b_C: Tensor | None) -> Tensor | None:
    """Their sum in float32; None stands for zeros."""
    if a_C is None or b_C is None:
        return b_C if a_C is None else a_C
    return a_C.float() + b_C.float()


def _add(x_BTHWC: Tensor, bias_C: Tensor | None) -> Tensor:
    return x_BTHWC.float() if bias_C is None else x_BTHWC.float() + bias_C.float()
