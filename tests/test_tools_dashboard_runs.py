"""Runs that are being written, cut off, resumed or deleted are read as far as they go."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loader.files import sole_writer
from tools.dashboard.files import FileProblem, JsonFiles, Lines, Recent
from tools.dashboard.records import QualityReport, ValidationLine
from tools.dashboard.runs import (
    MAX_POINTS,
    config_differences,
    metric_curves,
    running_mean,
    summarise,
)
from tools.dashboard.sources import Sources, find_evaluations, find_runs
from tools.dashboard.state import State, open_state
from train.records import ValidationRecord


@pytest.fixture
def state(tmp_path: Path) -> State:
    (tmp_path / "runs").mkdir()
    return open_state(Sources({}, tmp_path / "runs", tmp_path / "own"))


def write_metrics(run: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    run.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(text + tail)


def test_half_a_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines: Lines[dict[str, int]] = Lines(path, dict[str, int])
    assert lines.read() == []
    path.write_text('{"step": 1}\n{"st')
    assert lines.read() == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert lines.read() == [{"step": 1}, {"step": 2}]
    assert lines.num_damaged == 0


def test_a_resumed_run_that_dropped_lines_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines: Lines[dict[str, int]] = Lines(path, dict[str, int])
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert len(lines.read()) == 3
    path.write_text('{"step": 1}\n')
    assert lines.read() == [{"step": 1}]
    other = tmp_path / "new"
    other.write_text('{"step": 7}\n{"step": 8}\n')
    other.replace(path)
    assert lines.read() == [{"step": 7}, {"step": 8}]
    path.write_text('{"step": 9}\n{"step": 10}\n')  # in place, and longer than before
    assert [each["step"] for each in lines.read()] == [9, 10]
    path.unlink()
    assert lines.read() == []


def test_a_damaged_line_is_counted_and_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n{"step": "x"}\n\xff\n\n{"step": 2}\n')
    lines: Lines[dict[str, int]] = Lines(path, dict[str, int])
    assert [each["step"] for each in lines.read()] == [1, 2]
    assert lines.num_damaged == 3


def test_a_json_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    files, path = JsonFiles(), tmp_path / "quality_report.json"
    assert files.read(path, QualityReport) is None
    path.write_text('{"label_files": 3, "unknown": 1}')
    report = files.read(path, QualityReport)
    assert isinstance(report, QualityReport) and report.label_files == 3
    assert files.read(path, QualityReport) is report
    path.write_text('{"label_files": "three"}')
    assert isinstance(files.read(path, QualityReport), FileProblem)


def test_numbers_that_no_float_holds_are_not_measured(state: State, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    huge = 10**400
    record = {"step": huge, "loss": huge, "lr": -huge, "s_per_step": 1.0}
    write_metrics(run, [{"step": 1, "loss": 0.5}, record])
    (run / "status.json").write_text(json.dumps({"state": "running", "num_steps": huge}))
    found = summarise(state, "a", run)
    assert (found.step, found.loss, found.num_steps, found.left_s) == (None, None, None, None)
    assert metric_curves(state, run).columns["loss"] == [0.5, None]


def test_a_killed_run_is_not_said_to_run_on(state: State, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    write_metrics(run, [{"step": 1, "loss": 0.5, "s_per_step": 2.0}])
    (run / "status.json").write_text('{"state": "running", "step": 1, "num_steps": 11}')
    # a copy, or of an older version: there is no lock to tell by
    assert summarise(state, "a", run).state == "running"
    with sole_writer(run, "a run"):
        found = summarise(state, "a", run)
        assert (found.state, found.left_s) == ("running", 20.0)
    found = summarise(state, "a", run)
    assert (found.state, found.left_s) == ("killed", None)


def test_a_run_in_one_line(state: State, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    records = [{"step": step, "loss": 0.5, "s_per_step": 2.0} for step in range(1, 51)]
    write_metrics(run, records, '{"step": 51')
    (run / "config.toml").write_text("num_steps = 100\n")
    found = summarise(state, "a", run)
    assert (found.step, found.num_steps, found.loss, found.left_s) == (50, 100, 0.5, 100.0)
    assert found.state == "" and found.best is None
    lines = [{"step": 0, "relative_loss": 1.0}, {"step": 50, "relative_loss": 0.8}, {"step": 60}]
    (run / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "status.json").write_text('{"state": "failed", "reason": "disk full", "step": 50}')
    found = summarise(state, "a", run)
    assert found.best is not None and found.best.step == 50
    assert (found.state, found.reason, found.left_s) == ("failed", "disk full", None)
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    assert summarise(state, "a", run).step is None


def test_curves_say_none_where_nothing_was_measured(state: State, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    write_metrics(run, [{"step": 1, "loss": 1.0, "power_w": None}, {"step": 2, "loss": None}])
    curves = metric_curves(state, run)
    assert curves.columns == {"step": [1, 2], "loss": [1.0, None]}


def test_a_long_run_is_thinned_and_keeps_its_last_record(state: State, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    write_metrics(run, [{"step": step} for step in range(1, 2 * MAX_POINTS + 2)])
    curves = metric_curves(state, run)
    assert curves.stride == 3 and curves.columns["step"][-1] == 2 * MAX_POINTS + 1
    assert curves.num_records == 2 * MAX_POINTS + 1


def test_the_running_mean_leaves_out_what_is_missing() -> None:
    assert running_mean([1.0, None, 3.0, 5.0], 2) == [1.0, 1.0, 3.0, 4.0]
    assert running_mean([None], 5) == [None]


def test_configurations_are_compared_key_by_key() -> None:
    first, second = {"seed": 1, "optim.lr": 1e-4}, {"seed": 1, "optim.lr": 2e-4, "lora.rank": 8}
    assert config_differences([first, second]) == [
        ("lora.rank", ["", "8"]),
        ("optim.lr", ["0.0001", "0.0002"]),
    ]


def test_runs_are_found_by_what_they_hold(tmp_path: Path) -> None:
    write_metrics(tmp_path / "b" / "one", [{"step": 1}])
    write_metrics(tmp_path / "two", [{"step": 1}])
    (tmp_path / "two" / "evaluations" / "final").mkdir(parents=True)
    (tmp_path / "two" / "evaluations" / "final" / "result.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert sorted(find_runs(tmp_path)) == ["b/one", "two"]
    assert list(find_runs(tmp_path / "two")) == ["."]
    assert list(find_evaluations(tmp_path)) == ["two/final"]
    assert list(find_evaluations(tmp_path / "two")) == ["final"]
    assert find_runs(None) == {}


def test_what_all_pages_ask_is_worked_out_once() -> None:
    recent, calls = Recent(60), list[int]()

    def answer() -> int:
        calls.append(1)
        return 7

    assert [recent.get("key", answer) for _ in range(3)] == [7, 7, 7]
    assert len(calls) == 1


def test_a_line_that_the_trainer_writes_is_read_whole() -> None:
    written = ValidationRecord(
        step=7,
        relative_loss=0.9,
        loss=1.0,
        by_task={"t2v": 0.9},
        by_level=[0.8, 1.0],
        by_category={"a": 0.9},
        psnr_db=[20.0, 10.0],
        train_relative_loss=0.85,
        difference=-0.1,
        standard_error=0.01,
        is_improvement=True,
        reference_step=0,
        best_step=7,
        num_without_gain=0,
        num_windows=4,
    )
    read = msgspec.json.decode(msgspec.json.encode(written), type=ValidationLine)
    assert (read.relative, read.difference_se, read.train_relative) == (0.9, 0.01, 0.85)
    assert read.per_sigma == {"1": 0.8, "2": 1.0} and read.psnr_db == 15.0
    assert read.per_task == {"t2v": 0.9} and read.per_category == {"a": 0.9}
