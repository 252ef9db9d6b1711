"""Random weights under which a network still behaves like one."""

import torch
from torch import nn


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Overwrite every parameter: matrices N(0, 1/fan_in), biases near 0, scales near 1. Embedding
    rows are N(0, 1).
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            value = noise
        elif name.endswith("scale_shift_table"):
            value = noise / parameter.shape[-1] ** 0.5
        elif name.endswith("bias"):
            value = 0.02 * noise
        elif parameter.squeeze().ndim <= 1:  # a norm's scale
            value = 1 + 0.1 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)
