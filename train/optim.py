"""The optimizer over one flat float32 vector that all LoRA parameters are views of.

One vector means one all-reduce, one norm and one optimizer kernel per step, whatever the number
of adapters. Its gradient has a few slots more than there are parameters: the losses travel in
them, so that logging costs no second all-reduce.
"""

import math
from collections.abc import Iterator, Sequence
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
    # after the warm-up, which is linear; "cosine" (SGDR, arXiv 1608.03983, without restarts) and
    # "linear" go from there to 0 at num_steps
    lr: Annotated[float, Meta(gt=0.0)] = 1e-4
    beta1: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.999
    eps: Annotated[float, Meta(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.01
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    # B learns at this multiple of lr, A at lr (LoRA+, arXiv 2402.12354, which takes about 16 and a
    # lower lr)
    lora_plus_ratio: Annotated[float, Meta(gt=0.0)] = 1.0
    # decay of an average of the adapters, such as 0.999, that is validated, sampled and exported in
    # their place (train/average.py); 0: none
    ema: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    # largest norm of the whole gradient; 0: no clipping
    clip_norm: Annotated[float, Meta(ge=0.0)] = 1.0
    # the first one, float16 only. Too high, it is halved in as many steps as it takes; too low,
    # small gradients vanish until it has grown, which takes thousands of steps
    loss_scale: Annotated[float, Meta(gt=0.0)] = 2.0**24


class FlatParameters(NamedTuple):
    """`vector` [N] holds all parameters; `buffer` [N + NUM_LOSSES] their gradient (`gradient`,
    also vector.grad) and `losses`, of which the first is `loss`. `groups`: what the optimizer gets,
    `vector` itself or its parts, in order.
    """

    vector: nn.Parameter
    groups: tuple[nn.Parameter, ...]
    buffer: Tensor
    gradient: Tensor
    losses: Tensor
    loss: Tensor


def flatten(*groups: Sequence[AdapterParameter]) -> FlatParameters:
    """Move float32 parameters into one vector, in place: each becomes a view of it, and so does
    its gradient, which keeps its place (see AdapterParameter). Those of a group lie together.
    """
    parameters = [parameter for group in groups for parameter in group]
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
        vector,
        groups=(vector,) if len(groups) == 1 else tuple(_parts(vector, groups)),
        buffer=buffer,
        gradient=buffer[:total],
        losses=buffer[total:],
        loss=buffer[total],
    )


def _parts(
    vector: nn.Parameter, groups: Sequence[Sequence[AdapterParameter]]
) -> Iterator[nn.Parameter]:
    assert vector.grad is not None
    first = 0
    for group in groups:
        end = first + sum(parameter.numel() for parameter in group)
        part = nn.Parameter(vector.data[first:end])
        part.grad = vector.grad[first:end]
        yield part
        first = end


def lr_ratios(config: OptimConfig) -> tuple[float, ...]:
    """Of the learning rates of each parameter group to `lr`: of all adapters, or of A and of B."""
    return (1.0,) if config.lora_plus_ratio == 1.0 else (1.0, config.lora_plus_ratio)


def make_optimizer(groups: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW of torch (fused on the GPU), or bitsandbytes' with 8-bit states, over as many groups
    as `lr_ratios` has.
    """
    betas = (config.beta1, config.beta2)
    named = [
        {"params": [group], "lr": config.lr * ratio}
        for group, ratio in zip(groups, lr_ratios(config), strict=True)
    ]
    if config.name == "adamw8bit":
        import bitsandbytes  # slow to import, and probes for CUDA as it loads

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            named, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay
        )
        return optimizer
    return torch.optim.AdamW(
        named,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=groups[0].is_cuda,
    )


def state_bytes(config: OptimConfig) -> float:
    """What the optimizer keeps of each parameter: both moments, in float32 or in 8 bits."""
    return 2.0 if config.name == "adamw8bit" else 8.0


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
    """The rate of 0-based `step`: linear warm-up, then constant, or a cosine or a line down to 0
    at `num_steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, config: OptimConfig) -> None:
    """Of all groups, before a step."""
    for group, ratio in zip(optimizer.param_groups, lr_ratios(config), strict=True):
        group["lr"] = lr * ratio


def clip_gradient(gradient: Tensor, clip_norm: float) -> Tensor:
    """Scale `gradient` in place to a norm of at most `clip_norm` (0: leave it); returns the norm
    before, on device.
    """
    norm = torch.linalg.vector_norm(gradient)
    if clip_norm > 0:
        gradient.mul_((clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
