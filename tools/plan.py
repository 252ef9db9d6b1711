"""Does it fit, how long will it take, what to change: python -m tools.plan CONFIG.toml [--shape
1280x704x49] [--gpus 2]

Counted, not guessed: the floating-point operations, the bytes of every part in memory, and what
the configuration's `activation_memory` saves or computes again (tools/counts.py, tools/budget.py).
A time needs rates besides, which are measured or modelled (tools/cards.py).

Without --shape the buckets of the configured datasets are taken, each with its share of the
samples.

Left out: the network and the disks (the loader hides them or the metrics say so), the VAE of
condition = "raw", what `activation_offload` moves over PCIe (it runs beside).
"""

import argparse
import sys
from pathlib import Path

from loader.config import load_toml
from loader.order import describe_counts
from loader.shape import WAN22, Bucket
from tools.budget import GIB, Budget, CardBudget, buckets_of, budget, order_of
from tools.table import table
from train.activations.plan import describe
from train.config import TrainConfig
from train.model.load import read_config
from train.model.wan import WanConfig

ADVICE = (
    'To fit a smaller card: activation_memory = "auto" or "block", activation_offload = true, '
    'micro_batch = 1, optim.name = "adamw8bit", or smaller windows.buckets'
)


def report(config: TrainConfig, wan: WanConfig, shares: dict[Bucket, float], num_gpus: int) -> str:
    """The whole answer as text. Raises ValueError where the trainer would refuse the batch."""
    found = budget(config, wan, shares, num_gpus)
    shapes = ", ".join(f"{bucket} ({share:.0%})" for bucket, share in shares.items())
    largest = max(shares, key=WAN22.num_tokens)
    lines = [
        f"memory of one GPU, micro_batch {config.micro_batch}, activation_memory = "
        f"{config.activation_memory}",
        table(
            ("part", "GiB"),
            [(name, f"{value / GIB:.2f}") for name, value in found.resident.items()],
            align="<>",
        ),
        "",
        f"{config.num_steps:,} steps of {config.global_batch} samples on {num_gpus} GPU(s), "
        f"shapes {shapes}",
        _cards_table(found, config.num_steps),
        "",
        f"saved for the backward pass at {largest}",
        *(f"  {one.card.name}: {describe(wan, one.plans[largest])}" for one in found.cards),
    ]
    if not all(one.fits for one in found.cards):
        lines += ["", ADVICE]
    return "\n".join(lines)


def _cards_table(found: Budget, num_steps: int) -> str:
    def row(one: CardBudget) -> tuple[str, ...]:
        step_s = "-" if one.step_s is None else f"{one.step_s:.2f}"
        days = "-" if one.step_s is None else f"{one.step_s * num_steps / 86400:.2f}"
        rates = one.why_no_time or f"{one.attention} attention; {one.card.source}"
        fits = "yes" if one.fits else "no"
        return one.card.name, f"{one.num_bytes / GIB:.1f}", fits, step_s, days, rates

    header = ("card", "GiB", "fits", "s/step", "days", "rates")
    return table(header, map(row, found.cards), align="<><>><")


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
