"""metrics.jsonl reads as one run, whatever was killed, and a line that can't be read is named."""

from pathlib import Path

import pytest

from train.records import (
    RecordError,
    StepRecord,
    append_record,
    drop_records_after,
    read_records,
)


def write(path: Path, *steps: int) -> None:
    with path.open("ab") as file:
        for step in steps:
            append_record(file, StepRecord(step=step, loss=1.0 / step))


def steps(path: Path) -> list[int]:
    return [record.step for record in read_records(path, StepRecord)]


def test_what_is_written_is_read_back_and_what_json_cannot_hold_is_not_measured(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    written = StepRecord(step=1, loss=0.1 + 0.2, lr=1e-4, grad_norm=float("inf"))
    with path.open("ab") as file:
        append_record(file, written)
    assert read_records(path, StepRecord) == [StepRecord(step=1, loss=0.1 + 0.2, lr=1e-4)]


def test_a_resumed_run_drops_what_was_logged_past_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4, 5)
    with path.open("ab") as file:
        file.write(b'{"step":6,"lo')  # killed while it wrote
    drop_records_after(path, 3)
    write(path, 4)
    assert steps(path) == [1, 2, 3, 4]


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    with path.open("ab") as file:
        file.write(b'{"step":3,"lo')
    assert steps(path) == [1, 2]


def test_fields_of_a_newer_program_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "of_next_year": [3]}\n')
    assert read_records(path, StepRecord) == [StepRecord(step=1, loss=2.0)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"step": 1}\n{"st\n{"step": 3}\n', 2),
        ("[1]\n", 1),
        ('{"loss": 1.0}\n', 1),
        ('{"step": 1}\n\n', 2),
        ('{"step": "1"}\n', 1),
    ],
)
def test_a_damaged_line_is_named_with_its_file_when_read_and_when_resumed(
    text: str, line: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    for action in (
        lambda: read_records(path, StepRecord),
        lambda: drop_records_after(path, 9),
    ):
        with pytest.raises(RecordError, match=rf"metrics.jsonl: line {line} is no record"):
            action()
    assert path.read_text() == text
