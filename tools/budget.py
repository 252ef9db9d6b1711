"""Memory and time that a run takes on each card that we know, as numbers; tools/plan.py prints
them. No GPU is touched and no time measured.
"""

from typing import NamedTuple

from loader.order import MIX_BLOCK, Order
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import WAN22, Bucket
from loader.store import read_dataset
from tools.cards import CARDS, Card
from tools.counts import Step, layers, num_adapter_parameters, num_parameters, step_of
from train.activations.budget import parse_activation_memory
from train.activations.plan import Shape, ShapePlan, plan_run
from train.config import TrainConfig
from train.model.wan import WanConfig

GIB = 2**30
CONTEXT_BYTES = 0.7 * GIB  # CUDA context, cuBLAS and cuDNN workspaces: an allowance, not measured
KERNEL_S = 4e-6  # what a kernel costs beside its work, from 832x480x9 on an H200


class CardBudget(NamedTuple):
    """One card's share of a run."""

    card: Card
    attention: str
    # at the peak
    num_bytes: float
    fits: bool
    # of an optimizer step; None: why_no_time says why
    step_s: float | None
    why_no_time: str
    # what each shape saves for the backward pass
    plans: dict[Bucket, ShapePlan]


class Budget(NamedTuple):
    # bytes on one GPU that stay from step to step, by part
    resident: dict[str, float]
    cards: list[CardBudget]


def budget(
    config: TrainConfig, wan: WanConfig, shares: dict[Bucket, float], num_gpus: int
) -> Budget:
    """What `config` takes on `num_gpus` of each card; `shares`: how often each shape comes. Raises
    ValueError where the trainer would refuse the batch.
    """
    if num_gpus < 1 or config.global_batch % (config.micro_batch * num_gpus):
        raise ValueError(
            f"global_batch = {config.global_batch} is not a multiple of micro_batch x GPUs = "
            f"{config.micro_batch} x {num_gpus}"
        )
    resident = resident_parts(config, wan)
    samples_per_gpu = config.global_batch / num_gpus
    cards = [
        _on_card(card, config, wan, shares, sum(resident.values()), samples_per_gpu)
        for card in CARDS
    ]
    return Budget(resident, cards)


def _on_card(
    card: Card,
    config: TrainConfig,
    wan: WanConfig,
    shares: dict[Bucket, float],
    resident_bytes: float,
    samples_per_gpu: float,
) -> CardBudget:
    attention, dtype_bytes = attention_of(config, card), _dtype_bytes(config)
    memory_bytes = card.memory_gib * GIB
    shapes = {
        bucket: Shape(config.micro_batch, WAN22.num_tokens(bucket), MAX_TEXT_TOKENS)
        for bucket in shares
    }
    by_shape = plan_run(
        wan,
        list(shapes.values()),
        targets=config.lora.targets,
        dtype_bytes=dtype_bytes,
        budget_bytes=parse_activation_memory(config.activation_memory),
        room_bytes=0.95 * (memory_bytes - resident_bytes),
        max_graph_tokens=config.cuda_graph_tokens,
        attention=attention,
        offload=config.activation_offload,
    )
    # shapes that run as CUDA graphs keep their memory while the others run
    graph_bytes, other_bytes = 0.0, 0.0
    for shape, plan in by_shape.items():
        if shape.batch * shape.num_tokens <= config.cuda_graph_tokens:
            graph_bytes = max(graph_bytes, plan.num_bytes)
        else:
            other_bytes = max(other_bytes, plan.num_bytes)
    num_bytes = resident_bytes + graph_bytes + other_bytes

    plans = {bucket: by_shape[shape] for bucket, shape in shapes.items()}
    step_s, no_time = None, why_no_time(config, card)
    if not no_time:
        targets, rank = config.lora.targets, config.lora.rank
        mean_sample_s = sum(
            share
            * seconds(
                step_of(wan, bucket, targets, rank, dtype_bytes, plans[bucket]), card, attention
            )
            for bucket, share in shares.items()
        )
        step_s = mean_sample_s * samples_per_gpu
    return CardBudget(
        card=card,
        attention=attention,
        num_bytes=num_bytes,
        fits=num_bytes <= memory_bytes,
        step_s=step_s,
        why_no_time=no_time,
        plans=plans,
    )


def resident_parts(config: TrainConfig, wan: WanConfig) -> dict[str, float]:
    """Bytes on one GPU that stay from step to step, by part."""
    parameters, dtype_bytes = num_parameters(wan), _dtype_bytes(config)
    rank = config.lora.rank
    num_adapter = num_adapter_parameters(wan, config.lora.targets, rank)
    base = parameters.half * dtype_bytes + 4.0 * parameters.full
    if config.lora.base == "nf4":
        adapted = [layer for name, layer in layers(wan).items() if name in config.lora.targets]
        # half a byte a weight, and a statistic for 64 of them
        num_weights = wan.num_layers * sum(layer.width * layer.num_out for layer in adapted)
        base -= num_weights * (dtype_bytes - 0.516)
        # each [W | B] is unpacked while in use: q, k and v are one
        base += max(3 * (layer.width + rank) * layer.num_out for layer in adapted) * dtype_bytes
    return {
        "base model": base,
        "LoRA, its gradient, its copies": num_adapter * (8.0 + dtype_bytes),
        "optimizer": num_adapter * (2.0 if config.optim.name == "adamw8bit" else 8.0),
        "CUDA (an allowance)": CONTEXT_BYTES,
    }


def seconds(step: Step, card: Card, attention: str) -> float:
    """Of one sample's pass on `card` in half precision, with an attention kernel that runs
    there.
    """
    return (
        step.gemm_flops / card.gemm_flops
        + step.attention_flops / card.attention_flops[attention]
        + step.moved_bytes / card.copy_bytes
        + step.num_kernels * KERNEL_S
    )


def attention_of(config: TrainConfig, card: Card) -> str:
    """The kernel's name. What "auto" would be on a card is known only there: flash4 is taken
    where it can run.
    """
    if config.model.attention != "auto":
        return config.model.attention
    if config.deterministic and "flash" in card.attention_flops:
        return "flash"
    return next(iter(card.attention_flops))


def why_no_time(config: TrainConfig, card: Card) -> str:
    """What the trainer refuses there, or there are no rates for; empty: neither."""
    name = attention_of(config, card)
    if config.model.dtype == "bfloat16" and not card.has_bfloat16:
        return 'refused: no bfloat16 there, set model.dtype = "float16"'
    if config.deterministic and name in ("flash4", "cudnn"):
        return f'refused: attention = "{name}" is not deterministic'
    if config.model.dtype == "float32":
        return "no rates for float32"
    return "" if name in card.attention_flops else f'no rate for attention = "{name}" there'


def order_of(config: TrainConfig) -> Order:
    """The sequence of the run's batches, exclusions left aside. Raises ValueError where the
    trainer would refuse the datasets.
    """
    manifests = [read_dataset(location)[1] for location in config.data.datasets]
    return Order(
        [manifest.splits.get("train", []) for manifest in manifests],
        seed=config.seed,
        global_batch=config.global_batch,
        weights=config.data.weights or None,
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
