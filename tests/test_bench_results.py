"""A benchmark that is cut off: what it has measured stands in its file."""

import json
import time
from pathlib import Path

import pytest
import torch

from bench.our_step import MODELS
from bench.results import check_start, save
from bench.step import rows_of
from bench.step_timing import PROFILES, Subjects, Timing
from loader.batch import Batch
from loader.shape import Bucket
from train.activations.sizes import Shape


class Scripted(Subjects):
    """Subjects that take 1, 2, 3, ... seconds, until the machine is taken away."""

    def __init__(self, last: int):
        self.kind, self.config = MODELS["ti2v-5b"].kind, MODELS["ti2v-5b"].wan
        self.profile, self.device = PROFILES["native"], torch.device("cpu")
        self.bucket, self.shape = Bucket(832, 480, 49), Shape(1, 5070, 512)
        self.steps = {name: lambda _: torch.zeros(()) for name in ("ours", "frozen")}
        self._last, self._num_calls = last, 0

    def time(self, name: str, batch: Batch) -> Timing:
        self._num_calls += 1
        if self._num_calls > self._last:
            raise RuntimeError("cut off")
        return Timing(float(self._num_calls), 0.5, 3.0)


def test_every_round_of_a_step_that_ended_is_there_when_the_next_is_cut_off(
    tmp_path: Path,
) -> None:
    path = tmp_path / "step.json"
    # a warm-up of two steps for each of two subjects, two rounds, and one step of the third
    with pytest.raises(RuntimeError, match="cut off"):
        for rows in rows_of(Scripted(9), "t2v", 10, time.perf_counter() + 60):
            save(path, {"rows": rows})
    rows = json.loads(path.read_bytes())["rows"]
    assert [(row["subject"], row["n"]) for row in rows] == [("ours", 2), ("frozen", 2)]
    # seconds 5 to 8, in some order
    assert sum(row["s"] for row in rows) == 13.0


def test_after_its_time_a_case_has_one_round() -> None:
    (rows,) = rows_of(Scripted(100), "t2v", 10, time.perf_counter() - 1)
    assert [row["n"] for row in rows] == [1, 1]


def test_what_is_missing_is_told_before_time_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="no GPU here"):
        check_start("bench.step", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_start("bench.step", tmp_path / "step.json")
    with pytest.raises(SystemExit, match="missing: no such folder; make it first"):
        check_start("bench.step", tmp_path / "missing" / "step.json")


def test_a_file_that_can_not_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "missing" / "step.json", {"rows": []})
    assert "going on without" in capsys.readouterr().err
