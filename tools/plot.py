"""Plot a run: `python -m tools.plot RUN` writes RUN/metrics.png with loss, learning rate and
throughput.

It draws what RUN/metrics.jsonl holds and nothing else: a value that was not measured leaves a
gap. The loss of single steps is noisy, because each step draws other timesteps; the line over it
is the mean of the last twentieth of the run.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from loader.files import told
from train.records import METRICS_FILE, StepRecord, read_records


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Name of a measurement -> float64 [num_records], NaN where a record does not have it; names
    that no record has are left out. Raises ValueError naming the line.
    """
    records = read_records(path, StepRecord)
    if not records:
        raise ValueError(f"{path}: no step has been logged yet")
    columns = {
        name: np.array([getattr(record, name) for record in records], np.float64)
        for name in StepRecord.__struct_fields__
    }
    return {name: column for name, column in columns.items() if not np.isnan(column).all()}


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and up to `width - 1` before it; NaN values do not count."""
    finite = np.isfinite(values)
    sums, counts = np.cumsum(np.where(finite, values, 0.0)), np.cumsum(finite)
    sums[width:], counts[width:] = sums[width:] - sums[:-width], counts[width:] - counts[:-width]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def plot(metrics: dict[str, np.ndarray], title: str, path: Path) -> None:
    """Three panels above each other, one x axis."""
    step = metrics["step"]
    width = max(len(step) // 20, 5)
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, sharex=True, figsize=(9, 8), layout="constrained", height_ratios=(2, 1, 1)
    )
    _line(top, step, metrics, "loss", "loss", color="0.75", label="each record")
    if "loss" in metrics:
        top.plot(
            step,
            running_mean(metrics["loss"], width),
            color="tab:blue",
            label=f"mean of {width} records",
        )
        top.legend(loc="upper right")
    top.set_title(title)
    _line(middle, step, metrics, "lr", "learning rate", color="tab:orange")
    middle.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _line(bottom, step, metrics, "tokens_per_s", "tokens/s", color="tab:green")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("optimizer step")
    if "data_wait_share" in metrics:
        waits = bottom.twinx()
        waits.plot(step, 100 * metrics["data_wait_share"], color="tab:red", linewidth=0.8)
        waits.set_ylim(0, 100)
        waits.set_ylabel("waiting for data, %", color="tab:red")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(
    axes: Axes,
    step: np.ndarray,
    metrics: dict[str, np.ndarray],
    name: str,
    title: str,
    color: str,
    label: str | None = None,
) -> None:
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    if name in metrics:
        axes.plot(step, metrics[name], color=color, label=label)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Plot loss, learning rate and throughput of a run."
    )
    parser.add_argument("run", type=Path, help="the run's output folder, which holds metrics.jsonl")
    run = parser.parse_args().run
    try:
        plot(read_metrics(run / METRICS_FILE), run.resolve().name, run / "metrics.png")
    except (ValueError, OSError) as error:
        sys.exit(f"plot: {told(error)}")
    print(run / "metrics.png")


if __name__ == "__main__":
    main()
