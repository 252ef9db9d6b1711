"""Signals are noted whatever the main thread does, and acted on together or at once."""

import os
import signal
from collections.abc import Callable
from queue import Queue

import pytest
import torch

from train.parallel.mesh import World
from train.signals import REPEATED_S, Signals, Wish

ALONE = World(data_rank=0, data_size=1, device=torch.device("cpu"))


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends this process a signal, and waits until the thread has noted it."""
    noted, note = Queue[int](), Signals._note

    def note_and_tell(signals: Signals, number: int) -> None:
        note(signals, number)
        noted.put(number)

    def send(number: int) -> None:
        os.kill(os.getpid(), number)
        assert noted.get(timeout=60) == number

    monkeypatch.setattr(Signals, "_note", note_and_tell)
    return send


def test_a_wish_is_told_once_and_the_stronger_one_wins(
    send: Callable[[int], None],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.agreed(ALONE) == Wish.NONE
        send(signal.SIGUSR1)
        assert signals.agreed(ALONE) == Wish.CHECKPOINT
        assert signals.agreed(ALONE) == Wish.NONE
        send(signal.SIGINT)
        send(signal.SIGUSR1)
        assert signals.agreed(ALONE) == Wish.STOP
        stopped = signals.stopped(12)
        assert str(stopped) == "SIGINT: stopped after step 12, which is saved"
        assert stopped.number == signal.SIGINT
        # nothing is saved then, so nothing must say so
        assert str(signals.stopped(0)) == "SIGINT: stopped before the first step was done"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("disposition", "wish"), [(signal.SIG_DFL, Wish.STOP), (signal.SIG_IGN, Wish.CHECKPOINT)]
)
def test_a_closed_terminal_stops_the_run_unless_nohup_keeps_that_away(
    send: Callable[[int], None], disposition: signal.Handlers, wish: Wish
) -> None:
    before = signal.signal(signal.SIGHUP, disposition)
    try:
        with Signals() as signals:
            if disposition == signal.SIG_DFL:
                send(signal.SIGHUP)
            else:
                os.kill(os.getpid(), signal.SIGHUP)
            # the next one has come: so has the one before it
            send(signal.SIGUSR1)
            assert signals.agreed(ALONE) == wish
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_at_once_but_not_the_same_one_passed_on_by_torchrun(
    send: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    clock = [100.0]
    monkeypatch.setattr("train.signals.os._exit", ended.append)
    monkeypatch.setattr("train.signals.time.monotonic", lambda: clock[0])
    with Signals():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert ended == []
        clock[0] += REPEATED_S + 1
        send(signal.SIGINT)
        assert ended == [128 + signal.SIGINT]


def test_a_second_signal_is_told_before_the_process_ends(
    send: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []
    ended: list[int] = []
    clock = [100.0]
    monkeypatch.setattr("train.signals.os._exit", ended.append)
    monkeypatch.setattr("train.signals.time.monotonic", lambda: clock[0])
    with Signals(lambda reason, number: told.append((reason, number))):
        send(signal.SIGTERM)
        clock[0] += REPEATED_S + 1
        send(signal.SIGINT)
    (reason, number), code = told[0], ended[0]
    assert reason.startswith("SIGINT: ended at once by a second signal") and number == signal.SIGINT
    assert code == 128 + signal.SIGINT


def test_where_nothing_needs_to_be_saved_it_ends_at_once_also_for_an_earlier_signal(
    send: Callable[[int], None],
) -> None:
    ended: list[tuple[str, int]] = []

    def end(reason: str, number: int) -> None:
        ended.append((reason, number))

    during = ("SIGTERM: stopped during validation or samples", int(signal.SIGTERM))
    with Signals() as signals:
        with signals.at_once(end):
            assert ended == []
            send(signal.SIGTERM)
            assert ended == [during]
        with signals.at_once(end):
            assert ended == [during, during]
