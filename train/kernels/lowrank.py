"""The low-rank half of a LoRA linear, with dropout by seed: products that read the wide
activations once each.

    low = drop(x) A^T        dlow = dy B        dx = drop'(dlow A) + ...        dA = dlow^T drop(x)        dB = dy^T low

Which elements of x survive is a pure function of (sample seed, layer, token, channel) that the
CPU, the GPU and every kernel compute alike: the 32-bit product of a hash of (seed, layer, token)
and an odd hash of the channel, against a threshold. A whole hash per element would cost more than
reading x. So no mask is kept for the backward pass, and none depends on the rank or micro-batch.
Without dropout all are plain GEMMs. There are three ways, and the device decides:

- sm_80 and newer, in half precision: Triton kernels with tensor cores
  (train/kernels/lowrank_triton.py) that hash while they read x, up to R = 256, or 128 where
  shared memory is small; without dropout those that do more in the pass, as copying x, applying
  GELU, or (up to rank 64, layers of one width) making dlow and dB of one reading of dy;
- otherwise on a GPU: an elementwise kernel makes drop(x) and cuBLAS multiplies: on sm_70 tl.dot
  has no tensor cores;
- the CPU: the lines below in eager torch, the twin of both.

Shapes: B samples, L tokens, M = B * L, K width of x, R = rank of all adapters together. Rows of x
may lie further apart than K.
"""

import torch
from torch import Tensor

from train.kernels.pointwise import gelu_tanh_backward_, gelu_tanh_into

_MASK32 = 0xFFFFFFFF
TENSOR_CORE_KERNELS = True  # False: as on a card before sm_80, for bench.step's volta profile
# odd: they spread tokens and channels before these are hashed
GOLDEN, CHANNEL = 0x9E3779B1, 0x85EBCA77


def dropout_keys(seeds_B: Tensor, num_layers: int) -> Tensor:
    """A 32-bit key per layer and sample, int64 [num_layers, B], from 63-bit seeds."""
    layers = torch.arange(num_layers, device=seeds_B.device)[:, None]
    return _mix32((seeds_B & _MASK32) ^ _mix32((seeds_B >> 32) ^ ((layers + 1) * GOLDEN & _MASK32)))


def dropout_keep(key_B: Tensor, length: int, width: int, p: float) -> Tensor:
    """Which elements survive: bool [B, L, K]."""
    token_L, channel_K = (torch.arange(size, device=key_B.device) for size in (length, width))
    row_BL = _mix32((token_L * GOLDEN + key_B[:, None]) & _MASK32)
    column_K = _mix32(channel_K * CHANNEL & _MASK32) | 1
    # int64 wraps, its low 32 bits stay right
    return (row_BL[..., None] * column_K & _MASK32) >= threshold(p)


def threshold(p: float) -> int:
    """A product below this drops its element."""
    return int(p * 2**32)


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit finaliser (the constants of MurmurHash3) on int64 values below 2**32."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def dropped(x_BLK: Tensor, p: float, key_B: Tensor | None, kernels: bool = True) -> Tensor:
    """drop(x): surviving elements divided by 1 - p. p = 0 returns x itself."""
    if p == 0.0:
        return x_BLK
    assert key_B is not None, "LoRA dropout needs the samples' seeds"
    if kernels and x_BLK.is_cuda:
        from train.kernels.lowrank_triton import drop

        out: Tensor = drop(x_BLK, p, key_B)
        return out
    return torch.where(dropout_keep(key_B, x_BLK.shape[1], x_BLK.shape[2], p), x_BLK / (1 - p), 0)


def project_down(
    x_BLK: Tensor,
    a_RK: Tensor,
    p: float,
    key_B: Tensor | None,
    out_MR: Tensor,
    into_BLK: Tensor | None = None,
    gelu: bool = False,
    kept_MR: Tensor | None = None,
    kernels: bool = True,
) -> None:
    """out = drop(x) A^T, in x's dtype; `kept_MR`, contiguous, gets the same. With `into_BLK`, x
    is copied there on the way, or GELU(x) is, and projected.
    """
    if kernels and (p > 0.0 or into_BLK is not None) and _has_dot(x_BLK, a_RK.shape[0]):
        from train.kernels.lowrank_triton import down

        down(x_BLK, a_RK, p, key_B, out_MR, into_BLK, gelu, kept_MR)
        return
    if into_BLK is not None:
        if gelu:
            gelu_tanh_into(x_BLK, into_BLK, kernels)
        else:
            into_BLK.copy_(x_BLK)
        x_BLK = into_BLK
    torch.mm(_rows(dropped(x_BLK, p, key_B, kernels)), a_RK.T, out=out_MR)
    if kept_MR is not None:
        kept_MR.copy_(out_MR)


def project_up(
    dlow_MR: Tensor,
    a_RK: Tensor,
    p: float,
    key_B: Tensor | None,
    shape: torch.Size,
    kernels: bool = True,
) -> Tensor:
    """drop'(dlow A) of `shape` [B, L, K], contiguous: dx's low-rank part."""
    if p > 0.0 and kernels and _has_dot(dlow_MR, a_RK.shape[0]):
        from train.kernels.lowrank_triton import up

        out_BLK = dlow_MR.new_empty(shape)
        up(dlow_MR, a_RK, p, key_B, out_BLK)
        return out_BLK
    return dropped((dlow_MR @ a_RK).view(shape), p, key_B, kernels)


def gradient_a(
    dlow_MR: Tensor,
    x_BLK: Tensor,
    p: float,
    key_B: Tensor | None,
    scale: float,
    gelu_grad_BLK: Tensor | None = None,
    grad_RK: Tensor | None = None,
    kernels: bool = True,
) -> Tensor | None:
    """dA = scale dlow^T drop(x): float32 [R, K], or None where it was added to `grad_RK`.

    With `gelu_grad_BLK`, contiguous, dA is of drop(GELU(x)), and that gradient of GELU(x) becomes
    the gradient of x, in place.
    """
    if kernels and (p > 0.0 or gelu_grad_BLK is not None) and _has_dot(x_BLK, dlow_MR.shape[1]):
        from train.kernels.lowrank_triton import gradient

        out: Tensor | None = gradient(dlow_MR, x_BLK, p, key_B, scale, gelu_grad_BLK, grad_RK)
        return out
    value_BLK = x_BLK
    if gelu_grad_BLK is not None:
        value_BLK = torch.empty_like(gelu_grad_BLK)
        gelu_tanh_into(x_BLK, value_BLK, kernels)
    da_RK = mm_float32(dlow_MR.T, _rows(dropped(value_BLK, p, key_B, kernels)))
    if gelu_grad_BLK is not None:
        gelu_tanh_backward_(gelu_grad_BLK, x_BLK, kernels)
    return _added(da_RK, scale, grad_RK)


def through_b(
    dy_MN: Tensor,
    low_MR: Tensor,
    b_NR: Tensor,
    blocks: tuple[tuple[int, int], ...],
    grad_NR: Tensor | None = None,
    kernels: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dlow = dy B, and dB = dy^T low: float32 [sum of the adapted N, rank], or None where it was
    added to `grad_NR`.

    Layer i has the outputs `blocks[i]` (first, end); in all other rows the i-th group of B's
    `rank` columns is zero.
    """
    rank = low_MR.shape[1] // len(blocks)
    width, spacing = (
        blocks[0][1] - blocks[0][0],
        blocks[1][0] - blocks[0][0] if len(blocks) > 1 else 0,
    )
    even = all(
        block == (blocks[0][0] + i * spacing, blocks[0][1] + i * spacing)
        for i, block in enumerate(blocks)
    )
    if kernels and even and rank <= 64 and _has_dot(dy_MN, rank):
        from train.kernels import lowrank_triton as lowrank_kernels

        return lowrank_kernels.through_b(
            dy_MN, low_MR, b_NR, blocks[0][0], spacing, width, len(blocks), grad_NR
        )
    db_NR = mm_float32(dy_MN.T, low_MR)
    db_NR = torch.cat(
        [db_NR[first:end, i * rank : (i + 1) * rank] for i, (first, end) in enumerate(blocks)]
    )
    return dy_MN @ b_NR, _added(db_NR, 1.0, grad_NR)


def _added(value: Tensor, scale: float, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return value if scale == 1.0 else value.mul_(scale)
    grad.add_(value, alpha=scale)
    return None


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32: sums over thousands of tokens would overflow
    float16.
    """
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _rows(x_BLK: Tensor) -> Tensor:
    return (
        x_BLK.view(-1, x_BLK.shape[-1])
        if x_BLK.is_contiguous()
        else x_BLK.as_strided(
            (x_BLK.shape[0] * x_BLK.shape[1], x_BLK.shape[2]),
            (x_BLK.stride(1), 1),
            x_BLK.storage_offset(),
        )
    )


def _has_dot(x: Tensor, num_low: int) -> bool:
    """Whether the kernels with tensor cores run here: their blocks of all R must fit into shared
    memory.
    """
    if not (TENSOR_CORE_KERNELS and x.is_cuda and x.element_size() == 2):
        return False
    capability = torch.cuda.get_device_capability(x.device)
    return capability >= (8, 0) and num_low <= (256 if capability in ((8, 0), (9, 0)) else 128)
