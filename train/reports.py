"""Steps on their way to the log, read a step late so that the device has the next one to work on;
and what a step that is not finite leads to.

Every process reads the same numbers, so all of them come to the same end at the same step.
"""

import logging
from collections import deque

from loader.feed import Feed
from train.progress import Progress, Report
from train.records import StepRecord
from train.run import Run
from train.status import Status
from train.tally import Faults
from train.watch import Watch

log = logging.getLogger(__name__)


class Reports:
    """`progress`: of the main process, None on the others."""

    def __init__(
        self, run: Run, feed: Feed, progress: Progress | None, status: Status, watch: Watch
    ):
        self._run, self._feed, self._progress = run, feed, progress
        self._status, self._watch = status, watch
        self._waiting: deque[Report] = deque()
        self._num_skipped = run.tally.faults().num_skipped
        # what was not finite first; looked for once
        self._found = ""

    def append(self, report: Report) -> None:
        """Read the report before this one. Raises ValueError where the run is lost."""
        self.read_all()
        self._waiting.append(report)

    def read_all(self) -> None:
        """Also of the last step: before anything of it is saved. Raises ValueError where the run
        is lost.
        """
        while self._waiting:
            record, faults = self._waiting.popleft().read()
            if self._progress:
                self._progress.write(record)
            self._status.running(record.step)
            if faults.num_skipped > self._num_skipped:
                self._num_skipped = faults.num_skipped
                self._tell(record, faults)

    def _tell(self, record: StepRecord, faults: Faults) -> None:
        rank, dtype = self._run.world.rank, self._run.config.model.dtype
        if not self._found:
            with self._watch.busy("looks for what was not finite"):
                self._found = self._run.trace(self._feed, faults.newest)
            log.warning(
                "step %d was skipped, its loss or gradient is not finite (model.dtype %s). Rank "
                "%d: %s",
                faults.newest + 1,
                dtype,
                rank,
                self._found,
            )
        if faults.too_many:
            # the learning rate is to blame only if some update has been made
            num_updates = record.step - faults.num_skipped - faults.num_overflows
            advice = self._run.advice()
            if num_updates <= 0:
                advice = (
                    "No update has been made yet, so it is not the learning rate: check the base "
                    "model and the dataset, or use another model.dtype"
                )
            raise ValueError(
                f"step {record.step}: {faults.num_skipped} steps were skipped, the last "
                f"{faults.in_a_row} in a row, because a loss or gradient was not finite "
                f"(model.dtype {dtype}; loss scale {record.loss_scale}). {self._found}. {advice}"
            )
