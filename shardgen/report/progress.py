"""How far a build is: a bar for whoever watches, plain lines in a log, and records in build.jsonl
for a dashboard.

build.jsonl is append-only, a JSON object per line. A build that was killed may leave half a line,
which its reader passes over.
"""

import sys
import time
from pathlib import Path
from types import TracebackType

import msgspec
from tqdm import tqdm

BUILD_FILE = "build.jsonl"
RECORD_EVERY_S, LINE_EVERY_S = 5.0, 60.0


class BuildRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a build stands: the last record is the newest."""

    stage: str
    done: int  # of this stage, in this run of the build
    left: int | None  # None where the total is not known before the end (labels)
    rate_per_s: float | None = msgspec.field(name="rate")  # None before anything is done
    time_s: float = msgspec.field(name="time")  # Unix time


_decode = msgspec.json.Decoder(BuildRecord).decode


def read_progress(dataset: Path) -> list[BuildRecord]:
    """All whole records of `dataset`'s build.jsonl, the oldest first; [] if there is none."""
    path = dataset / BUILD_FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            records.append(_decode(line))
        except msgspec.DecodeError:
            continue  # half a line, of a build that was killed or is writing it now
    return records


def append_record(dataset: Path, record: BuildRecord) -> None:
    """Append to `dataset`'s build.jsonl. Raises OSError."""
    with (dataset / BUILD_FILE).open("a+b") as file:
        # Half a line of a killed build must not swallow this one.
        begins_line = file.tell() == 0
        if not begins_line:
            file.seek(-1, 2)
            begins_line = file.read(1) == b"\n"
        file.write((b"" if begins_line else b"\n") + msgspec.json.encode(record) + b"\n")


class Progress:
    """The progress of one stage, as a context manager; `update` hears of what is done."""

    def __init__(self, dataset: Path, stage: str, place: str, total: int | None, unit: str) -> None:
        self._dataset, self._stage, self._total, self._unit = dataset, stage, total, unit
        self._place = place  # "3/7"
        self._done = 0
        self._begin_s = self._recorded_s = self._told_s = time.monotonic()
        # A redirected log gets lines instead: a bar would make one endless line of it.
        self._bar = tqdm(
            desc=f"{place} {stage:<6}",
            total=total,
            unit=f" {unit}s",
            dynamic_ncols=True,
            disable=None,
        )

    def __enter__(self) -> "Progress":
        self._record()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if error is None:
            self._record()

    def update(self, num: int) -> None:
        """`num` more are done."""
        self._done += num
        self._bar.update(num)
        now_s = time.monotonic()
        if now_s - self._recorded_s >= RECORD_EVERY_S:
            self._recorded_s = now_s
            self._record()
        if self._bar.disable and now_s - self._told_s >= LINE_EVERY_S:
            self._told_s = now_s
            of_total = "" if self._total is None else f" of {self._total}"
            done = f"{self._done}{of_total} {self._unit}s, {self._rate() or 0.0:.2f} a second"
            print(f"{self._place} {self._stage}: {done}", file=sys.stderr, flush=True)

    def _rate(self) -> float | None:
        duration_s = time.monotonic() - self._begin_s
        return self._done / duration_s if self._done and duration_s > 0 else None

    def _record(self) -> None:
        rate = self._rate()
        append_record(
            self._dataset,
            BuildRecord(
                stage=self._stage,
                done=self._done,
                left=None if self._total is None else max(self._total - self._done, 0),
                rate_per_s=None if rate is None else round(rate, 4),
                time_s=round(time.time(), 3),
            ),
        )
