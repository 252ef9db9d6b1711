"""Where the first NaN or infinity comes from: a micro-batch once more, with hooks that look at the
output of every module and do not stay.

It costs a forward and a backward pass and a wait after every module, so it is done once in a run.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.lora.adapters import LoRA
from train.model.wan import Wan
from train.optim import FlatParameters
from train.placement.weights import MovedWeights
from train.step import Inputs, MicroStep


def find_non_finite(
    inputs: Inputs,
    model: Wan,
    adapters: LoRA,
    flat: FlatParameters,
    micro_step: MicroStep,
    weights: MovedWeights | None = None,
) -> str | None:
    """What is not finite first, in the order in which a step computes it, or None: a batch, a
    weight, the output of a module, the loss, a gradient. Overwrites the gradient. weights: those
    of the model that are not on the card, if it has such.
    """
    for name, value in inputs._asdict().items():
        if not _is_finite(value):
            return f"the batch's {name} holds NaN or infinity: run `shardgen verify` on the dataset"
    # a slot of the ring has the weights of one block after another
    parameters = weights.all_parameters(model) if weights else model.named_parameters()
    for name, parameter in parameters:
        if not _is_finite(parameter):
            return f"the weight {name} ({_dtype(parameter)}) is not finite: check model.path"
    found = _find_output(inputs, model, micro_step)
    if found is not None:
        return found

    flat.buffer.zero_()
    micro_step.backward_eagerly(inputs)
    # blocks go backward from the last one
    for index in reversed(adapters.modules):
        for module in reversed(adapters.modules[index]):
            gradients = [module.a_RK.grad, module.b_NR.grad]
            if not all(_is_finite(each) for each in gradients if each is not None):
                return (
                    f"the loss is finite; in the backward pass the gradient of "
                    f"blocks.{index}.{module.tag} ({_dtype(module.a)} GEMMs) is the first that is "
                    f"not"
                )
    return None


def _find_output(inputs: Inputs, model: nn.Module, micro_step: MicroStep) -> str | None:
    found: list[str] = []

    def look(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if not found and not _is_finite(tensor):
                found.append(f"the output of {name} ({_dtype(tensor)}) is the first not finite")

    hooks = [
        module.register_forward_hook(partial(look, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            # of whole samples: processes that share them find the same
            loss = micro_step.loss(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    if not _is_finite(loss):
        return f"the output of every module is finite, the loss ({_dtype(loss)}) is not"
    return None


def _tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, Tensor)]


def _is_finite(tensor: Tensor) -> bool:
    # integers always are, and packed weights have no floats to look at
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
