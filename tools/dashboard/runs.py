"""What the files of a run say: state, curves, configuration."""

import statistics
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loader.files import LOCK_FILE, has_writer
from tools.dashboard.files import FileProblem
from tools.dashboard.records import RunStatus, ValidationLine, flat
from tools.dashboard.sources import STATUS_FILE
from tools.dashboard.state import State
from train.records import METRICS_FILE

VALIDATION_FILE, CONFIG_FILE = "validation.jsonl", "config.toml"
# a chart has fewer pixels than this; of longer runs every nth record is drawn
MAX_POINTS = 4000
RECENT_RECORDS = 20
Record = dict[str, Any]
Column = list[float | None]


class RunSummary(NamedTuple):
    """A run in one line; None is not measured."""

    name: str
    # as in status.json, "" without one; "killed" where it says running and nobody holds the folder
    state: str
    reason: str
    step: int | None
    num_steps: int | None
    loss: float | None
    s_per_step: float | None
    left_s: float | None
    best: ValidationLine | None
    newest_validation: ValidationLine | None
    problem: str


class Curves(NamedTuple):
    """The numbers of one file by column, None where a record lacks one; every `stride`th record."""

    columns: dict[str, Column]
    stride: int
    num_records: int
    num_damaged: int


def metrics_of(state: State, run: Path) -> tuple[list[Record], int]:
    """(records of metrics.jsonl so far, lines that could not be read)."""
    lines = state.line_files.follow(run / METRICS_FILE, Record)
    return lines.read(), lines.num_damaged


def validations_of(state: State, run: Path) -> list[ValidationLine]:
    return state.line_files.follow(run / VALIDATION_FILE, ValidationLine).read()


def config_of(run: Path) -> dict[str, Any]:
    """The echoed configuration as dotted keys; empty if it can't be read."""
    try:
        return flat(tomllib.loads((run / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}


def summarise(state: State, name: str, run: Path) -> RunSummary:
    """From status.json, metrics.jsonl, validation.jsonl and config.toml."""
    status = state.json_files.read(run / STATUS_FILE, RunStatus)
    problem = f"{status.name}: {status.detail}" if isinstance(status, FileProblem) else ""
    known = status if isinstance(status, RunStatus) else RunStatus()
    records, _ = metrics_of(state, run)
    last = records[-1] if records else {}
    step = _whole(last.get("step"))
    num_steps = _whole(known.num_steps) or _whole(config_of(run).get("num_steps"))
    times = [number(each.get("s_per_step")) for each in records[-RECENT_RECORDS:]]
    measured = [value for value in times if value is not None]
    s_per_step = statistics.median(measured) if measured else None
    run_state = "killed" if known.state == "running" and _is_left(run) else known.state
    running = run_state in ("", "running")
    left_s = None
    if running and s_per_step is not None and step is not None and num_steps is not None:
        left_s = max(0, num_steps - step) * s_per_step
    lines = validations_of(state, run)
    judged = [line for line in lines if line.relative is not None]
    return RunSummary(
        name=name,
        state=run_state,
        reason=known.reason,
        step=step if step is not None else known.step,
        num_steps=num_steps,
        loss=number(last.get("loss")),
        s_per_step=s_per_step,
        left_s=left_s,
        best=min(judged, key=lambda line: line.relative or 0.0, default=None),
        newest_validation=lines[-1] if lines else None,
        problem=problem,
    )


def _is_left(run: Path) -> bool:
    """Whether a trainer has had this folder and none has it now, as far as this machine sees."""
    try:
        return (run / LOCK_FILE).exists() and not has_writer(run)
    except OSError:
        # somebody else's folder: nothing can be told
        return False


def number(value: Any) -> float | None:
    """A finite number, else None: JSON has no other way to say that something was not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # a whole number in JSON may be larger than any float
    return float(value) if abs(value) <= sys.float_info.max else None


def _whole(value: Any) -> int | None:
    """A number of steps, as far as one can be that."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value if is_whole and abs(value) < 2**63 else None


def metric_curves(state: State, run: Path) -> Curves:
    """Every numeric column of metrics.jsonl."""
    records, num_damaged = metrics_of(state, run)
    shown, stride = _thinned(records)
    names = {name: None for record in shown[-RECENT_RECORDS:] + shown[:1] for name in record}
    columns = {name: [number(record.get(name)) for record in shown] for name in names}
    measured = {name: each for name, each in columns.items() if each.count(None) < len(each)}
    return Curves(measured, stride, len(records), num_damaged)


def validation_curves(state: State, run: Path) -> Curves:
    """The columns of validation.jsonl; those of sigmas, tasks and categories are "sigma 0.125" and
    so on.
    """
    shown, stride = _thinned(validations_of(state, run))
    rows = [_validation_row(line) for line in shown]
    names = {name: None for row in rows for name in row}
    columns = {name: [number(row.get(name)) for row in rows] for name in names}
    return Curves(columns, stride, len(rows), 0)


def _validation_row(line: ValidationLine) -> Record:
    row: Record = {"step": line.step, "relative": line.relative}
    row |= {"train_relative": line.train_relative, "psnr_db": line.psnr_db}
    for kind, values in (
        ("sigma", line.per_sigma),
        ("task", line.per_task),
        ("category", line.per_category),
    ):
        row |= {f"{kind} {name}": value for name, value in values.items()}
    return {name: value for name, value in row.items() if value is not None}


def _thinned(records: Sequence[Any]) -> tuple[list[Any], int]:
    """At most MAX_POINTS records, the last one always among them."""
    stride = -(-len(records) // MAX_POINTS) or 1
    return list(records[::-1][::stride][::-1]), stride


def running_mean(values: Column, width: int) -> Column:
    """Mean of each value and up to `width` - 1 before it; what was not measured does not count."""
    means: Column = []
    total, count = 0.0, 0
    for place, value in enumerate(values):
        total, count = total + (value or 0.0), count + (value is not None)
        if place >= width:
            total -= values[place - width] or 0.0
            count -= values[place - width] is not None
        means.append(total / count if count else None)
    return means


def config_differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key, the value of each configuration) where they differ; "" where one has none."""
    keys = sorted({key for config in configs for key in config})
    rows = [(key, [str(config.get(key, "")) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
