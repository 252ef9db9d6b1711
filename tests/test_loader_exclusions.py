"""exclusions.csv reads back as it was written, opens in a spreadsheet without computing anything,
and is refused where it can't be understood.
"""

import csv
import io
from pathlib import Path

import pytest

from loader.exclusions import (
    Exclusion,
    decode_exclusions,
    encode_exclusions,
    excluded_labels,
    neutralised,
    read_exclusions,
    restored,
    write_exclusions,
)
from loader.manifest import DatasetError

TEXTS = [
    "video/batch_0001/1000123.json",
    '=HYPERLINK("http://x";"y")',
    "+82 10",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'",
    "'=1",
    "''",
    "'quoted'",
    "＝1＋1",
    '한글, 줄\n바꿈 "따옴표"',
    " =1",
]


def test_every_text_reads_back_as_it_was(tmp_path: Path) -> None:
    rows = [Exclusion(text, "exclude", text, text, text) for text in TEXTS]
    write_exclusions(tmp_path / "exclusions.csv", rows)
    assert read_exclusions(tmp_path / "exclusions.csv") == rows


def test_no_cell_begins_as_a_formula_and_hangul_opens_in_a_spreadsheet() -> None:
    data = encode_exclusions([Exclusion(text, "accept", text) for text in TEXTS])
    assert data.startswith("\ufefflabel,decision,type,person,time\r\n".encode())
    cells = [
        cell
        for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        for cell in row
    ]
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r＝＋－＠")]


@pytest.mark.parametrize("cell", ["'quoted by hand", "plain", ""])
def test_a_cell_written_by_hand_loses_nothing(cell: str) -> None:
    assert restored(cell) == cell and restored(neutralised(cell)) == cell


def test_a_file_written_by_hand_is_read_without_bom_in_any_column_order() -> None:
    data = b"decision,label,note\n Exclude ,a.json,why\n\n,,\naccept,b.json,\n"
    assert decode_exclusions(data, "F") == [
        Exclusion("a.json", "exclude"),
        Exclusion("b.json", "accept"),
    ]


def test_the_last_row_about_a_label_counts() -> None:
    rows = [Exclusion("a", "exclude"), Exclusion("b", "exclude"), Exclusion("a", "accept")]
    assert excluded_labels(rows) == {"b"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"F: the first line names the columns \[\]; it needs label and decision"),
        (b"path,decision\na,exclude\n", "needs label and decision"),
        (b"label,decision\na,exclude\nb,delete\n", r'F: line 3: label "b" with decision "delete"'),
        (b"label,decision\n,exclude\n", r'F: line 2: label ""'),
        ("label,decision\n한글,exclude\n".encode("cp949"), "F: not a CSV file in UTF-8.*save it"),
    ],
)
def test_what_can_not_be_understood_is_refused_by_line(data: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        decode_exclusions(data, "F")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"exclusions\.csv: can't read the exclusions: No such"):
        read_exclusions(tmp_path / "exclusions.csv")
