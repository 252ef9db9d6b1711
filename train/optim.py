"""The optimizer over one flat float32 vector that all LoRA parameters are views of.

One vector means one all-reduce, one norm and one optimizer kernel per step, whatever the number
of adapters. Its gradient has a slot more than there are parameters: the loss travels in it, so
that logging costs no second all-reduce.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class FlatParameters(NamedTuple):
    """`vector` [N] holds all parameters; `buffer` [N + 1] their gradient (`gradient`, also
    vector.grad) and `loss`.
    """

    vector: nn.Parameter
    buffer: Tensor
    gradient: Tensor
    loss: Tensor


def flatten(parameters: Sequence[nn.Parameter]) -> FlatParameters:
    """Move float32 `parameters` into one vector, in place: each becomes a view of it, and so does
    its gradient, which whoever computes it may add to where it lies (train/lora/linear.py).
    """
    assert all(p.dtype == torch.float32 for p in parameters)
    total = sum(p.numel() for p in parameters)
    vector = nn.Parameter(torch.empty(total, device=parameters[0].device))
    buffer = torch.zeros(total + 1, device=vector.device)
    offset = 0
    for parameter in parameters:
        end = offset + parameter.numel()
        vector.data[offset:end].copy_(parameter.data.flatten())
        parameter.data = vector.data[offset:end].view(parameter.shape)
        parameter.grad = buffer[offset:end].view(parameter.shape)
        parameter.adds_in_place = True  # type: ignore[attr-defined]
        offset = end
    vector.grad = buffer[:total]
    return FlatParameters(vector, buffer, buffer[:total], buffer[total])


def make_optimizer(
    vector: nn.Parameter,
    name: Literal["adamw", "adamw8bit"],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW of torch (fused on the GPU), or bitsandbytes' with 8-bit states."""
    if name == "adamw8bit":
        import bitsandbytes  # slow to import, and probes for CUDA as it loads

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            [vector], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        return optimizer
    return torch.optim.AdamW(
        [vector], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=vector.is_cuda
    )


def is_lost(loss: float, grad_norm: float, loss_scale: float, scaling: bool) -> bool:
    """Whether training can't go on from here. With `scaling` a gradient that is not finite costs
    one step and half of the scale; but where that is down to 2**-10, no scale was small
    enough.
    """
    skipped = scaling and loss_scale > 2.0**-10
    return not math.isfinite(loss) or not (skipped or math.isfinite(grad_norm))


def learning_rate(
    step: int, lr: float, schedule: Literal["constant", "cosine"], warmup_steps: int, num_steps: int
) -> float:
    """The rate of 0-based `step`: linear warm-up, then constant, or a cosine down to 0 at
    `num_steps`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradient(gradient: Tensor, clip_norm: float) -> Tensor:
    """Scale `gradient` in place to a norm of at most `clip_norm` (0: leave it); returns the norm
    before, on device.
    """
    norm = torch.linalg.vector_norm(gradient)
    if clip_norm > 0:
        gradient.mul_((clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
