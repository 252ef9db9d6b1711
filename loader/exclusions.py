"""exclusions.csv: labels that people looked at and decided about; one file per dataset, read by
both halves and written by the dashboard or by hand. Torch-free.

    label,decision,type,person,time
    video/batch_0001/1000123.json,exclude,wrong caption,kim,2026-11-26T10:00:00

`label` is the label file's path relative to the label root. `decision` is "exclude" or "accept";
the last row about a label counts. The rest is for people.

The file is made for spreadsheets, and captions and paths are other people's text: it begins with
a BOM, because without one they read Hangul in another encoding, and a cell that they would
compute gets an apostrophe in front. Reading takes exactly that apostrophe off again.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from loader.files import write_atomic
from loader.manifest import DatasetError

EXCLUSIONS_FILE = "exclusions.csv"
EXCLUDE, ACCEPT = "exclude", "accept"
# what begins a formula, full-width forms included, which East Asian spreadsheets take too; and
# the apostrophe itself, so that nothing is taken off that was not put on
_FORMULA_STARTS = tuple("=+-@\t\r\n'＝＋－＠")


class Exclusion(NamedTuple):
    """One row; all columns are text."""

    label: str
    decision: str
    type: str = ""
    person: str = ""
    time: str = ""


def neutralised(text: str) -> str:
    """The text as a cell that no spreadsheet computes."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def restored(cell: str) -> str:
    """The text that `neutralised` was given; a cell that was written by hand stays as it is."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA_STARTS) else cell


def encode_exclusions(rows: Iterable[Exclusion]) -> bytes:
    """The file's bytes: BOM, header, rows with CRLF, as spreadsheets write it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Exclusion._fields)
    for row in rows:
        writer.writerow(map(neutralised, row))
    return text.getvalue().encode("utf-8-sig")


def decode_exclusions(data: bytes, name: str) -> list[Exclusion]:
    """The rows of a file, with or without BOM; `name` is for messages. Columns beyond ours are
    ignored, empty lines too. Raises DatasetError for what can't be understood.
    """
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        header = reader.fieldnames or []
        if not {"label", "decision"} <= set(header):
            raise DatasetError(
                f"{name}: the first line names the columns {list(header)}; it needs label and "
                f"decision"
            )
        rows = []
        for line in reader:
            cells = [restored(line.get(column) or "") for column in Exclusion._fields]
            row = Exclusion(*cells)
            decision = row.decision.strip().lower()
            if not row.label and not decision:
                continue
            if not row.label or decision not in (EXCLUDE, ACCEPT):
                raise DatasetError(
                    f'{name}: line {reader.line_num}: label "{row.label}" with decision '
                    f'"{row.decision}"; a row needs a label, and "{EXCLUDE}" or "{ACCEPT}"'
                )
            rows.append(row._replace(decision=decision))
        return rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(
            f"{name}: not a CSV file in UTF-8 ({error}); save it as CSV UTF-8"
        ) from error


def read_exclusions(path: Path) -> list[Exclusion]:
    """Read a file. Raises DatasetError, also if there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: can't read the exclusions: {error.strerror}") from error
    return decode_exclusions(data, str(path))


def write_exclusions(path: Path, rows: Iterable[Exclusion]) -> None:
    """Replace the file atomically. Raises OSError."""
    write_atomic(path, encode_exclusions(rows))


def excluded_labels(rows: Iterable[Exclusion]) -> frozenset[str]:
    """The labels whose last row says "exclude"."""
    newest = {row.label: row.decision for row in rows}
    return frozenset(label for label, decision in newest.items() if decision == EXCLUDE)
