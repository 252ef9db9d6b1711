"""Weights that are not resident, as tools.plan counts them: how many blocks' leave a card, what
they take in the host's memory, and whether their copies hide behind the computing.

A rate of the link between host and card is a data sheet's (tools/cards.py), so times are modelled,
and two cards behind one switch have half of it each.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from loader.registered import registered_bytes
from train.activations.budget import parse_activation_memory, peak_bytes
from train.activations.plan import plan_run
from train.activations.sizes import Shape
from train.config import TrainConfig
from train.lora.config import parse_blocks
from train.model.attention import Choice
from train.model.wan import WanConfig
from train.optim import state_bytes
from train.placement.layout import spread
from train.placement.plan import ActivationPlans, card_bytes, check_placement, choose_moved
from train.placement.ring import NUM_SLOTS


class Moved(NamedTuple):
    """Of a run on one card; all 0 where the weights are resident."""

    num_blocks: int = 0
    # that the card has less, its slots counted
    freed_bytes: float = 0.0
    # of the host's memory, once for all cards of a run; 0 where all cards have shares
    host_bytes: float = 0.0
    # to the card in a forward pass, and in a backward pass, which ends at the first adapted block
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0

    @property
    def copied_bytes(self) -> float:
        return self.forward_bytes + self.backward_bytes


def moved_on(
    config: TrainConfig,
    wan: WanConfig,
    kernels: Choice,
    shapes: Sequence[Shape],
    room_bytes: float,
    num_gpus: int = 1,
) -> Moved:
    """As the trainer would decide it (train/setup.py) on a card with so much room for everything.
    Raises ValueError for what it would refuse.
    """
    is_sharded = config.model.placement == "sharded"
    if is_sharded and num_gpus == 1:
        raise ValueError('model.placement = "sharded": one GPU has nobody to share weights with')
    check_placement(config.model, config.lora, config.activation_memory)
    blocks = parse_blocks(config.lora.blocks, wan.num_layers)
    dtype, targets = getattr(torch, config.model.dtype), config.lora.targets
    rank, of_optimizer = config.lora.rank, state_bytes(config.optim)
    card = card_bytes(wan, len(blocks), targets, rank, dtype, of_optimizer)
    num_moved = choose_moved(
        config.model,
        config.lora,
        config.activation_memory,
        wan.num_layers,
        card,
        planner(config, wan, kernels, shapes),
        lambda: room_bytes,
    )
    if not num_moved:
        return Moved()
    num_slots = min(NUM_SLOTS, num_moved)
    # there and back: what the slots hold at either turn is not fetched again
    num_trained = sum(place >= blocks[0] for place in spread(wan.num_layers, num_moved))
    kept_at_the_start = num_slots if num_trained == num_moved else 0
    forward_bytes = float(num_moved - kept_at_the_start) * card.block
    backward_bytes = float(max(num_trained - num_slots, 0)) * card.block
    freed_bytes = float((num_moved - num_slots) * card.block)
    if is_sharded:
        # each card keeps its share, and receives the others'
        share_bytes = num_moved * card.block / num_gpus
        others = 1 - 1 / num_gpus
        return Moved(
            num_blocks=num_moved,
            freed_bytes=freed_bytes - share_bytes,
            forward_bytes=others * forward_bytes,
            backward_bytes=others * backward_bytes,
        )
    return Moved(
        num_blocks=num_moved,
        freed_bytes=freed_bytes,
        host_bytes=float(registered_bytes(num_moved * card.block)),
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
    )


def planner(
    config: TrainConfig, wan: WanConfig, kernels: Choice, shapes: Sequence[Shape]
) -> Callable[[float, bool], ActivationPlans]:
    """(room_bytes, weights_move) -> what each shape saves there."""

    def plan(room_bytes: float, weights_move: bool) -> ActivationPlans:
        no_graphs = weights_move or config.parallel.sequence > 1
        graph_tokens = 0 if no_graphs else config.cuda_graph_tokens
        plans = plan_run(
            wan,
            list(shapes),
            targets=config.lora.targets,
            dtype_bytes=getattr(torch, config.model.dtype).itemsize,
            budget_bytes=parse_activation_memory(config.activation_memory),
            room_bytes=room_bytes,
            max_graph_tokens=graph_tokens,
            attention=kernels,
            offload=config.activation_offload,
            first_block=parse_blocks(config.lora.blocks, wan.num_layers)[0],
            weights_move=weights_move,
        )
        return ActivationPlans(plans, peak_bytes(plans, graph_tokens))

    return plan


def with_copies(moved: Moved, link_bytes: float, forward_s: float, compute_s: float) -> float:
    """A micro-batch's seconds. compute_s: of both passes, forward_s of it forward. Copies run
    beside the computing of their own pass, and none run ahead into the other: in each the longer
    counts.
    """
    backward_s = compute_s - forward_s
    return max(forward_s, moved.forward_bytes / link_bytes) + max(
        backward_s, moved.backward_bytes / link_bytes
    )


def hidden_from_tokens(compute_s: Callable[[int], float], copy_s: float) -> int:
    """The fewest video tokens of a micro-batch, in hundreds, whose computing takes as long as the
    copies. compute_s(num_tokens) grows with its argument.
    """
    low, high = 0, 1
    while compute_s(100 * high) < copy_s:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if compute_s(100 * middle) < copy_s else (low, middle)
    return 100 * high


def describe(
    moved: Moved, num_blocks: int, link_bytes: float, forward_s: float | None, hidden_from: int
) -> str:
    """One line. forward_s: of a micro-batch of the shape that hides least, None: not known;
    hidden_from: `hidden_from_tokens` of the forward pass.
    """
    copy_s = moved.copied_bytes / link_bytes
    where = "are in shares on all cards"
    if moved.host_bytes:
        where = (
            f"wait in the host's memory, {moved.host_bytes / 2**30:.1f} GiB for all cards of the "
            f"run"
        )
    line = (
        f"weights of {moved.num_blocks} of {num_blocks} blocks {where}; {copy_s:.1f} s of copying "
        f"a micro-batch at {link_bytes / 1e9:.0f} GB/s (modelled)"
    )
    if forward_s is None:
        return line
    forward_copy_s = moved.forward_bytes / link_bytes
    hidden = "hidden behind" if forward_copy_s <= forward_s else "more than"
    return (
        f"{line}, {forward_copy_s:.1f} s of it in the forward pass, {hidden} "
        f"{forward_s:.1f} s of computing there; all hides from about {hidden_from:,} tokens of a "
        f"micro-batch on"
    )
