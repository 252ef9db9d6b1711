"""Which blocks' weights leave the card, and what they take there: arithmetic before anything is
loaded.

A gibibyte of weights that stays saves copying, which a long sequence hides anyway; a gibibyte of
saved attention outputs saves seconds of computing them again. So "auto" plans the activations
first and keeps as many blocks as fit beside them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from train.activations.plan import ShapePlan
from train.activations.sizes import Shape
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.model.load import held_as
from train.model.wan import Wan, WanConfig
from train.placement.layout import block_layout
from train.placement.ring import NUM_SLOTS


class ActivationPlans(NamedTuple):
    """What each shape saves, and what that takes at its peak."""

    plans: dict[Shape, ShapePlan]
    num_bytes: float


# (room_bytes, weights_move) -> the plans with so much room for them
PlanActivations = Callable[[float, bool], ActivationPlans]


class CardBytes(NamedTuple):
    """What a run has on the card from step to step."""

    block: int  # GEMM weights of one block
    others: float  # everything but those of the blocks: adapters and the optimizer's state too


def card_bytes(
    config: WanConfig,
    num_adapted: int,
    targets: Sequence[str],
    rank: int,
    dtype: torch.dtype,
    optimizer_bytes: float = 8.0,
) -> CardBytes:
    """num_adapted: blocks with adapters. optimizer_bytes: of its state, per parameter."""
    layout = block_layout(config, targets, rank, dtype)
    moved = {f"blocks.{i}.{m.name}" for i in range(config.num_layers) for m in layout.matrices}
    with torch.device("meta"):
        model = Wan(config)
    others = sum(
        parameter.numel() * held_as(name, dtype).itemsize
        for name, parameter in model.named_parameters()
        if name not in moved
    )
    num_adapter = num_adapted * sum(
        # A, and B with the zeros that are kept beside it
        matrix.num_low * (matrix.width + matrix.num_out)
        for matrix in layout.matrices
    )
    # the parameter and its gradient in float32, the optimizer's state, the copy that GEMMs read
    per_parameter = 8.0 + optimizer_bytes + dtype.itemsize
    return CardBytes(layout.num_elements * dtype.itemsize, others + per_parameter * num_adapter)


def check_placement(model: ModelConfig, lora: LoRAConfig, activation_memory: str) -> None:
    """Raises ValueError for what can't go together."""
    if model.placement in ("resident", "auto"):
        if model.resident_blocks:
            raise ValueError(
                f"model.resident_blocks = {model.resident_blocks}: is for weights that are not "
                f'resident, and model.placement is "{model.placement}"; set it to 0'
            )
        return
    why = ""
    if activation_memory == "all":
        why = 'activation_memory = "all" would need the weights of all blocks at once; use "auto"'
    if lora.base == "nf4":
        why = 'lora.base = "nf4" keeps the weights on the card, in a quarter; use "dense"'
    if why:
        raise ValueError(f'model.placement = "{model.placement}": {why}, or "resident"')


def choose_moved(
    model: ModelConfig,
    lora: LoRAConfig,
    activation_memory: str,
    num_blocks: int,
    card: CardBytes,
    plan: PlanActivations,
    room: Callable[[], float],
) -> int:
    """Of how many of the blocks the weights leave the card. room(): what the card has for
    everything, asked if it matters. `check_placement` has passed. Raises ValueError.
    """
    if model.placement == "resident":
        return 0
    if model.placement != "auto":
        if model.resident_blocks >= num_blocks:
            raise ValueError(
                f"model.resident_blocks = {model.resident_blocks}: the model has {num_blocks} "
                f'blocks; use fewer, or model.placement = "resident"'
            )
        return num_blocks - model.resident_blocks
    if activation_memory == "all" or lora.base == "nf4":
        return 0
    return num_blocks - fitting_blocks(num_blocks, card, plan, room())


def fitting_blocks(
    num_blocks: int, card: CardBytes, plan: PlanActivations, room_bytes: float
) -> int:
    """How many blocks stay on a card with so much room."""
    room_bytes -= card.others
    beside_ring = room_bytes - NUM_SLOTS * card.block
    beside_all = room_bytes - num_blocks * card.block
    moving, resident = plan(beside_ring, True), plan(beside_all, False)
    gains = any(
        found.saved is not None and found.saved != moving.plans[shape].saved
        for shape, found in resident.plans.items()
    )
    if resident.num_bytes <= beside_all and not gains:
        return num_blocks
    rest = int((beside_ring - moving.num_bytes) // card.block)
    # with all but the two in the slots on the card nothing would leave it
    return max(min(rest, num_blocks - NUM_SLOTS - 1), 0)
