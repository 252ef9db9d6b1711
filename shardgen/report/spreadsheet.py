"""CSV files for people, who open them in a spreadsheet.

A byte order mark says that the text is UTF-8. A text that a spreadsheet would run as a formula
gets an apostrophe before it. A cell that is longer than Python's csv module reads is cut, and says
so. What programs should read is quality_report.json and metadata.jsonl: those hold every text as
it is.
"""

import csv
import io
from collections.abc import Mapping, Sequence

from loader.exclusions import neutralised

BYTE_ORDER_MARK = "\ufeff".encode()
MAX_CELL_CHARS = 131_072  # csv.field_size_limit()


def csv_header(columns: Sequence[str]) -> bytes:
    """The beginning of a file: the byte order mark and the names of the columns."""
    return BYTE_ORDER_MARK + _encode(columns)


def csv_row(columns: Sequence[str], values: Mapping[str, object]) -> bytes:
    """One row. Raises KeyError for a column without a value, ValueError for a value without a
    column.
    """
    if extra := values.keys() - set(columns):
        raise ValueError(f"no column for {sorted(extra)}")
    return _encode([_cell(values[column]) for column in columns])


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    value = neutralised(value)
    if len(value) > MAX_CELL_CHARS:
        note = f" [cut: {len(value)} characters]"
        value = value[: MAX_CELL_CHARS - len(note)] + note
    return value


def _encode(cells: Sequence[object]) -> bytes:
    """UTF-8, quoted where it has to be, so that newlines and quotes in captions survive."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()
