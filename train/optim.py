"""The optimizer over one flat float32 vector that all LoRA parameters are views of.

One vector means one all-reduce, one norm and one optimizer kernel per step, whatever the number
of adapters. Its gradient has a few slots more than there are parameters: the losses travel in
them, so that logging costs no second all-reduce.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.amp import GradScaler

from train.lora.linear import AdapterParameter

# the loss of the step; then for each task the sum of its samples' losses, and their number
NUM_TASKS = 3
NUM_LOSSES = 1 + 2 * NUM_TASKS


class OptimConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[optim]` table: the optimizer, its learning rate, clipping and loss scaling."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    # after the warm-up; a cosine goes from there to 0 at num_steps
    lr: Annotated[float, Meta(gt=0.0)] = 1e-4
    beta1: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.999
    eps: Annotated[float, Meta(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    # largest norm of the whole gradient; 0: no clipping
    clip_norm: Annotated[float, Meta(ge=0.0)] = 1.0
    # the first one, float16 only. Too high, it is halved in as many steps as it takes; too low,
    # small gradients vanish until it has grown, which takes thousands of steps
    loss_scale: Annotated[float, Meta(gt=0.0)] = 2.0**24


class FlatParameters(NamedTuple):
    """`vector` [N] holds all parameters; `buffer` [N + NUM_LOSSES] their gradient (`gradient`,
    also vector.grad) and `losses`, of which the first is `loss`.
    """

    vector: nn.Parameter
    buffer: Tensor
    gradient: Tensor
    losses: Tensor
    loss: Tensor


def flatten(parameters: Sequence[AdapterParameter]) -> FlatParameters:
    """Move float32 `parameters` into one vector, in place: each becomes a view of it, and so does
    its gradient, which keeps its place (see AdapterParameter).
    """
    assert all(p.dtype == torch.float32 for p in parameters)
    total = sum(p.numel() for p in parameters)
    vector = nn.Parameter(torch.empty(total, device=parameters[0].device))
    buffer = torch.zeros(total + NUM_LOSSES, device=vector.device)
    offset = 0
    for parameter in parameters:
        end = offset + parameter.numel()
        vector.data[offset:end].copy_(parameter.data.flatten())
        parameter.data = vector.data[offset:end].view(parameter.shape)
        parameter.grad = buffer[offset:end].view(parameter.shape)
        parameter.adds_in_place = True
        offset = end
    vector.grad = buffer[:total]
    return FlatParameters(
        vector, buffer, gradient=buffer[:total], losses=buffer[total:], loss=buffer[total]
    )


def make_optimizer(vector: nn.Parameter, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW of torch (fused on the GPU), or bitsandbytes' with 8-bit states."""
    betas = (config.beta1, config.beta2)
    if config.name == "adamw8bit":
        import bitsandbytes  # slow to import, and probes for CUDA as it loads

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            [vector], lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay
        )
        return optimizer
    return torch.optim.AdamW(
        [vector],
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=vector.is_cuda,
    )


def make_scaler(device: torch.device, scaling: bool, config: OptimConfig) -> GradScaler:
    """The loss scaler, which also leaves out steps whose gradient is not finite.

    Only float16 needs `scaling`. Without, the scale stays 1, which changes no bit.
    """
    return GradScaler(device.type, init_scale=config.loss_scale if scaling else 1.0)


def update_scale(scaler: GradScaler, scaling: bool) -> None:
    """After each step: halve the scale if the gradient overflowed, double it after 2,000 steps
    without.
    """
    scaler.update(None if scaling else 1.0)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """The rate of 0-based `step`: linear warm-up, then constant, or a cosine down to 0 at
    `num_steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradient(gradient: Tensor, clip_norm: float) -> Tensor:
    """Scale `gradient` in place to a norm of at most `clip_norm` (0: leave it); returns the norm
    before, on device.
    """
    norm = torch.linalg.vector_norm(gradient)
    if clip_norm > 0:
        gradient.mul_((clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
