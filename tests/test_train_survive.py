"""Two ranks that are signalled, stopped and killed: what is saved, what is said, how it ends."""

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trainer_runs import NUM_STEPS, Rank, finish, records, start, wait_for_records

from train import checkpoint
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.lora import files
from train.records import RunStatus, read_status
from train.watch import WatchConfig

# a checkpoint only where something asks for it, and at the end
SELDOM = CheckpointConfig(every=5000)
# minutes, if no signal ends it
LONG: dict[str, Any] = {"num_steps": 5000}


def status_of(output: Path) -> RunStatus:
    status = read_status(output)
    assert status is not None
    return status


def signal_after(
    run_config: TrainConfig,
    output: Path,
    step: int,
    numbers: Mapping[int, int],
    delay_s: float = 0.0,
    **changes: Any,
) -> list[Rank]:
    """Start two ranks and send each its signal, `delay_s` after `step` was logged."""
    processes = start(run_config, output, 2, **({"checkpoint": SELDOM} | changes))
    wait_for_records(processes, output, step)
    time.sleep(delay_s)
    for rank, number in numbers.items():
        processes[rank].send_signal(number)
    return processes


def stop_and_resume(
    run_config: TrainConfig, whole: Path, output: Path, step: int, delay_s: float = 0.0
) -> None:
    """SIGTERM to both ranks; what goes on must end with the bytes of `whole`."""
    both = {0: signal.SIGTERM, 1: signal.SIGTERM}
    processes = signal_after(run_config, output, step, both, delay_s)
    said = [process.communicate()[1] for process in processes]
    ended = [process.returncode for process in processes]
    # a signal that comes after the last micro-batch finds no step left to stop after
    if status_of(output).state == "stopped" and "after the steps" not in status_of(output).reason:
        # the last finished step is saved, and every process knows which
        assert ended == [143, 143], said
        folder = checkpoint.latest(output)
        assert folder is not None
        num_done = checkpoint.step_of(folder)
        status = status_of(output)
        assert status.step == num_done and num_done >= step
        assert status.reason == f"SIGTERM: stopped after step {num_done}, which is saved"
    finish(start(run_config, output, 2, checkpoint=SELDOM))
    assert status_of(output).state == "done"
    ours, theirs = (folder / files.DIFFUSERS_FILE for folder in (output, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert [record.step for record in records(output)] == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize(("step", "delay_s"), [(1, 0.0), (2, 0.05)])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path, step: int, delay_s: float
) -> None:
    stop_and_resume(run_config, two_ranks, tmp_path, step, delay_s)


@pytest.mark.soak
@pytest.mark.parametrize("step", range(1, NUM_STEPS))
@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.02, 0.03, 0.045, 0.06])
def test_stopped_at_any_moment_it_ends_with_the_same_bytes(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path, step: int, delay_s: float
) -> None:
    stop_and_resume(run_config, two_ranks, tmp_path, step, delay_s)


def test_a_signal_to_one_rank_stops_all_of_them_and_sigusr1_only_saves(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    processes = signal_after(run_config, tmp_path, 1, {1: signal.SIGUSR1}, **LONG, log_every=4)
    while (early := checkpoint.latest(tmp_path)) is None:
        assert processes[0].poll() is None, processes[0].said()
        time.sleep(0.01)
    wait_for_records(processes, tmp_path, checkpoint.step_of(early) // 4 + 2)
    assert checkpoint.latest(tmp_path) == early
    processes[1].send_signal(signal.SIGINT)
    said = [process.communicate()[1] for process in processes]
    # rank 0 was not told by which signal
    assert [process.returncode for process in processes] == [143, 130], said
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest != early
    status = status_of(tmp_path)
    # also where the log is some steps behind
    assert (status.state, status.step) == ("stopped", checkpoint.step_of(newest))


def test_after_the_death_of_a_rank_nothing_is_saved(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    processes = signal_after(run_config, tmp_path, 2, {1: signal.SIGKILL}, **LONG)
    # as torchrun does it: whether or not the other one has noticed
    processes[1].communicate()
    processes[0].send_signal(signal.SIGTERM)
    said = processes[0].communicate(timeout=60)[1]
    assert processes[0].returncode == 1
    assert "another process of this run is gone" in said and "Traceback" not in said
    assert checkpoint.latest(tmp_path) is None
    assert status_of(tmp_path).state == "failed"


def test_a_rank_that_was_stopped_ends_the_run_and_is_named(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    # not too short for a machine that lets a process wait
    watch = WatchConfig(silent_s=5.0)
    stop = {1: signal.SIGSTOP}
    processes = signal_after(run_config, tmp_path, 2, stop, watch=watch, **LONG)
    try:
        said = processes[0].communicate(timeout=60)[1]
    finally:
        processes[1].send_signal(signal.SIGKILL)
    assert processes[0].returncode == 1
    assert "a process has given no sign for 5 s: it is dead or stopped. rank 1 (host " in said
    assert f"process {processes[1].pid})" in said and "steps finished, last samples " in said
    status = status_of(tmp_path)
    assert status.state == "failed" and "rank 1 (host" in status.reason


def test_torchrun_and_the_status_get_the_reason_of_an_error(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    data = msgspec.structs.replace(run_config.data, datasets=["nowhere"])
    told = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error")}
    (process,) = start(run_config, tmp_path, 1, environment=told, data=data)
    said = process.communicate()[1]
    assert process.returncode == 1 and "nowhere" in said and "Traceback" not in said
    error = msgspec.json.decode((tmp_path / "error").read_bytes())
    assert "nowhere" in error["message"]["message"]
    assert "nowhere" in status_of(tmp_path).reason
