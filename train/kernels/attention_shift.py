"""A shift of each row of logits, for attention from GEMMs (train/kernels/attention_gemm.py).

Float16 numbers from 16 on are 2^-6 apart, so the logarithm of a probability is off by up to half of
that: most of this kernel's error where logits are large. Softmax is the same if all logits of a row
are less by one number, so the GEMM subtracts such a shift before it rounds. q gets a column more,
-shift / scale, and k a column of ones: eight columns with zeros, because GEMMs want widths that are
multiples of 8. No shift is wrong, since it is a number of float16 times the scale that is
subtracted in float32. A good one brings near 0 those logits that make up the result.

Their mean under softmax's probabilities, m, would be that. With y = lse - ln(S), of the log-sum-exp
lse of the row, it lies between y and lse (lse - m is the entropy of the probabilities). Normally
distributed logits with mean 0 have m = 2 y up to y = ln(S); from there on the largest logit stands
for all, and m is nearly lse. So

    shift = min(2 y, lse), at least 0.

Whatever the logits are, m doesn't come to lie farther from 0 than it was: where the shift isn't 0,
m >= y makes it at most 2 m. (The log-sum-exp itself won't do as a shift: where many logits are
alike it is ln(S) above them, 10 at 27,280 keys, and at deviation 1 the error is four times as
large.)

The log-sum-exp is estimated from some of the keys, as if the others were like them. If the estimate
is too low, so is the shift, at the worst 0 as without. It is at most ln(S / SAMPLE_KEYS) too high,
since the sum over all keys includes these, and then the shift is twice that too large: at 27,280
keys 9, where float16 numbers are 2^-7 apart, and only where those keys are likelier than the others
by as much.

Backward has the same shift, so that the same logits are rounded in the same way. With a better one
(the log-sum-exp is known by then) probabilities wouldn't add up to 1: lse carries the rounding of
the largest logits forward. Hence the column is saved, 2 bytes per head and row.

Shapes: B samples, H heads, L queries, S keys, E width of a head; N heads of one chunk.
"""

import math

import torch
from torch import Tensor

from train.kernels.attention_chunks import SHIFT_COLUMNS, Chunk

# The estimate takes the operations of so many keys more, 1% of q k^T at 27,280. Of normally
# distributed logits of deviation 4 it is 1 too low there.
SAMPLE_KEYS = 256
# The smallest value of the column: half of what float16 holds.
MIN_COLUMN = -(2.0**15)


def sample_of_keys(k_BHSE: Tensor) -> Tensor:
    """SAMPLE_KEYS of the keys, or all if they are fewer, evenly spaced; a view."""
    step = max(k_BHSE.shape[2] // SAMPLE_KEYS, 1)
    return k_BHSE[:, :, ::step][:, :, :SAMPLE_KEYS]


def shift_column(
    lse_BHL: Tensor, num_sampled: int, num_keys: int, width: int, dtype: torch.dtype
) -> Tensor:
    """The column of q that makes the shift, [B, H, L] in `dtype`, from the log-sum-exp of each row
    over `num_sampled` of its logits.
    """
    y_BHL = lse_BHL - math.log(num_sampled)
    shift_BHL = torch.minimum(2 * y_BHL, y_BHL + math.log(num_keys))
    return (shift_BHL * -(width**0.5)).clamp(MIN_COLUMN, 0).to(dtype)


class Operands:
    """q and k of each chunk: with the columns that make the shift, in a place for one chunk at a
    time, or as they are if `column_BHL` is empty.
    """

    def __init__(self, q_BHLE: Tensor, k_BHSE: Tensor, column_BHL: Tensor, part: Chunk):
        self._q_BHLE, self._k_BHSE, self._column_BHL = q_BHLE, k_BHSE, column_BHL
        self._is_shifted = column_BHL.numel() > 0
        if self._is_shifted:
            width = q_BHLE.shape[3]
            self._q_NLE = q_BHLE.new_zeros(part.heads, part.queries, width + SHIFT_COLUMNS)
            self._k_NSE = k_BHSE.new_zeros(part.heads, part.keys, width + SHIFT_COLUMNS)
            self._k_NSE[..., width] = 1

    def of(self, sample: int, heads: slice, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """(q, k) of these heads and rows. The next call overwrites them."""
        q_NLE, k_NSE = self._q_BHLE[sample, heads, queries], self._k_BHSE[sample, heads, keys]
        if not self._is_shifted:
            return q_NLE, k_NSE
        num, num_queries, width = q_NLE.shape
        q_wide_NLE = self._q_NLE[:num, :num_queries]
        k_wide_NSE = self._k_NSE[:num, : k_NSE.shape[1]]
        q_wide_NLE[..., :width] = q_NLE
        q_wide_NLE[..., width] = self._column_BHL[sample, heads, queries]
        k_wide_NSE[..., :width] = k_NSE
        return q_wide_NLE, k_wide_NSE
