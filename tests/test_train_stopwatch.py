"""The stopwatch gives every moment to one lap."""

import time

import pytest
import torch

from train.stopwatch import Scalars, Stopwatch, lap_seconds


def test_laps_share_all_the_time_among_them() -> None:
    start_s = time.perf_counter()
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.02)
        watch.lap("a")
        time.sleep(0.01)
        watch.lap("b")
    seconds, elapsed_s = lap_seconds(watch.split()), time.perf_counter() - start_s
    assert seconds.keys() == {"a", "b"} and seconds["a"] >= 0.04 and seconds["b"] >= 0.02
    assert sum(seconds.values()) == pytest.approx(elapsed_s, abs=0.005)
    watch.lap("c")
    assert lap_seconds(watch.split()).keys() == {"c"}


def test_scalars_are_those_of_the_moment_when_they_were_asked_for() -> None:
    loss, norm = torch.tensor(2.5), torch.tensor(4.0, requires_grad=True)
    scalars = Scalars(loss, norm)
    loss.zero_()
    assert scalars.read() == [2.5, 4.0]
