"""tools.runs says of every run how it does, a killed one included, as a table and as JSON."""

import json
import time
from pathlib import Path

import pytest

from loader.files import sole_writer
from tools.runs import main, run_lines
from train.records import (
    METRICS_FILE,
    VALIDATION_FILE,
    RunStatus,
    StepRecord,
    ValidationRecord,
    append_record,
    write_status,
)


def validation(step: int, relative_loss: float) -> ValidationRecord:
    return ValidationRecord(
        step=step,
        relative_loss=relative_loss,
        loss=1.0,
        by_task={},
        by_level=[],
        by_category={},
        psnr_db=[],
        difference=0.0,
        is_improvement=False,
        reference_step=0,
        best_step=step,
        num_without_gain=0,
        num_windows=4,
    )


def write_run(run: Path, status: RunStatus) -> None:
    run.mkdir(parents=True)
    write_status(run, status)
    with (run / METRICS_FILE).open("wb") as file:
        for step in range(1, 31):
            # the first steps, which compile, are forgotten
            s_per_step = 90.0 if step < 5 else 2.0
            append_record(file, StepRecord(step=step, s_per_step=s_per_step))
    with (run / VALIDATION_FILE).open("wb") as file:
        for step, loss in ((0, 1.0), (10, 0.95), (20, 0.97)):
            append_record(file, validation(step, loss))


def running(num_steps: int = 1000) -> RunStatus:
    return RunStatus(state="running", step=29, num_steps=num_steps, time=time.time())


def test_a_run_has_state_best_value_rate_and_time_left(tmp_path: Path) -> None:
    write_run(tmp_path / "a", running())
    with sole_writer(tmp_path / "a", "a run"):
        (line,) = run_lines(tmp_path)
    assert (line.name, line.state, line.step, line.num_steps) == ("a", "running", 30, 1000)
    assert (line.best, line.best_step, line.s_per_step) == (0.95, 10, 2.0)
    assert line.left_s == 970 * 2.0
    assert line.silent_s is not None and line.silent_s < 60


def test_a_run_that_nobody_writes_was_killed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", running())
    (line,) = run_lines(tmp_path)
    assert line.state == "killed" and line.left_s is None
    assert "goes on from the newest checkpoint" in line.reason


def test_table_and_json_hold_every_run_and_name_one_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "sweep/b", RunStatus(state="failed", reason="rank 1: NaN", step=30))
    write_run(tmp_path / "a", RunStatus(state="done", step=30, num_steps=30))
    write_run(tmp_path / "c", running())
    (tmp_path / "c" / METRICS_FILE).write_text("{\n")
    main([str(tmp_path)])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0] == ["a", "done", "30 of 30", "0.9500", "10", "2", "-", ""]
    assert cells[1][:2] == ["c", "unreadable"] and "metrics.jsonl: line 1" in cells[1][-1]
    assert cells[2] == ["sweep/b", "failed", "30", "0.9500", "10", "2", "-", "rank 1: NaN"]
    main([str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == ["a", "c", "sweep/b"]
    # one run by its own folder
    main([str(tmp_path / "a"), "--json"])
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == ["a"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no run below"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        main([str(tmp_path / "nowhere")])
