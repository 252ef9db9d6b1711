"""build.jsonl: typed records, append-only, and half a line costs nothing but itself."""

from pathlib import Path

import pytest

from shardgen.report.progress import BUILD_FILE, BuildRecord, Progress, append_record, read_progress


def record(done: int) -> BuildRecord:
    return BuildRecord(stage="encode", done=done, left=9 - done, rate_per_s=0.5, time_s=1.0)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == []
    for done in range(3):
        append_record(tmp_path, record(done))
    assert read_progress(tmp_path) == [record(done) for done in range(3)]
    first = (tmp_path / BUILD_FILE).read_text().splitlines()[0]
    assert first == '{"stage":"encode","done":0,"left":9,"rate":0.5,"time":1.0}'


def test_half_a_line_of_a_killed_build_costs_itself_alone(tmp_path: Path) -> None:
    append_record(tmp_path, record(0))
    path = tmp_path / BUILD_FILE
    path.write_bytes(path.read_bytes() + b'{"stage":"enc')
    assert read_progress(tmp_path) == [record(0)]
    append_record(tmp_path, record(1))
    assert read_progress(tmp_path) == [record(0), record(1)]


def test_a_stage_records_its_beginning_and_its_end(tmp_path: Path) -> None:
    with Progress(tmp_path, "probe", "4/7", 5, "clip") as progress:
        progress.update(2)
        progress.update(3)
    first, last = read_progress(tmp_path)
    assert (first.stage, first.done, first.left, first.rate_per_s) == ("probe", 0, 5, None)
    assert (last.done, last.left) == (5, 0)
    assert last.rate_per_s is not None and last.time_s >= first.time_s


def test_a_redirected_log_gets_lines_instead_of_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shardgen.report.progress.LINE_EVERY_S", 0.0)
    with Progress(tmp_path, "encode", "6/7", 4, "shard") as progress:
        progress.update(1)
    message = capsys.readouterr().err
    assert message.startswith("6/7 encode: 1 of 4 shards, ") and "\r" not in message
