"""status.json keeps the first reason for which a run ended."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from train.parallel.mesh import PeerLostError, World
from train.records import read_status
from train.signals import Stopped
from train.status import Status, interruptible

MAIN, OTHER = (World(data_rank=rank, data_size=2, device=torch.device("cpu")) for rank in (0, 1))
TERM = int(signal.SIGTERM)


def end_of(output: Path) -> tuple[str, str]:
    status = read_status(output)
    assert status is not None
    return status.state, status.reason


def fail_on_the_other(output: Path) -> None:
    with pytest.raises(OSError), Status(output, OTHER, 9):
        raise OSError("the disk is gone")


def test_torchruns_sigterm_after_a_failure_does_not_hide_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr("train.status.os._exit", codes.append)
    with pytest.raises(Stopped), Status(tmp_path, MAIN, 9) as status:
        fail_on_the_other(tmp_path)
        # torchrun ends the others: during validation, and before the loop
        status.stopped_at_once("SIGTERM: stopped during validation", TERM)
        raise Stopped("SIGTERM before or after the steps", TERM)
    assert codes == [143]
    assert end_of(tmp_path) == ("failed", "rank 1: OSError: the disk is gone")


def test_a_lost_peer_is_the_reason_only_where_it_has_given_none(tmp_path: Path) -> None:
    with pytest.raises(PeerLostError), Status(tmp_path, MAIN, 9):
        raise PeerLostError("another process is gone")
    assert end_of(tmp_path) == ("failed", "rank 0: another process is gone")
    with pytest.raises(PeerLostError), Status(tmp_path, MAIN, 9):
        fail_on_the_other(tmp_path)
        raise PeerLostError("another process is gone")
    assert end_of(tmp_path) == ("failed", "rank 1: OSError: the disk is gone")


def test_a_stop_and_an_early_end_are_said_by_the_main_process_alone(tmp_path: Path) -> None:
    with pytest.raises(Stopped), Status(tmp_path, MAIN, 9) as status:
        status.running(4)
        with pytest.raises(Stopped), Status(tmp_path, OTHER, 9):
            raise Stopped("SIGTERM: of the other", TERM)
        assert end_of(tmp_path) == ("running", "")
        raise Stopped("SIGTERM: stopped after step 4, which is saved", TERM)
    assert end_of(tmp_path) == ("stopped", "SIGTERM: stopped after step 4, which is saved")
    with Status(tmp_path, MAIN, 9) as status:
        status.ends("early_stop", "3 validations without a gain", best_step=2)
    assert end_of(tmp_path) == ("early_stop", "3 validations without a gain")


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_outside_the_loop_a_signal_ends_a_run_unless_a_lost_peer_does_or_it_is_over() -> None:
    with pytest.raises(Stopped, match="SIGTERM before or after the steps"), interruptible():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), TERM)
    with pytest.raises(PeerLostError), interruptible():
        try:
            raise PeerLostError("another process is gone")
        finally:
            os.kill(os.getpid(), TERM)
    os.kill(os.getpid(), TERM)
