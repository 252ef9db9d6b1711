"""How far the shuffle parts neighbours: `python -m bench.shuffle [--shards 400] [--plot PNG]`.

Neighbours in a shard are often of one programme. For every two of them this takes their distance
in an epoch, in global batches, for windows of several sizes (loader/shuffle.py shuffles within
windows of `window_shards`) and for a full shuffle of all samples, which a window of all shards
comes to. Nothing is timed: the figures are exact for the seed.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from loader.shuffle import Ints, epoch_order

WINDOWS = (1, 2, 8, 32, 128)


class Spread(NamedTuple):
    """`distances`: of all pairs of neighbours, in batches, ascending."""

    name: str
    distances: Ints
    shards_per_batch: float


def spread(
    name: str, num_shards: int, shard_samples: int, global_batch: int, window_shards: int
) -> Spread:
    sizes = np.full(num_shards, shard_samples)
    order = epoch_order(
        sizes,
        np.zeros(num_shards, np.int64),
        key=1,
        global_batch=global_batch,
        window_shards=window_shards,
    )
    batch = np.full((num_shards, shard_samples), -1)  # the tail that is left out stays -1
    batch[order.shard_NG, order.position_NG] = np.arange(len(order.shard_NG))[:, None]
    distances = np.abs(np.diff(batch, axis=1))[(batch[:, 1:] >= 0) & (batch[:, :-1] >= 0)]
    return Spread(
        name, np.sort(distances), float(np.mean([len(set(shards)) for shards in order.shard_NG]))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--shard-samples", type=int, default=64)
    parser.add_argument("--global-batch", type=int, default=24)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    sizes = arguments.shards, arguments.shard_samples, arguments.global_batch
    spreads = [
        spread(f"{window} shard{'s' * (window > 1)}", *sizes, window)
        for window in WINDOWS
        if window < arguments.shards
    ]
    spreads.append(spread("all: a full shuffle", *sizes, arguments.shards))
    print(
        "| window | neighbours in one batch | within 10 batches | median distance, batches | "
        "99% nearer than | shards in a batch |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, distances, shards in spreads:
        print(
            f"| {name} | {np.mean(distances == 0):.2%} | {np.mean(distances <= 10):.1%} | "
            f"{np.median(distances):.0f} | {np.quantile(distances, 0.99):.0f} | {shards:.1f} |"
        )
    if arguments.plot:
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for name, distances, _ in spreads:
            axes.step(
                distances + 1,
                np.arange(1, len(distances) + 1) / len(distances),
                label=name,
                where="post",
                linestyle="--" if name.startswith("all") else "-",
            )
        axes.set(
            xscale="log",
            xlabel="distance of neighbours in a shard, global batches + 1",
            ylabel="share of pairs",
            title=f"{arguments.shards} shards of {arguments.shard_samples} samples, global batch "
            f"{arguments.global_batch}",
        )
        axes.grid(alpha=0.3)
        axes.legend(title="window")
        figure.savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
