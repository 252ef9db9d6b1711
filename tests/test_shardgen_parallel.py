"""Threads are shared out fairly, and what goes wrong in one is heard of."""

import threading

import pytest

from shardgen.media.parallel import in_parallel


def test_no_host_gets_more_than_its_share_and_none_starves_another() -> None:
    """The slow host answers when it is asked for four at once and the other host has got far."""
    lock, busy, most = threading.Lock(), dict[str, int](), dict[str, int]()
    slow_are_in, fast_is_far = threading.Barrier(4), threading.Event()

    def work(item: tuple[str, int]) -> int:
        host, number = item
        with lock:
            busy[host] = busy.get(host, 0) + 1
            most[host] = max(most.get(host, 0), busy[host])
            assert sum(busy.values()) <= 6
        if host == "slow":
            slow_are_in.wait(60)
            assert fast_is_far.wait(60), "the slow host has all workers"
        elif number == 100:
            fast_is_far.set()
        with lock:
            busy[host] -= 1
        return number

    items = [("slow", i) for i in range(8)] + [("fast", i) for i in range(200)]
    results = list(in_parallel(items, work, host_of=lambda item: item[0], workers=6, per_host=4))
    assert sorted(item for item, _ in results) == sorted(items)
    assert all(result == item[1] for item, result in results)
    assert most["slow"] == 4 and most["fast"] <= 4


def test_an_exception_of_a_thread_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_parallel([1, 0], lambda item: 1 // item, workers=2))
