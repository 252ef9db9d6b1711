"""Workers of this machine hear what they are given next; every unit is run once all the same."""

import os
import signal
import time
from pathlib import Path

import pytest

from shardgen.encode.executors import ExecutorError
from shardgen.encode.lookahead import run_looking_ahead
from shardgen.encode.speed import EncodeSpeed
from shardgen.encode.unit import ShardTimes

LAST = 1000


def work(unit: int | None, upcoming: int | None) -> tuple[int | None, int | None]:
    if unit == 3:
        raise ValueError("three is not wanted")
    if unit == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    if unit == LAST:
        # until the other worker has done all others
        deadline_s = time.monotonic() + 120
        while not Path(os.environ["DONE"]).exists() and time.monotonic() < deadline_s:
            time.sleep(0.01)
    return unit, upcoming


def test_one_worker_hears_of_every_next_unit() -> None:
    outcomes = dict(run_looking_ahead(work, [None, 1, 2, 3, 4], [{}]))
    assert isinstance(outcomes.pop(3), ValueError)
    assert outcomes == {None: (None, 1), 1: (1, 2), 2: (2, 3), 4: (4, None)}


def test_an_idle_worker_takes_what_a_busy_one_was_promised(tmp_path: Path) -> None:
    order = []
    for unit, _ in run_looking_ahead(work, [LAST, 5, 6], 2 * [{"DONE": str(tmp_path / "done")}]):
        order.append(unit)
        if len(order) == 2:
            (tmp_path / "done").touch()
    assert sorted(order) == [5, 6, LAST] and order[-1] == LAST


def test_units_are_taken_lazily() -> None:
    taken: list[int] = []
    units = (taken.append(unit) or unit for unit in range(100, 200))  # type: ignore[func-returns-value]
    results = run_looking_ahead(work, units, [{}])
    next(results)
    assert len(taken) <= 3
    results.close()  # type: ignore[attr-defined]


def test_a_dead_worker_is_a_clear_error() -> None:
    with pytest.raises(ExecutorError, match="a worker process died"):
        list(run_looking_ahead(work, [1, 99], [{}]))


def test_the_summary_names_rate_busy_share_and_the_stage_that_limits() -> None:
    speed = EncodeSpeed(elapsed_s=50.0)
    times = ShardTimes(wall_s=20.0, waiting_s=3.0, vae_s=15.0, text_s=1.0, writing_s=1.0)
    for _ in range(2):
        speed.add(50, times)
    assert speed.busy_share == 0.8 and speed.limiting_stage == "VAE"
    assert speed.summary().startswith("encode: 100 windows, 2.00 a second")
    assert "busy 80%" in speed.summary() and speed.summary().endswith("limited by: VAE")
