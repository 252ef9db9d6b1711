"""What a run tells about itself."""

import time
from pathlib import Path

import msgspec
import pytest
import torch

from train.metrics import METRICS_FILE, Metrics, Record, Stopwatch, lap_seconds


def record(step: int) -> Record:
    return {
        "step": step,
        "loss": 1.0 / step,
        "tokens_per_s": 10.0,
        "data_wait_share": 0.0,
        "memory_gib": None,
    }


def steps(output: Path) -> list[int]:
    return [
        msgspec.json.decode(line)["step"]
        for line in (output / METRICS_FILE).read_bytes().splitlines()
    ]


def test_a_resumed_run_drops_what_was_logged_past_its_checkpoint(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, 9) as metrics:
        for step in range(1, 6):
            metrics.write(record(step))
    with open(tmp_path / METRICS_FILE, "ab") as file:
        file.write(b'{"step":6,"lo')  # killed while it wrote
    with Metrics(tmp_path, 3, 9) as metrics:
        metrics.write(record(4))
    assert steps(tmp_path) == [1, 2, 3, 4]


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
