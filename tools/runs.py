"""Which runs there are and how they do: python -m tools.runs DIR [--json]

DIR is a folder of runs, or one run. A line for each: state, step, the best validation loss relative
to the base's with its step, seconds a step, time left. Read from status.json, metrics.jsonl and
validation.jsonl; nothing is written. A run whose status says "running" while no process holds its
folder was killed: "killed". (The lock is seen on the machine that trains, or where its folder is
mounted with locks.)
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import msgspec

from loader.files import has_writer
from tools.table import table
from train.progress import duration
from train.records import (
    METRICS_FILE,
    STATUS_FILE,
    VALIDATION_FILE,
    RecordError,
    StepRecord,
    ValidationRecord,
    read_records,
    read_status,
)

NUM_RECENT = 20
HEADER = ("run", "state", "step", "best", "at step", "s/step", "left", "reason")


class RunLine(msgspec.Struct, frozen=True, kw_only=True):
    """One run; None was not measured."""

    name: str
    # as in status.json, or "killed", or "unreadable"
    state: str
    reason: str = ""
    step: int = 0
    num_steps: int = 0
    # the least relative validation loss: 0.97 is 3% better than the base
    best: float | None = None
    best_step: int | None = None
    # median of the last records
    s_per_step: float | None = None
    # at that rate, without validation and samples
    left_s: float | None = None
    # since status.json was written
    silent_s: float | None = None


def find_runs(folder: Path) -> list[Path]:
    """`folder` itself if it is a run, else the runs below it, by name."""
    if (folder / STATUS_FILE).exists():
        return [folder]
    return sorted(path.parent for path in folder.rglob(STATUS_FILE))


def run_lines(folder: Path) -> Iterator[RunLine]:
    """Of every run; one whose files can't be read has the reason."""
    for path in find_runs(folder):
        name = path.name if path == folder else str(path.relative_to(folder))
        try:
            yield _line(name, path)
        except (RecordError, OSError) as error:
            yield RunLine(name=name, state="unreadable", reason=str(error))


def _line(name: str, path: Path) -> RunLine:
    status = read_status(path)
    if status is None:  # deleted since it was found
        return RunLine(name=name, state="unreadable", reason=f"{path / STATUS_FILE} is gone")
    metrics, validation = path / METRICS_FILE, path / VALIDATION_FILE
    records = read_records(metrics, StepRecord) if metrics.exists() else []
    validated = read_records(validation, ValidationRecord) if validation.exists() else []
    best = min(validated, key=lambda record: record.relative_loss, default=None)
    times = [each.s_per_step for each in records[-NUM_RECENT:] if each.s_per_step is not None]
    s_per_step = median(times) if times else None
    step = max(status.step, records[-1].step if records else 0)
    state, reason, left_s = str(status.state), status.reason, None
    if status.state == "running" and not has_writer(path):
        state = "killed"
        reason = "no process holds the folder; the same command goes on from the newest checkpoint"
    elif status.state == "running" and s_per_step is not None:
        left_s = max(0, status.num_steps - step) * s_per_step
    return RunLine(
        name=name,
        state=state,
        reason=reason,
        step=step,
        num_steps=status.num_steps,
        best=best.relative_loss if best else None,
        best_step=best.step if best else None,
        s_per_step=s_per_step,
        left_s=left_s,
        silent_s=max(0.0, time.time() - status.time),
    )


def _cells(line: RunLine) -> tuple[str, ...]:
    return (
        line.name,
        line.state,
        f"{line.step:,} of {line.num_steps:,}" if line.num_steps else f"{line.step:,}",
        "-" if line.best is None else f"{line.best:.4f}",
        "-" if line.best_step is None else f"{line.best_step:,}",
        "-" if line.s_per_step is None else f"{line.s_per_step:.3g}",
        "-" if line.left_s is None else duration(line.left_s),
        line.reason,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="a JSON array instead of a table")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        sys.exit(f"runs: {arguments.folder}: no such folder")
    lines = list(run_lines(arguments.folder))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(lines)).decode())
    elif not lines:
        sys.exit(f"runs: no run below {arguments.folder}: none of its folders has {STATUS_FILE}")
    else:
        print(table(HEADER, map(_cells, lines), align="<<>>>>><"))


if __name__ == "__main__":
    main()
