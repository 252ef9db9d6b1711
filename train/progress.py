"""What the main process tells about a run while it trains: lines for people, TensorBoard, and a
line of OUTPUT/metrics.jsonl for every step that is logged.

On a terminal the lines for people are a progress bar; in a file they are plain lines, one every
ten seconds at most. A resumed run first drops the lines of metrics.jsonl past its checkpoint,
which a killed run may have left, so that the file always reads as one run.
"""

import io
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

import msgspec
import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from train.cards import NOT_MEASURED, CardState
from train.clip_gif import clip_gif
from train.records import (
    METRICS_FILE,
    SHEET_FILE,
    VALIDATION_FILE,
    SampleEvent,
    StepRecord,
    ValidationRecord,
    append_record,
    drop_records_after,
)
from train.stopwatch import Laps, Scalars, lap_seconds
from train.tally import Faults, sums_of
from train.tracking import Tracker

LINE_EVERY_S = 10.0
TENSORBOARD_FOLDER = "tensorboard"
# name of a measurement -> its group in TensorBoard; the others are times
_GROUPS = {
    "loss": "loss",
    "lr": "optimizer",
    "grad": "optimizer",
    "num": "optimizer",
    "epoch": "data",
    "data": "data",
    "tokens": "data",
    "gpu": "gpu",
    "memory": "gpu",
}


class Report(NamedTuple):
    """A step to be logged, of which nothing has been read from the device yet."""

    step: int
    # since the report before
    num_steps: int
    num_tokens: int
    laps: Laps
    # of train.tally.Tally
    scalars: Scalars
    epoch: int
    lr: float
    memory_gib: float
    card: CardState = NOT_MEASURED

    def read(self) -> tuple[StepRecord, Faults]:
        """The report as numbers. On a GPU this waits until the step is done, but for no later
        one.
        """
        sums = sums_of(self.scalars.read())
        seconds = lap_seconds(self.laps)
        elapsed_s = sum(seconds.values())
        record = StepRecord(
            step=self.step,
            epoch=self.epoch,
            loss=sums.loss,
            lr=self.lr,
            grad_norm=sums.grad_norm,
            loss_scale=sums.loss_scale,
            num_overflows=sums.faults.num_overflows,
            num_skipped=sums.faults.num_skipped,
            s_per_step=elapsed_s / self.num_steps,
            tokens_per_s=self.num_tokens / elapsed_s,
            data_wait_share=seconds["data_wait_s"] / elapsed_s,
            memory_gib=self.memory_gib,
            **{f"loss_{task}": loss for task, loss in sums.task_losses.items()},
            **{f"gpu_{name}": value for name, value in self.card._asdict().items()},
            **{name: lap_s / self.num_steps for name, lap_s in seconds.items()},
        )
        return record, sums.faults


def _interval(record: ValidationRecord) -> str:
    """Where an expert was measured; empty for a whole model."""
    if record.interval is None:
        return ""
    low, high = record.interval
    return f"; at the expert's own noise levels, sigma {low:g} to {high:g}"


def status_line(record: StepRecord, num_steps: int, validation: float | None = None) -> str:
    """A record for people. `validation` is the newest relative validation loss."""
    parts = [f"step {record.step}/{num_steps}"]
    parts.append("loss not finite" if record.loss is None else f"loss {record.loss:.4f}")
    if validation is not None:
        parts.append(f"validation {validation:.4f} of the base")
    if record.s_per_step is not None:
        # a validation of minutes, once in 500 steps, says nothing of the steps to come
        step_s = record.s_per_step - (record.other_s or 0.0)
        parts.append(f"{step_s:.3g} s/step")
        parts.append(f"data wait {record.data_wait_share or 0.0:.1%}")
        parts.append(f"{duration((num_steps - record.step) * step_s)} left")
    if record.num_skipped:
        parts.append(f"{record.num_skipped} steps skipped")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """ "2d 3h", "3h 12m", "4m 05s" """
    minutes, whole_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {whole_s:02d}s"


def tensorboard_tag(name: str) -> str:
    """ "loss_t2v" -> "loss/t2v": tags before the slash are the groups of TensorBoard's page."""
    first, _, rest = name.partition("_")
    group = _GROUPS.get(first, "time")
    return f"{group}/{rest or 'all'}" if group == first == "loss" else f"{group}/{name}"


class Progress:
    """Opened by the main process alone, and closed as a context manager."""

    def __init__(
        self,
        output: Path,
        first_step: int,
        num_steps: int,
        *,
        is_evaluated: bool,
        tracker: Tracker | None = None,
    ):
        """is_evaluated: whether the first step's validation is not to be made again. tracker: gets
        the numbers too, and is closed with this.
        """
        output.mkdir(parents=True, exist_ok=True)
        self._num_steps, self._line_s = num_steps, float("-inf")
        self._validation: float | None = None
        self._stack = ExitStack()
        self._file = self._stack.enter_context(_reopen(output / METRICS_FILE, first_step))
        last_validation = first_step if is_evaluated else first_step - 1
        self._validation_file = self._stack.enter_context(
            _reopen(output / VALIDATION_FILE, last_validation)
        )
        # entered first: closing the writer writes too
        self._stack.enter_context(_tensorboard_errors(output / TENSORBOARD_FOLDER))
        folder = str(output / TENSORBOARD_FOLDER)
        self._writer = SummaryWriter(folder, purge_step=first_step + 1)
        self._stack.callback(self._writer.close)
        self._tracker = tracker
        if tracker is not None:
            self._stack.callback(tracker.close)
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = self._stack.enter_context(
                tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True)
            )
            # warnings go above the bar, not into it
            self._stack.enter_context(logging_redirect_tqdm())

    def write(self, record: StepRecord) -> None:
        """Log one record everywhere. Raises OSError."""
        append_record(self._file, record)
        values = {
            tensorboard_tag(name): value
            for name, value in msgspec.structs.asdict(record).items()
            if name != "step"
        }
        self._add_scalars(values, record.step)
        line = status_line(record, self._num_steps, self._validation)
        if self._bar is not None:
            self._bar.update(record.step - self._bar.n)
            self._bar.set_postfix_str(line.partition(", ")[2])
            return
        now_s = time.monotonic()
        if now_s - self._line_s >= LINE_EVERY_S or record.step == self._num_steps:
            self.say(line)
            self._line_s = now_s

    def write_validation(self, record: ValidationRecord) -> None:
        """Log one validation everywhere. Raises OSError."""
        self._validation = record.relative_loss
        append_record(self._validation_file, record)
        scalars = {
            "relative_loss": record.relative_loss,
            "loss": record.loss,
            "gap": record.gap,
            "difference": record.difference,
            **{f"task/{name}": value for name, value in record.by_task.items()},
            **{f"level/{number}": value for number, value in enumerate(record.by_level)},
            **{f"category/{name}": value for name, value in record.by_category.items()},
        }
        values = {f"validation/{name}": value for name, value in scalars.items()}
        self._add_scalars(values, record.step)
        better = ", better" if record.is_improvement else ""
        error = "?" if record.standard_error is None else f"{record.standard_error:.4f}"
        self.say(
            f"step {record.step}: validation loss {record.relative_loss:.4f} of the base's, "
            f"{record.difference:+.4f} (error {error}) to step {record.reference_step}{better}; "
            f"{record.num_windows} windows, {record.elapsed_s:.0f} s{_interval(record)}"
        )

    def show_samples(self, event: SampleEvent, folder: Path) -> None:
        """The sheet and the clips in TensorBoard, and a warning for adapters without effect."""
        with Image.open(folder / SHEET_FILE) as sheet:
            self._writer.add_image(
                "samples/sheet", np.asarray(sheet), event.step, dataformats="HWC"
            )
        for clip in event.clips:
            self._add_gif(f"samples/{Path(clip.file).stem}", clip_gif(folder / clip.file), event)
        differences = {
            f"samples/difference/{Path(clip.file).stem}": clip.mean_difference_levels
            for clip in event.clips
        }
        norms = {f"samples/update_norm/{name}": norm for name, norm in event.update_norms.items()}
        self._add_scalars(differences | norms, event.step)
        if self._tracker is not None:
            self._tracker.log_sheet(folder / SHEET_FILE, event.step)
        shows = f" ({event.shows})" if event.shows else ""
        self.say(f"step {event.step}: {len(event.clips)} clips in {folder}{shows}")
        same = [clip.file for clip in event.clips if clip.mean_difference_levels == 0.0]
        if same and event.step > 0:
            self.say(
                f"step {event.step}: {', '.join(same)} equal the base model's clips: the adapters "
                f"have no effect on them (update norms {event.update_norms})"
            )

    def _add_scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Those that were measured, to TensorBoard and wandb."""
        measured = {name: value for name, value in values.items() if value is not None}
        for name, value in measured.items():
            self._writer.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(measured, step)

    def _add_gif(self, tag: str, gif: bytes, event: SampleEvent) -> None:
        # SummaryWriter.add_video would need moviepy to make the same
        with Image.open(io.BytesIO(gif)) as first:
            image = Summary.Image(
                encoded_image_string=gif, width=first.width, height=first.height, colorspace=3
            )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(summary, event.step)

    def say(self, text: str) -> None:
        """One line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


@contextmanager
def _tensorboard_errors(folder: Path) -> Iterator[None]:
    """Name `folder` in errors of TensorBoard's writer, such as a full disk. It writes in a thread
    of its own, raises there, and raises the same again at the next call.
    """
    before = threading.excepthook

    def hook(thrown: threading.ExceptHookArgs) -> None:
        if not type(thrown.thread).__module__.startswith("tensorboard."):
            before(thrown)
        elif isinstance(thrown.exc_value, OSError) and thrown.exc_value.filename is None:
            thrown.exc_value.filename = str(folder)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _reopen(path: Path, last_step: int) -> IO[bytes]:
    """A file of records, without those past `last_step`, to be appended to."""
    if path.exists():
        drop_records_after(path, last_step)
    return path.open("ab")
