"""Does it fit, how long will it take, what to change: python -m tools.plan CONFIG.toml [--shape
1280x704x49] [--gpus 2]

Counted, not guessed: the floating-point operations, the bytes of every part in memory, and what
the configuration's `activation_memory` keeps or computes again. A time needs rates besides. Those
of the H200 are what the kernels of a step reach there at 1280x704x49 (tools.profile_step,
bench/README.md); the other cards' are their data sheets' peaks times the share of its peak that
the H200 reached, so their times are *modelled* and may be far off, above all V100's, whose
attention kernel is another one. No time is measured here; no GPU is touched.

Without --shape the buckets of the configured datasets are taken, each with its share of the
samples.

Left out: the network and the disks (the loader hides them or the metrics say so), the VAE of
condition = "raw", what `activation_offload` moves over PCIe (it runs beside).
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from loader.config import load_toml
from loader.order import MIX_BLOCK, Order, describe_counts
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import WAN22, Bucket
from loader.store import read_dataset
from train.activations.budget import parse_activation_memory
from train.activations.plan import GROUPS, Shape, ShapePlan, describe, plan_run
from train.config import TrainConfig
from train.model.load import read_config
from train.model.wan import WanConfig

GIB = 2**30
CONTEXT_BYTES = 0.7 * GIB  # CUDA context, cuBLAS and cuDNN workspaces: an allowance, not measured


class Card(NamedTuple):
    """Rates that a step reaches, per second: operations of half-precision GEMMs and, for each
    attention kernel that runs there, of that (forward and backward together, counting 3.5 times
    the forward), bytes moved. The kernel that "auto" takes comes first; with `deterministic` that
    is flash, where it runs.
    """

    name: str
    memory_gib: float
    gemm_flops: float
    attention_flops: dict[str, float]
    copy_bytes: float
    has_bfloat16: bool
    source: str


# shares of the data sheet's 989 TFLOP/s and 4.8 TB/s; flash's by its time beside cuDNN's, see
# train/model/attention.py
_GEMM, _FLASH4, _CUDNN, _EFFICIENT, _MEMORY = 725 / 989, 568 / 989, 488 / 989, 131 / 989, 3.9 / 4.8
_FLASH = _CUDNN * 10.7 / 18.1
_HOPPER = {
    name: 989e12 * share
    for name, share in (
        ("flash4", _FLASH4),
        ("cudnn", _CUDNN),
        ("flash", _FLASH),
        ("efficient", _EFFICIENT),
    )
}
CARDS = (
    Card(
        "V100-PCIE-32GB",
        32,
        112e12 * _GEMM,
        {"efficient": 112e12 * _EFFICIENT},
        0.9e12 * _MEMORY,
        False,
        "modelled: data sheet 112 TFLOP/s fp16, 0.9 TB/s",
    ),
    Card(
        "A100-SXM-80GB",
        80,
        312e12 * _GEMM,
        {"flash": 312e12 * _CUDNN, "efficient": 312e12 * _EFFICIENT},
        2.0e12 * _MEMORY,
        True,
        "modelled: data sheet 312 TFLOP/s, 2.0 TB/s; flash as cuDNN on the H200",
    ),
    Card(
        "H100-SXM-80GB",
        80,
        989e12 * _GEMM,
        _HOPPER,
        3.35e12 * _MEMORY,
        True,
        "modelled: the H200's arithmetic, 3.35 TB/s",
    ),
    Card(
        "H200",
        139,
        989e12 * _GEMM,
        _HOPPER,
        4.8e12 * _MEMORY,
        True,
        "rates measured, see bench/README.md",
    ),
)
# what a kernel costs beside its work, from 832x480x9 on the H200
KERNELS_PER_BLOCK, KERNEL_S = 70, 4e-6


class Step(NamedTuple):
    """What one sample's forward and backward pass needs: operations, bytes moved between the
    GEMMs, kernels.
    """

    gemm_flops: float
    attention_flops: float
    moved_bytes: float
    num_kernels: float


def layer_sizes(config: WanConfig) -> dict[str, tuple[int, int, bool]]:
    """Every linear layer of a block: name -> (in, out, whether its rows are video tokens and not
    text tokens).
    """
    d, ffn = config.dim, config.ffn_dim
    sizes = {
        f"attn{i}.to_{name}": (d, d, i == 1 or name in ("q", "out.0"))
        for i in (1, 2)
        for name in ("q", "k", "v", "out.0")
    }
    return sizes | {"ffn.net.0.proj": (d, ffn, True), "ffn.net.2": (ffn, d, True)}


def num_parameters(config: WanConfig) -> tuple[int, int]:
    """(in the compute dtype, in float32) of the frozen base: see train/model/load.py for which
    are which.
    """
    d, patch = config.dim, 4 * config.in_channels
    half = config.num_layers * sum((k + 1) * n for k, n, _ in layer_sizes(config).values())
    half += (
        (patch + 1) * d
        + (config.text_dim + 1) * d
        + (d + 1) * d
        + (d + 1) * 4 * config.out_channels
    )
    full = (
        config.num_layers * 12 * d
        + 2 * d
        + (config.freq_dim + 1) * d
        + (d + 1) * d
        + (d + 1) * 6 * d
    )
    return half, full


def num_adapter_parameters(config: WanConfig, targets: list[str], rank: int) -> int:
    return (
        config.num_layers
        * rank
        * sum(k + n for name, (k, n, _) in layer_sizes(config).items() if name in targets)
    )


def linear_flops(
    config: WanConfig, num_tokens: int, targets: list[str], rank: int, input_needs_gradient: bool
) -> dict[str, tuple[float, float]]:
    """Per GEMM of a block, adapters included: operations (forward, backward) for one sample; see
    train/lora/linear.py.

    The text needs no gradient, nor does the first block's input (`input_needs_gradient` False).
    """
    sizes, flops = layer_sizes(config), {}
    for group, names in GROUPS.items():
        width, _, video = sizes[names[0]]
        num_rows = num_tokens if video else MAX_TEXT_TOKENS
        num_out, low = (
            sum(sizes[name][1] for name in names),
            rank * sum(name in targets for name in names),
        )
        product = 2.0 * num_rows
        adapters = product * low * (num_out + width)  # the gradients of B and of A
        if video and (group != "attn1.qkv" or input_needs_gradient):
            adapters += product * (num_out * (width + low) + low * width)  # dy B, dlow A, dy W
        else:
            adapters += product * num_out * low  # dy B
        flops[group] = (product * (num_out * (width + low) + low * width), adapters)
    return flops


def attention_flops(config: WanConfig, num_tokens: int) -> dict[str, float]:
    """Forward operations of a block's two attentions for one sample."""
    return {
        "attn1": 4.0 * num_tokens**2 * config.dim,
        "attn2": 4.0 * num_tokens * MAX_TEXT_TOKENS * config.dim,
    }


def step_of(
    config: WanConfig,
    bucket: Bucket,
    targets: list[str],
    rank: int,
    dtype_bytes: int,
    activations: ShapePlan,
) -> Step:
    """Count one sample: forward, the backward pass with respect to activations and adapters, and
    what is recomputed.
    """
    tokens, d, blocks = WAN22.num_tokens(bucket), config.dim, config.num_layers
    attention = attention_flops(config, tokens)
    first, other = (linear_flops(config, tokens, targets, rank, needs) for needs in (False, True))
    gemm_total = sum(map(sum, first.values())) + (blocks - 1) * sum(map(sum, other.values()))
    attention_total = blocks * 3.5 * sum(attention.values())
    stream, row, up = (
        4 * tokens * d,
        dtype_bytes * tokens * d,
        dtype_bytes * tokens * config.ffn_dim,
    )
    forward_bytes = 6 * stream + 12 * row + 2 * up  # three norms, q/k/v, q, GELU
    moved = blocks * (forward_bytes + 9 * stream + 17 * row + 3 * up)
    # the narrow products of adapters: x twice, the low-rank part of dx twice, dy once (twice on a
    # V100)
    for names in GROUPS.values():
        if video_targets := [
            name for name in names if name in targets and layer_sizes(config)[name][2]
        ]:
            width, num_out, _ = layer_sizes(config)[video_targets[0]]
            moved += blocks * dtype_bytes * tokens * (4 * width + len(names) * num_out)
    num_kernels = float(blocks * KERNELS_PER_BLOCK)
    if activations.saved is not None:
        for block in activations.saved:
            attention_total += sum(value for name, value in attention.items() if name not in block)
            gemm_total += sum(
                forward
                for name, (forward, _) in other.items()
                if name not in block and name != "ffn.down"
            )  # its output is saved: the next block's input
            # but not what B reads
            gemm_total += 2.0 * tokens * config.ffn_dim * rank * ("ffn.net.2" in targets)
        moved, num_kernels = moved + blocks * forward_bytes, 1.3 * num_kernels
    return Step(gemm_total, attention_total, moved, num_kernels)


def resident_parts(config: TrainConfig, wan: WanConfig) -> dict[str, float]:
    """Bytes on one GPU that stay from step to step, by part."""
    half, full = num_parameters(wan)
    dtype_bytes = 4 if config.model.dtype == "float32" else 2
    adapters = num_adapter_parameters(wan, config.lora.targets, config.lora.rank)
    adapted = [
        (k, n) for name, (k, n, _) in layer_sizes(wan).items() if name in config.lora.targets
    ]
    base = half * dtype_bytes + 4.0 * full
    # half a byte a weight and a statistic for 64; each [W | B] is unpacked while in use
    if config.lora.base == "nf4":
        base -= wan.num_layers * sum(k * n for k, n in adapted) * (dtype_bytes - 0.516)
        base += max(3 * (k + config.lora.rank) * n for k, n in adapted) * dtype_bytes
    return {
        "base model": base,
        "LoRA, its gradient, its copies": adapters * (8.0 + dtype_bytes),
        "optimizer": adapters * (2.0 if config.optim.name == "adamw8bit" else 8.0),
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
    return (
        "flash"
        if config.deterministic and "flash" in card.attention_flops
        else next(iter(card.attention_flops))
    )


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


def report(config: TrainConfig, wan: WanConfig, shares: dict[Bucket, float], num_gpus: int) -> str:
    """The whole answer as text. Raises ValueError where the trainer would refuse the batch."""
    if num_gpus < 1 or config.global_batch % (config.micro_batch * num_gpus):
        raise ValueError(
            f"global_batch = {config.global_batch} is not a multiple of micro_batch x GPUs = "
            f"{config.micro_batch} x {num_gpus}"
        )
    dtype_bytes = 4 if config.model.dtype == "float32" else 2
    budget_bytes = parse_activation_memory(config.activation_memory)
    resident = resident_parts(config, wan)
    largest = max(shares, key=lambda bucket: WAN22.num_tokens(bucket))
    lines = [
        f"memory of one GPU, micro_batch {config.micro_batch}, activation_memory = {config.activation_memory}"
    ]
    lines += [f"  {name:<32}{value / GIB:8.2f} GiB" for name, value in resident.items()]
    lines += [
        "",
        f"{config.num_steps:,} steps of {config.global_batch} samples on {num_gpus} GPU(s), shapes "
        + ", ".join(f"{bucket} ({share:.0%})" for bucket, share in shares.items()),
        f"  {'card':<16}{'GiB':>6} {'fits':<5}{'s/step':>8}{'days':>7}   what is saved at {largest}; rates",
    ]
    tight = False
    for card in CARDS:
        room_bytes = 0.95 * (card.memory_gib * GIB - sum(resident.values()))
        shapes = {
            bucket: Shape(config.micro_batch, WAN22.num_tokens(bucket), MAX_TEXT_TOKENS)
            for bucket in shares
        }
        plans = plan_run(
            wan,
            list(shapes.values()),
            config.lora.targets,
            dtype_bytes,
            budget_bytes,
            room_bytes,
            config.cuda_graph_tokens,
            attention_of(config, card),
            config.activation_offload,
        )
        no_time, times = why_no_time(config, card), f"{'-':>8}{'-':>7}"
        if not no_time:
            sample_s = sum(
                share
                * seconds(
                    step_of(
                        wan,
                        bucket,
                        config.lora.targets,
                        config.lora.rank,
                        dtype_bytes,
                        plans[shapes[bucket]],
                    ),
                    card,
                    attention_of(config, card),
                )
                for bucket, share in shares.items()
            )
            step_s = sample_s * config.global_batch / num_gpus
            times = f"{step_s:8.2f}{step_s * config.num_steps / 86400:7.2f}"
        graphs, others = (
            [
                plan.num_bytes
                for shape, plan in plans.items()
                if (shape.batch * shape.num_tokens <= config.cuda_graph_tokens) == graph
            ]
            # graphs keep their memory while the others run
            for graph in (True, False)
        )
        total = sum(resident.values()) + max(graphs, default=0) + max(others, default=0)
        fits = total <= card.memory_gib * GIB
        tight |= not fits
        lines.append(
            f"  {card.name:<16}{total / GIB:6.1f} {'yes' if fits else 'no':<5}{times}   "
            f"{no_time or f'{attention_of(config, card)} attention; {card.source}'}"
        )
        lines.append(f"  {'':<16}{describe(wan, plans[shapes[largest]])}")
    if tight:
        lines.append(
            'To fit a smaller card: activation_memory = "auto" or "block", activation_offload = true, '
            'micro_batch = 1, optim.name = "adamw8bit", or smaller windows.buckets'
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="override one key of the file",
    )
    parser.add_argument(
        "--shape", metavar="WIDTHxHEIGHTxFRAMES", help="instead of the datasets' shapes"
    )
    parser.add_argument("--gpus", type=int, default=2)
    arguments = parser.parse_args()
    try:
        config = load_toml(arguments.config, TrainConfig, arguments.set)
        wan = read_config(Path(config.model.path) / "transformer" / "config.json")
        if arguments.shape:
            shares = {WAN22.parse(arguments.shape): 1.0}
        else:
            order = order_of(config)
            shares = buckets_of(order)
            for name, counts in zip(config.data.datasets, order.counts, strict=True):
                print(f"{name}: {describe_counts(counts, config.global_batch)}")
        print(report(config, wan, shares, arguments.gpus))
    except (ValueError, OSError) as error:
        sys.exit(f"plan: {error}")


if __name__ == "__main__":
    main()
