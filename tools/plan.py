"""Does it fit, how long will it take, what to change: python -m tools.plan CONFIG.toml [--shape
1280x704x49] [--gpus 2]

Counted, not guessed: the floating-point operations, the bytes of every part in memory, and what
the configuration's `activation_memory` saves or computes again (tools/counts.py, tools/budget.py).
A time needs rates besides, which are measured or modelled (tools/cards.py).

At the end stand the days of two whole recipes at 1280x704x49, whatever the configured number of
steps, with the rest of the configuration as it is.

Without --shape the buckets of the configured datasets are taken, each with its share of the
samples.

Left out: the network and the disks (the loader hides them or the metrics say so), the VAE of
condition = "raw", what `activation_offload` moves over PCIe (it runs beside; weights that are not
resident are counted).
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from loader.config import load_toml
from loader.files import told
from loader.order import describe_counts
from loader.shape import Bucket
from tools.budget import GIB, Budget, CardBudget, Span, buckets_of, budget, order_of
from tools.checks import check_datasets, check_run
from tools.evaluation import evaluation, final_evaluation
from tools.streaming import describe as describe_moved
from tools.table import table
from train.activations.plan import describe
from train.base import base_kind, layout_of, transformer_folder
from train.config import TrainConfig, in_steps
from train.model.load import read_config
from train.model.wan import WanConfig

LARGE = Bucket(1280, 704, 49)


class Recipe(NamedTuple):
    """What our users set out to train."""

    name: str
    rank: int
    num_steps: int
    global_batch: int


RECIPES = (
    Recipe("rank 16, 10,000 steps of 16", rank=16, num_steps=10_000, global_batch=16),
    Recipe(
        "rank 64, three epochs of 172,939 by 8",
        rank=64,
        num_steps=3 * 172_939 // 8,
        global_batch=8,
    ),
)
SLOW_STEP_S = 120.0
ADVICE = (
    'To fit a smaller card: activation_memory = "auto" or "block", activation_offload = true, '
    'micro_batch = 1 or fewer micro_tokens, optim.name = "adamw8bit", model.placement = "auto", or '
    "smaller windows.buckets"
)


def report(config: TrainConfig, wan: WanConfig, shares: dict[Bucket, float], num_gpus: int) -> str:
    """The whole answer as text. Raises ValueError where the trainer would refuse the batch."""
    found = budget(config, wan, shares, num_gpus)
    shapes = ", ".join(f"{bucket} ({share:.0%})" for bucket, share in shares.items())
    largest = max(shares, key=layout_of(wan).num_tokens)
    lines = [
        f"memory of one GPU, {_micro(config)}, activation_memory = {config.activation_memory}",
        table(
            ("part", "GiB"),
            [(name, f"{value / GIB:.2f}") for name, value in found.resident.items()],
            align="<>",
        ),
        "",
        f"{config.num_steps:,} steps of {config.global_batch} samples on {num_gpus} GPU(s), "
        f"shapes {shapes}",
        _cards_table(found, config.num_steps),
        *_slow_cards(found, config.global_batch, num_gpus),
        "",
        *_evaluation_lines(config, wan, shares, num_gpus, found),
        "",
        *_final_lines(config, wan, shares, num_gpus, found),
        f"saved for the backward pass at {largest}",
        *(
            f"  {one.card.name}, {one.kernels.names}: {describe(one.plans[largest])}"
            for one in found.cards
        ),
        *_weights(found, wan),
        *_exchanges(config, found, largest),
        "",
        f"days at {LARGE} on {num_gpus} GPU(s)",
        _recipes_table(config, wan, num_gpus),
    ]
    if not all(one.fits for one in found.cards):
        lines += ["", ADVICE]
    return "\n".join(lines)


def _batches_per_epoch(config: TrainConfig) -> int:
    """Of the datasets, which only a run that is given in epochs needs."""
    return sum(order_of(config).batches_per_epoch) if config.num_epochs else 0


def _weights(found: Budget, wan: WanConfig) -> list[str]:
    """Of the cards on which blocks' weights are not resident, a line each."""
    moved = [one for one in found.cards if one.moved.num_blocks]
    lines = []
    for one in moved:
        forward_s = min((span.fast for span in one.forward_s.values()), default=None)
        text = describe_moved(
            one.moved, wan.num_layers, one.card.link_bytes, forward_s, one.hidden_from
        )
        lines.append(f"  {one.card.name}, {one.kernels.names}: {text}")
    return ["", "weights that are not resident", *lines] if lines else []


def _exchanges(config: TrainConfig, found: Budget, largest: Bucket) -> list[str]:
    """Of the cards that share samples, a line each."""
    if config.parallel.sequence == 1:
        return []
    lines = ["", f"{config.parallel.sequence} cards train each sample together, at {largest}"]
    for one in found.cards:
        num_bytes, rate = one.exchanged_bytes[largest], one.card.peer_bytes
        exchange_s, share = num_bytes / rate, ""
        if largest in one.compute_s:
            share = f", {exchange_s / one.compute_s[largest].slow:.1%} of its time"
        lines.append(
            f"  {one.card.name}, {one.kernels.names}: each sends {num_bytes / 1e9:.1f} GB a "
            f"micro-batch, {exchange_s:.2f} s at {rate / 1e9:.0f} GB/s (modelled){share}"
        )
    return lines


def _micro(config: TrainConfig) -> str:
    if config.micro_tokens:
        return f"micro_tokens {config.micro_tokens:,}"
    return f"micro_batch {config.micro_batch}"


def _cards_table(found: Budget, num_steps: int) -> str:
    def row(one: CardBudget) -> tuple[str, ...]:
        rates = one.why_no_time or f"{one.kernels.names} attention; {one.card.source}"
        fits = "yes" if one.fits else "no"
        return (
            one.card.name,
            f"{one.num_bytes / GIB:.1f}",
            f"{one.scratch_bytes / GIB:.1f}",
            fits,
            _span(one.step_s, 1.0),
            _span(one.step_s, num_steps / 86400),
            rates,
        )

    header = ("card", "GiB", "of them scores", "fits", "s/step", "days", "rates")
    return table(header, map(row, found.cards), align="<>><>><")


def _evaluation_lines(
    config: TrainConfig,
    wan: WanConfig,
    shares: dict[Bucket, float],
    num_gpus: int,
    found: Budget,
) -> list[str]:
    rows = []
    for one in found.cards:
        cost = evaluation(config, wan, shares, num_gpus, one)
        if cost is None:
            continue
        days = Span(*(config.num_steps * each / 86400 for each in cost.with_both_s))
        rows.append(
            (
                one.card.name,
                one.kernels.names,
                _span(cost.validation_s, 1.0),
                _span(cost.samples_s, 1.0),
                f"{cost.validation_share:.1%}",
                f"{cost.samples_share:.1%}",
                _span(days, 1.0),
            )
        )
    header = (
        "card",
        "attention",
        "validation, s",
        "samples, s",
        "of the run",
        "of the run",
        "days",
    )
    validates = f"{config.validation.every:,} steps" if config.validation.every else "never"
    samples = f"{config.samples.every:,} steps" if config.samples.every else "never"
    return [
        f"validation (every: {validates}) and samples (every: {samples}; without the VAE's "
        f"decoder, which has no rate), and the days with both",
        table(header, rows, align="<<>>>>>"),
    ]


def _final_lines(
    config: TrainConfig,
    wan: WanConfig,
    shares: dict[Bucket, float],
    num_gpus: int,
    found: Budget,
) -> list[str]:
    """tools.evaluate final, with one candidate. Models of two experts can't be evaluated yet."""
    if config.model.expert is not None:
        return []
    final, rows = final_evaluation(config), []
    for one in found.cards:
        clip_s = final.clip_s(config, wan, shares, one)
        if clip_s is not None:
            both_s = final.seconds(clip_s, num_gpus, num_variants=2)
            cells = (_span(clip_s, 1.0), _span(both_s, 1 / 3600))
            rows.append((one.card.name, one.kernels.names, *cells))
    header = ("card", "attention", "s/clip", "hours, base and LoRA")
    return [
        f"tools.evaluate final, {final.num_clips} clips of the base and as many of the LoRA, "
        f"{final.num_steps} steps, guidance {final.guidance:g} (modelled where the rates are; "
        f"without the VAE's decoder, which has no rate)",
        table(header, rows, align="<<>>"),
        "",
    ]


def _slow_cards(found: Budget, global_batch: int, num_gpus: int) -> list[str]:
    """Plainly, where a step is a matter of minutes: of each such card with its first kernels."""
    lines: dict[str, str] = {}
    for one in found.cards:
        if one.step_s is None or one.step_s.fast < SLOW_STEP_S:
            continue
        sample = _span(one.step_s, num_gpus / global_batch)
        lines.setdefault(
            one.card.name,
            f"on {one.card.name} a step of {global_batch} samples takes "
            f"{_span(one.step_s, 1 / 60)} minutes, {sample} s a sample: for a whole "
            f"training take fewer frames, images, or a smaller model there",
        )
    return ["", *lines.values()] if lines else []


def _recipes_table(config: TrainConfig, wan: WanConfig, num_gpus: int) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for recipe in RECIPES:
        lora = msgspec.structs.replace(config.lora, rank=recipe.rank, alpha=float(recipe.rank))
        changed = msgspec.structs.replace(
            config, lora=lora, global_batch=recipe.global_batch, micro_batch=1, micro_tokens=0
        )
        sequence = config.parallel.sequence
        is_divided = layout_of(wan).num_tokens(LARGE) % sequence == 0
        if recipe.global_batch % (num_gpus // sequence) or not is_divided:
            continue
        for one in budget(changed, wan, {LARGE: 1.0}, num_gpus).cards:
            cells = rows.setdefault((one.card.name, one.kernels.names), [])
            cells.append(_span(one.step_s, recipe.num_steps / 86400))
    header = ("card", "attention", *(recipe.name for recipe in RECIPES))
    return table(header, [(*key, *cells) for key, cells in rows.items()], align="<<>>")


def _span(step_s: Span | None, factor: float) -> str:
    """A time, or from when to when it may be; "-": none."""
    if step_s is None:
        return "-"
    fast, slow = f"{step_s.fast * factor:.2f}", f"{step_s.slow * factor:.2f}"
    return slow if fast == slow else f"{fast} to {slow}"


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
        kind = base_kind(config)
        transformer = Path(config.model.path) / transformer_folder(config)
        wan = read_config(transformer / "config.json")
        check_run(config, kind, wan, transformer, reads_datasets=not arguments.shape)
        if arguments.shape:
            config = in_steps(config, _batches_per_epoch(config))
            shares = {kind.layout.parse(arguments.shape): 1.0}
        else:
            for line in check_datasets(config, kind):
                print(line)
            order = order_of(config)
            config = in_steps(config, sum(order.batches_per_epoch))
            shares = buckets_of(order)
            for name, counts in zip(config.data.datasets, order.counts, strict=True):
                print(f"{name}: {describe_counts(counts, config.global_batch)}")
        print(report(config, wan, shares, arguments.gpus))
    except (ValueError, OSError) as error:
        sys.exit(f"plan: {told(error)}")


if __name__ == "__main__":
    main()
