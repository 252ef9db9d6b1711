"""Memory and time that a run takes on each card that we know, as numbers; tools/plan.py prints
them. No GPU is touched and no time measured.
"""

from collections.abc import Sequence
from typing import NamedTuple

from loader.dataset import open_datasets
from loader.order import MIX_BLOCK, Order, Places
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import Bucket
from loader.store import read_dataset
from tools.cards import CARDS, Card, Rates
from tools.counts import (
    Step,
    exchanged_bytes,
    forward_exchanged_bytes,
    forward_of,
    layers,
    num_adapter_parameters,
    num_parameters,
    step_of,
)
from tools.streaming import Moved, hidden_from_tokens, moved_on, planner, with_copies
from train.activations.plan import ShapePlan
from train.activations.sizes import Shape, kernels_by_tag, scratch_bytes
from train.base import layout_of
from train.choices import attention_shapes, micro_shapes
from train.config import TrainConfig
from train.lora.config import parse_blocks
from train.model.attention import NOT_DETERMINISTIC, Choice, Row, fixed_kernel
from train.model.wan import WanConfig
from train.optim import state_bytes
from train.parallel.sequence import check_heads

GIB = 2**30
CONTEXT_BYTES = 0.7 * GIB  # CUDA context, cuBLAS and cuDNN workspaces: an allowance, not measured
KERNEL_S = 4e-6  # what a kernel costs beside its work, from 832x480x9 on an H200


class Span(NamedTuple):
    """Seconds with the fast and with the slow rates of a card: equal where they are measured."""

    fast: float
    slow: float


class CardBudget(NamedTuple):
    """One card's share of a run, with attention kernels of one kind."""

    card: Card
    # the kernels that run; of the largest shape its name
    kernels: Choice
    # at the peak, with what attention from GEMMs needs for its scores
    num_bytes: float
    scratch_bytes: int
    fits: bool
    # of an optimizer step; None: why_no_time says why
    step_s: Span | None
    why_no_time: str
    # what each shape saves for the backward pass
    plans: dict[Bucket, ShapePlan]
    moved: Moved
    # of a micro-batch, without what is copied; empty where why_no_time says why
    compute_s: dict[Bucket, Span]
    # of these the forward pass's
    forward_s: dict[Bucket, Span]
    # tokens of a micro-batch from which on the copies of moved weights hide; 0: nothing moves
    hidden_from: int
    # that a card sends to those that share its samples, in a micro-batch
    exchanged_bytes: dict[Bucket, float]


class Budget(NamedTuple):
    # bytes on one GPU that stay from step to step, by part
    resident: dict[str, float]
    cards: list[CardBudget]


def budget(
    config: TrainConfig,
    wan: WanConfig,
    shares: dict[Bucket, float],
    num_gpus: int,
    cards: Sequence[Card] = CARDS,
) -> Budget:
    """What `config` takes on `num_gpus` of each card; `shares`: how often each shape comes. Raises
    ValueError where the trainer would refuse the batch.
    """
    if num_gpus < 1:
        raise ValueError(f"--gpus {num_gpus}: use at least 1")
    sequence = config.parallel.sequence
    if num_gpus % sequence:
        raise ValueError(
            f"--gpus {num_gpus}: parallel.sequence = {sequence} takes a multiple of {sequence}"
        )
    check_heads(sequence, wan.num_attention_heads)
    # those that train a sample together count as one
    num_groups = num_gpus // sequence
    shapes = micro_shapes(config, num_groups, shares, layout_of(wan))
    resident = resident_parts(config, wan)
    on_cards = [
        _on_card(card, kernels, config, wan, shares, shapes, sum(resident.values()), num_groups)
        for card in cards
        for kernels in kernels_on(card, config, wan, list(shapes.values()))
    ]
    return Budget(resident, on_cards)


def _on_card(
    card: Card,
    kernels: Choice,
    config: TrainConfig,
    wan: WanConfig,
    shares: dict[Bucket, float],
    shapes: dict[Bucket, Shape],
    resident_bytes: float,
    num_groups: int,
) -> CardBudget:
    samples_per_group = config.global_batch / num_groups
    dtype_bytes, memory_bytes = _dtype_bytes(config), card.memory_gib * GIB
    first_block = parse_blocks(config.lora.blocks, wan.num_layers)[0]
    room_bytes = 0.95 * (memory_bytes - CONTEXT_BYTES)
    num_gpus = num_groups * config.parallel.sequence
    moved = moved_on(config, wan, kernels, list(shapes.values()), room_bytes, num_gpus)
    resident_bytes -= moved.freed_bytes
    plan = planner(config, wan, kernels, list(shapes.values()))
    by_shape, activation_bytes = plan(0.95 * (memory_bytes - resident_bytes), moved.num_blocks > 0)
    num_bytes = resident_bytes + activation_bytes

    plans = {bucket: by_shape[shape] for bucket, shape in shapes.items()}
    step_s, no_time = None, why_no_time(config, card, kernels)
    compute_s: dict[Bucket, Span] = {}
    forward_s: dict[Bucket, Span] = {}
    exchanged = {
        bucket: exchanged_bytes(
            wan, shape, config.lora.targets, dtype_bytes, plans[bucket], first_block
        )
        for bucket, shape in shapes.items()
    }
    if not no_time:
        steps = {
            bucket: step_of(
                wan,
                shapes[bucket].num_tokens,
                config.lora.targets,
                config.lora.rank,
                dtype_bytes,
                plans[bucket],
                first_block,
                shapes[bucket].num_parts,
            )
            for bucket in shares
        }
        for bucket in shares:
            by_tag = kernels_by_tag(shapes[bucket], kernels)
            sample_s = Span(*(seconds(steps[bucket], rates, by_tag) for rates in card.rates))
            # an exchange stands between two kernels: nothing runs beside it
            exchange_s = exchanged[bucket] / card.peer_bytes
            compute_s[bucket] = Span(
                *(shapes[bucket].batch * each + exchange_s for each in sample_s)
            )
            forward = forward_of(
                wan,
                shapes[bucket].num_tokens,
                config.lora.targets,
                config.lora.rank,
                dtype_bytes,
                shapes[bucket].num_parts,
            )
            sent = forward_exchanged_bytes(wan, shapes[bucket], dtype_bytes) / card.peer_bytes
            forward_s[bucket] = Span(
                *(shapes[bucket].batch * seconds(forward, r, by_tag) + sent for r in card.rates)
            )
        step_s = Span(
            *(
                samples_per_group
                * sum(
                    share
                    * with_copies(
                        moved, card.link_bytes, forward_s[bucket][end], compute_s[bucket][end]
                    )
                    / shapes[bucket].batch
                    for bucket, share in shares.items()
                )
                for end in (0, 1)
            )
        )
    return CardBudget(
        card=card,
        kernels=kernels,
        num_bytes=num_bytes,
        scratch_bytes=max(
            scratch_bytes(wan, shape, dtype_bytes, kernels) for shape in shapes.values()
        ),
        fits=num_bytes <= memory_bytes,
        step_s=step_s,
        why_no_time=no_time,
        plans=plans,
        moved=moved,
        compute_s=compute_s,
        forward_s=forward_s,
        hidden_from=_hidden_from(card, kernels, config, wan, moved) if compute_s else 0,
        exchanged_bytes=exchanged,
    )


def _hidden_from(
    card: Card, kernels: Choice, config: TrainConfig, wan: WanConfig, moved: Moved
) -> int:
    """Of the forward pass of whole samples, at the card's fast rates: a block's backward takes
    longer.
    """
    if not moved.num_blocks:
        return 0

    def forward_s(num_tokens: int) -> float:
        targets, rank = config.lora.targets, config.lora.rank
        step = forward_of(wan, num_tokens, targets, rank, _dtype_bytes(config))
        by_tag = kernels_by_tag(Shape(1, num_tokens, MAX_TEXT_TOKENS), kernels)
        return seconds(step, card.fast, by_tag)

    return hidden_from_tokens(forward_s, moved.forward_bytes / card.link_bytes)


def resident_parts(config: TrainConfig, wan: WanConfig) -> dict[str, float]:
    """Bytes on one GPU that stay from step to step, by part."""
    parameters, dtype_bytes = num_parameters(wan), _dtype_bytes(config)
    rank, blocks = config.lora.rank, parse_blocks(config.lora.blocks, wan.num_layers)
    num_adapter = num_adapter_parameters(wan, config.lora.targets, rank, len(blocks))
    base = parameters.half * dtype_bytes + 4.0 * parameters.full
    if config.lora.base == "nf4":
        adapted = [layer for name, layer in layers(wan).items() if name in config.lora.targets]
        # half a byte a weight, and a statistic for 64 of them
        num_weights = len(blocks) * sum(layer.width * layer.num_out for layer in adapted)
        base -= num_weights * (dtype_bytes - 0.516)
        # each [W | B] is unpacked while in use: q, k and v are one
        base += max(3 * (layer.width + rank) * layer.num_out for layer in adapted) * dtype_bytes
    # of one more copy of the adapters, and of a second one while they are shown
    average = {"average of the LoRA": num_adapter * 8.0} if config.optim.ema else {}
    return {
        "base model": base,
        "LoRA, its gradient, its copies": num_adapter * (8.0 + dtype_bytes),
        **average,
        "optimizer": num_adapter * state_bytes(config.optim),
        "CUDA (an allowance)": CONTEXT_BYTES,
    }


def seconds(step: Step, rates: Rates, kernels: dict[str, str]) -> float:
    """Of one sample's pass in half precision; kernels: of each attention, by tag."""
    attention_s = sum(
        flops / rates.attention_flops[kernels[name]] for name, flops in step.attention_flops.items()
    )
    return (
        step.gemm_flops / rates.gemm_flops
        + attention_s
        + step.moved_bytes / rates.copy_bytes
        + step.num_kernels * KERNEL_S
    )


def kernels_on(
    card: Card, config: TrainConfig, wan: WanConfig, shapes: Sequence[Shape]
) -> list[Choice]:
    """The attention kernels to count with. What "auto" takes on a card is known only there: the
    first of its rates here. On a card without fused kernels for its tensor cores that is the fixed
    rule between attention from GEMMs and the memory-efficient kernel, and the latter alone beside
    it.
    """
    rates = card.slow.attention_flops
    if config.model.attention != "auto":
        return [Choice(config.model.attention, card.name, ())]
    if config.deterministic and "flash" in rates:
        return [Choice("flash", card.name, ())]
    first = next(iter(rates))
    alone = Choice(first, card.name, ())
    if first != "efficient" or config.model.dtype != "float16":
        return [alone]
    rows = tuple(
        Row(shape.num_queries, shape.num_keys, fixed_kernel(["efficient", "gemm"], shape), {})
        for shape in attention_shapes(wan, shapes)
    )
    mixed = Choice(first, card.name, rows)
    return [alone] if mixed.names == first else [mixed, alone]


def why_no_time(config: TrainConfig, card: Card, kernels: Choice) -> str:
    """What the trainer refuses there, or there are no rates for; empty: neither."""
    name = kernels.kernel
    if config.model.dtype == "bfloat16" and not card.has_bfloat16:
        return 'refused: no bfloat16 there, set model.dtype = "float16"'
    if config.deterministic and name in NOT_DETERMINISTIC:
        return f'refused: attention = "{name}" is not deterministic'
    if config.model.dtype == "float32":
        return "no rates for float32"
    if name == "gemm" and config.model.dtype != "float16":
        return 'refused: attention = "gemm" needs model.dtype = "float16"'
    known = card.slow.attention_flops
    return "" if name in known else f'no rate for attention = "{name}" there'


def order_of(config: TrainConfig) -> Order:
    """The sequence of the run's batches. Raises ValueError where the trainer would refuse the
    datasets.
    """
    data = config.data
    excluded: list[Places] | None = None
    if any(data.exclude):
        # whose samples these are stands in the shards
        datasets = open_datasets(data, "train")
        shards = [dataset.shards for dataset in datasets]
        excluded = [dataset.excluded for dataset in datasets]
    else:
        # the manifests alone will do
        manifests = [read_dataset(location)[1] for location in data.datasets]
        shards = [manifest.splits.get("train", []) for manifest in manifests]
    return Order(
        shards,
        seed=config.seed,
        global_batch=config.global_batch,
        weights=data.weights or None,
        excluded=excluded,
    )


def buckets_of(order: Order) -> dict[Bucket, float]:
    """The shapes that are trained, each with its share of the batches."""
    shares: dict[Bucket, float] = {}
    per_dataset = zip(order.quotas, order.batches_per_epoch, order.counts, strict=True)
    for quota, num_batches, counts in per_dataset:
        for count in counts:
            if count.num_batches:
                share = quota / MIX_BLOCK * count.num_batches / num_batches
                shares[count.bucket] = shares.get(count.bucket, 0.0) + share
    return dict(sorted(shares.items()))


def _dtype_bytes(config: TrainConfig) -> int:
    return 4 if config.model.dtype == "float32" else 2
