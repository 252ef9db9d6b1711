"""A run that hangs is ended with who is to blame; what takes long is not taken for a hang."""

import errno
import os
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import torch
from trainer_runs import train_here

from train import watch
from train.config import TrainConfig
from train.parallel.beats import FolderBeats
from train.parallel.mesh import World
from train.sampling import SamplesConfig
from train.validate import ValidationConfig
from train.watch import Beat, Watch, WatchConfig

TWO = World(data_rank=0, data_size=2, device=torch.device("cpu"))
ALONE = World(data_rank=0, data_size=1, device=torch.device("cpu"))


class Ended:
    """Takes the first reason that a watch would end its process with."""

    def __init__(self) -> None:
        self.reason, self._happened = "", threading.Event()

    def __call__(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._happened.set()

    def within(self, seconds: float) -> bool:
        return self._happened.wait(seconds)


@pytest.fixture
def ended() -> Ended:
    return Ended()


def opened(output: Path, ended: Ended, world: World = ALONE, **limits: float) -> Watch:
    return Watch(output, world, WatchConfig(**limits), ended)


def test_no_progress_names_where_every_process_is(tmp_path: Path, ended: Ended) -> None:
    with opened(tmp_path, ended, silent_s=0.4, stuck_s=0.3) as watched:
        watched.start_micro_batch(7, ["a" * 32, "b" * 32])
        watched.end_micro_batch()
        watched.mark("waits for a batch")
        assert ended.within(10)
    assert ended.reason.startswith("no process has got any further for 0 s. rank 0 (host ")
    keys = f"{'a' * 32}, {'b' * 32}"
    assert f"waits for a batch, 7 steps finished, last samples {keys}" in ended.reason


def test_the_first_micro_batch_and_long_things_are_no_hang(tmp_path: Path, ended: Ended) -> None:
    with opened(tmp_path, ended, silent_s=0.4, stuck_s=0.1) as watched:
        # kernels may be compiled in it
        watched.start_micro_batch(0, [])
        assert not ended.within(0.5)
        # no longer than three times the longest one
        watched.end_micro_batch()
        watched.mark("trains")
        assert not ended.within(0.5)
        with watched.busy("validates"):
            assert not ended.within(2.5)


def test_progress_of_any_process_counts(tmp_path: Path, ended: Ended) -> None:
    with opened(tmp_path, ended, TWO, silent_s=5.0, stuck_s=0.8) as watched:
        watched.start_micro_batch(0, [])
        watched.end_micro_batch()
        for number in range(20):
            other = Beat(rank=1, host="h", pid=1, number=number, progress=number)
            (tmp_path / watch.FOLDER / "rank-00001").write_bytes(msgspec.json.encode(other))
            time.sleep(0.1)
        assert not ended.reason


def test_a_silent_process_is_named_and_one_that_has_finished_is_not(
    tmp_path: Path, ended: Ended
) -> None:
    other = Beat(rank=1, host="far", pid=77, step=3, keys=["k"])
    path = tmp_path / watch.FOLDER / "rank-00001"
    with opened(tmp_path, ended, TWO, silent_s=0.5):
        path.write_bytes(msgspec.json.encode(other))
        assert ended.within(10)
    assert ended.reason.startswith("a process has given no sign for 0.5 s: it is dead or stopped.")
    assert "rank 1 (host far, process 77): starts, 3 steps finished, last samples k" in ended.reason

    finished = Ended()
    with opened(tmp_path, finished, TWO, silent_s=0.8):
        time.sleep(0.3)
        path.unlink()
        assert not finished.within(1.5)


def test_a_full_disk_is_the_reason_and_not_the_others_whose_signs_it_has_no_room_for(
    tmp_path: Path, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, ended, TWO, silent_s=0.5):
        monkeypatch.setattr(FolderBeats, "write", fail_for_want_of_room)
        assert ended.within(10)
    assert ended.reason == (
        "no sign of life could be written for 0.5 s: .alive: No space left on device; free some "
        "space and run the same command, what was finished stands"
    )
    # alone nobody waits for it: the loop ends the run, where it has something to write
    alone = Ended()
    with opened(tmp_path, alone, silent_s=0.2):
        assert not alone.within(1.0)


def fail_for_want_of_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), ".alive")


def test_what_an_earlier_run_left_is_cleared(tmp_path: Path, ended: Ended) -> None:
    with opened(tmp_path, ended):
        assert (tmp_path / watch.FOLDER / "rank-00000").exists()
    assert not list((tmp_path / watch.FOLDER).iterdir())
    (tmp_path / watch.FOLDER / "rank-00009").touch()
    watch.clear(tmp_path)
    assert not (tmp_path / watch.FOLDER).exists()


def test_each_pass_of_validation_and_samples_is_progress(
    validated_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All passes together may take hours, more than anything is given that shows none."""
    marks: Counter[str] = Counter()
    mark = Watch.mark

    def counted(self: Watch, phase: str) -> None:
        marks[phase] += 1
        mark(self, phase)

    monkeypatch.setattr(Watch, "mark", counted)
    train_here(
        validated_run,
        tmp_path,
        num_steps=1,
        validation=ValidationConfig(every=1, num_windows=3, num_train_windows=2),
        samples=SamplesConfig(every=1, num_clips=2, num_steps=5, shape="64x64x1"),
    )
    # at steps 0 and 1, and first of the base: four levels of a val window, two of a train window;
    # once more as each begins
    assert marks["validates"] == 3 * (3 * 4 + 2 * 2) + 2
    assert marks["makes samples"] == 3 * (2 * 5) + 2
