"""LoRA dropout without a random generator: which elements survive is a pure function of (sample
seed, layer, token, channel) that the CPU, the GPU and every kernel compute alike.

The function is the 32-bit product of a hash of (seed, layer, token) and an odd hash of the
channel, against a threshold. A whole hash per element would cost more than reading x. So no mask
is saved for the backward pass, and none depends on the rank or the micro-batch.

train/kernels/dropout_triton.py computes the same on the GPU; the constants must be equal.

Shapes: B samples, L tokens, K channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
# odd: they spread tokens and channels before these are hashed
_TOKEN, _CHANNEL = 0x9E3779B1, 0x85EBCA77


class Dropout(NamedTuple):
    """Dropout of one layer in one pass: each element is dropped with probability `p`, by the
    samples' keys (int64 [B], `dropout_keys`). With p = 0 no keys are needed.
    """

    p: float = 0.0
    key_B: Tensor | None = None


def dropout_keys(seeds_B: Tensor, num_layers: int) -> Tensor:
    """A 32-bit key per layer and sample, int64 [num_layers, B], from 63-bit seeds."""
    layers = torch.arange(num_layers, device=seeds_B.device)[:, None]
    layer_hash = _mix32((seeds_B >> 32) ^ ((layers + 1) * _TOKEN & _MASK32))
    return _mix32((seeds_B & _MASK32) ^ layer_hash)


def keys_from(key_B: Tensor, first_token: int) -> Tensor:
    """The keys under which token 0 has what token `first_token` has under `key_B`: of a rank that
    has a sample's tokens from there on.
    """
    return (key_B + first_token * _TOKEN) & _MASK32


def dropout_survivors(key_B: Tensor, length: int, width: int, p: float) -> Tensor:
    """Which elements survive: bool [B, L, K]."""
    token_L = torch.arange(length, device=key_B.device)
    channel_K = torch.arange(width, device=key_B.device)
    row_BL = _mix32((token_L * _TOKEN + key_B[:, None]) & _MASK32)
    column_K = _mix32(channel_K * _CHANNEL & _MASK32) | 1
    # int64 wraps around, but its low 32 bits stay right
    product_BLK = row_BL[..., None] * column_K & _MASK32
    return product_BLK >= threshold(p)


def threshold(p: float) -> int:
    """A product below this drops its element."""
    return int(p * 2**32)


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit finaliser (the constants of MurmurHash3) on int64 values below 2**32."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)
