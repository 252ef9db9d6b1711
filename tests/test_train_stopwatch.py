"""The stopwatch gives every moment to one lap."""

import time

import torch

from train.stopwatch import Scalars, Stopwatch, lap_seconds


def test_laps_share_all_the_time_among_them() -> None:
    before_s = time.perf_counter()
    watch = Stopwatch(torch.device("cpu"))
    begin_s = time.perf_counter()
    for _ in range(2):
        time.sleep(0.02)
        watch.lap("a")
        time.sleep(0.01)
        end_s = time.perf_counter()
        watch.lap("b")
    after_s = time.perf_counter()
    seconds = lap_seconds(watch.split())
    assert seconds.keys() == {"a", "b"} and seconds["a"] >= 0.04 and seconds["b"] >= 0.02
    # however late this process gets its turn
    assert end_s - begin_s <= sum(seconds.values()) <= after_s - before_s
    watch.lap("c")
    assert lap_seconds(watch.split()).keys() == {"c"}


def test_scalars_are_those_of_the_moment_when_they_were_asked_for() -> None:
    loss, norm = torch.tensor(2.5), torch.tensor(4.0, requires_grad=True)
    scalars = Scalars(loss, norm)
    loss.zero_()
    assert scalars.read() == [2.5, 4.0]
