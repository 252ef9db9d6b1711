"""The same adapters on diffusers' transformer, by PEFT, and on ours."""

from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from train.lora import adapters as lora
from train.model.wan import Wan

RANK, ALPHA = 4, 12.0


def attach_both(reference: Any, model: Wan) -> tuple[lora.LoRA, dict[str, nn.Parameter]]:
    """The same adapters, with B other than zero, on both models; returns ours and PEFT's
    parameters by name.
    """
    reference.requires_grad_(False)
    reference.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(lora.TARGETS), lora_dropout=0.0)
    )
    adapters = lora.attach(model, lora.TARGETS, RANK, ALPHA, dropout=0.0, seed=1)
    theirs = {
        name.replace(".default.weight", ""): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, (a, b) in adapters.tensors().items():
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
            theirs[f"{name}.lora_A"].copy_(a)
            theirs[f"{name}.lora_B"].copy_(b)
    adapters.refresh()
    return adapters, theirs


def check_gradients(adapters: lora.LoRA, theirs: dict[str, nn.Parameter]) -> None:
    """Every gradient of ours is PEFT's within 1e-5 of its norm, and is not zero."""
    for parameter in adapters.parameters():  # so that `tensors()` shows gradients, not values
        assert parameter.grad is not None
        parameter.data = parameter.grad
    assert len(adapters.tensors()) * 2 == len(theirs)
    for name, gradients in adapters.tensors().items():
        for kind, gradient in zip("AB", gradients, strict=True):
            expected = theirs[f"{name}.lora_{kind}"].grad
            assert expected is not None and expected.norm() > 0
            assert (gradient - expected).norm() / expected.norm() < 1e-5, f"{name}.lora_{kind}"
