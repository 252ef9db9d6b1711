"""CSV files for spreadsheets: exclusions.csv, which builds and training obey, and downloads.

How a cell is kept from being computed, and how its text is restored, is loader.exclusions' rule.
"""

import csv
import io
import threading
from collections.abc import Callable, Iterable, Sequence

from loader.exclusions import (
    Exclusion,
    neutralised,
    read_exclusions,
    restored,
    write_exclusions,
)
from tools.dashboard.review import Decision
from tools.dashboard.sources import Dataset


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A whole CSV file: BOM, header, rows with CRLF, as spreadsheets write it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([neutralised(str(value)) for value in row])
    return text.getvalue().encode("utf-8-sig")


def read_csv(data: bytes) -> list[dict[str, str]]:
    """The rows of such a file by column, every text as it was. Raises ValueError."""
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), restkey="")
    rows = []
    try:
        for row in reader:
            if row.pop("", None):
                raise ValueError(f"line {reader.line_num}: has more cells than the first line")
            rows.append({name: restored(value or "") for name, value in row.items()})
    except csv.Error as error:
        raise ValueError(f"not a CSV file: {error}") from error
    return rows


def exclusion_rows(newest: Sequence[Decision], in_file: Sequence[Exclusion]) -> list[Exclusion]:
    """The rows of exclusions.csv by label path: the newest decision about each label, and what
    somebody wrote into the file by hand about others. A decision that was taken back has no row.
    """
    rows = {row.label: row for row in in_file}
    for each in newest:
        rows[each.label] = Exclusion(each.label, each.verdict, each.type, each.person, each.time)
        if each.verdict == "undecided":
            del rows[each.label]
    return [rows[label] for label in sorted(rows)]


_WRITING = threading.Lock()


def update_exclusions(dataset: Dataset, newest: Callable[[], Sequence[Decision]]) -> int:
    """Replace the dataset's exclusions.csv atomically; returns its number of rows. Raises OSError,
    and DatasetError for a file by hand that can't be understood, which then stays as it is.

    Two people may decide at once: what is written is what `newest` gives then, so that whoever
    writes last has both decisions.
    """
    with _WRITING:
        rows = exclusion_rows(newest(), exclusions_of(dataset))
        dataset.exclusions.parent.mkdir(parents=True, exist_ok=True)
        write_exclusions(dataset.exclusions, rows)
    return len(rows)


def exclusions_of(dataset: Dataset) -> list[Exclusion]:
    """What stands in the file now; empty without one. Raises DatasetError."""
    return read_exclusions(dataset.exclusions) if dataset.exclusions.exists() else []
