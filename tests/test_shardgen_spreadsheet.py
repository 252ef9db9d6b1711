"""CSV for people: a spreadsheet reads it as UTF-8, runs nothing of it, and csv.reader takes every
cell.
"""

import csv
import io

import pytest

from shardgen.report.spreadsheet import MAX_CELL_CHARS, csv_header, csv_row

COLUMNS = ("label", "prompt", "byte_offset")


def written(prompt: str) -> str:
    """The prompt as csv.reader gives it back."""
    row = csv_row(COLUMNS, {"label": "a.json", "prompt": prompt, "byte_offset": -3})
    text = (csv_header(COLUMNS) + row).decode("utf-8-sig")
    header, cells = csv.reader(io.StringIO(text, newline=""))
    assert (header, cells[0], cells[2]) == (list(COLUMNS), "a.json", "-3")
    return cells[1]


def test_the_file_begins_with_a_byte_order_mark() -> None:
    assert csv_header(COLUMNS).startswith(b"\xef\xbb\xbflabel,")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "＝"])
def test_what_a_spreadsheet_would_compute_gets_an_apostrophe(start: str) -> None:
    assert written(f"{start}HYPERLINK(1)") == f"'{start}HYPERLINK(1)"


def test_other_texts_stay_as_they_are() -> None:
    for text in ("시장 = 상인", 'he said "네",\nand left', "1+1", ""):
        assert written(text) == text


def test_a_cell_that_no_reader_takes_is_cut_and_says_so() -> None:
    longest = "가" * MAX_CELL_CHARS
    assert written(longest) == longest
    cut = written(longest + "나")
    assert len(cut) == MAX_CELL_CHARS
    assert cut.endswith(f" [cut: {MAX_CELL_CHARS + 1} characters]")


def test_a_value_without_a_column_is_refused() -> None:
    with pytest.raises(ValueError, match="no column for"):
        csv_row(COLUMNS, {"label": "", "prompt": "", "byte_offset": "", "promt": ""})
