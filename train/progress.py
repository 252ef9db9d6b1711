"""What the main process tells about a run while it trains: a progress bar, TensorBoard, and a line
of OUTPUT/metrics.jsonl for every step that is logged.

A resumed run first drops the lines past its checkpoint, which a killed run may have left, so that
the file always reads as one run.
"""

import sys
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

import msgspec
import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

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


class Report(NamedTuple):
    """A step to be logged, of which nothing has been read from the device yet."""

    step: int
    # since the report before
    num_steps: int
    num_tokens: int
    laps: Laps
    # of this step: loss, gradient norm, loss scale
    scalars: Scalars
    epoch: int
    lr: float
    memory_gib: float

    def record(self) -> StepRecord:
        """The report as numbers. On a GPU this waits until the step is done, but for no later
        one.
        """
        loss, grad_norm, loss_scale = self.scalars.read()
        seconds = lap_seconds(self.laps)
        elapsed_s = sum(seconds.values())
        return StepRecord(
            step=self.step,
            epoch=self.epoch,
            loss=loss,
            lr=self.lr,
            grad_norm=grad_norm,
            loss_scale=loss_scale,
            s_per_step=elapsed_s / self.num_steps,
            tokens_per_s=self.num_tokens / elapsed_s,
            data_wait_share=seconds["data_wait_s"] / elapsed_s,
            memory_gib=self.memory_gib,
            **{name: lap_s / self.num_steps for name, lap_s in seconds.items()},
        )


class Progress:
    """Opened by the main process alone, and closed as a context manager."""

    def __init__(self, output: Path, first_step: int, num_steps: int):
        output.mkdir(parents=True, exist_ok=True)
        self._file = _reopen(output / METRICS_FILE, first_step)
        # validation and samples begin with step 0, before the first step: a run that has no
        # checkpoint yet makes them again
        self._validation_file = _reopen(output / VALIDATION_FILE, first_step or -1)
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=num_steps, initial=first_step, desc="train", unit="step", dynamic_ncols=True
        )

    def write(self, record: StepRecord) -> None:
        """Log one record everywhere."""
        append_record(self._file, record)
        for name, value in msgspec.structs.asdict(record).items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record.step)
        self._bar.update(record.step - self._bar.n)
        self._bar.set_postfix_str(
            f"loss {record.loss:.4f}, {record.tokens_per_s:,.0f} tok/s, "
            f"data wait {record.data_wait_share:.1%}"
        )

    def write_validation(self, record: ValidationRecord) -> None:
        """Log one validation everywhere."""
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
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(f"validation/{name}", value, record.step)
        better = ", better" if record.is_improvement else ""
        error = "?" if record.standard_error is None else f"{record.standard_error:.4f}"
        self.say(
            f"step {record.step}: validation loss {record.relative_loss:.4f} of the base's, "
            f"{record.difference:+.4f} (error {error}) to step {record.reference_step}{better}; "
            f"{record.num_windows} windows, {record.elapsed_s:.0f} s"
        )

    def show_samples(self, event: SampleEvent, folder: Path) -> None:
        """The sheet and the clips in TensorBoard, and a warning for adapters without effect."""
        with Image.open(folder / SHEET_FILE) as sheet:
            self._writer.add_image(
                "samples/sheet", np.asarray(sheet), event.step, dataformats="HWC"
            )
        self.say(f"step {event.step}: {len(event.clips)} clips in {folder}")
        same = [clip.file for clip in event.clips if clip.mean_difference_levels == 0.0]
        if same and event.step > 0:
            self.say(
                f"step {event.step}: {', '.join(same)} equal the base model's clips: the adapters "
                f"have no effect on them (update norms {event.update_norms})"
            )

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._writer.close()
        self._file.close()
        self._validation_file.close()


def _reopen(path: Path, last_step: int) -> IO[bytes]:
    """A file of records, without those past `last_step`, to be appended to."""
    if path.exists():
        drop_records_after(path, last_step)
    return path.open("ab")
