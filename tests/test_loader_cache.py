"""The cache of remote datasets stays within its bound,
whoever writes to it and however they end.
"""

import multiprocessing
import os
import signal
import time
from pathlib import Path

from loader.cache import Cache


def cache_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def fill(folder: Path, max_bytes: int, seed: int, num: int = 10**9) -> None:
    cache = Cache(folder, max_bytes)
    for i in range(num):
        cache.put(f"{i % 97:02d}-{seed}-{i}", os.urandom(5000))


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1_000_000)
    cache.put("used", b"x" * 5000)
    for i in range(150):
        cache.put(f"{i % 97:02d}-{i}", bytes([i % 256]) * 10_000)
        os.utime(tmp_path / "us" / "used")
        assert cache_size(tmp_path) <= 1_000_000
    used = cache.get("used")
    assert used is not None and bytes(used) == b"x" * 5000 and cache.get("00-0") is None
    assert cache_size(tmp_path) > 500_000


def test_processes_share_the_bound_and_a_killed_one_leaves_nothing_in_the_way(
    tmp_path: Path,
) -> None:
    processes = [
        multiprocessing.get_context("spawn").Process(target=fill, args=(tmp_path, 1_000_000, seed))
        for seed in range(2)
    ]
    for process in processes:
        process.start()
    deadline_s = time.monotonic() + 300
    while cache_size_now(tmp_path) < 700_000 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    time.sleep(0.3)
    for process in processes:
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 500_000 < cache_size(tmp_path) <= 1_100_000
    (tmp_path / "00").mkdir(exist_ok=True)
    stale = tmp_path / "00" / "name.1-1.tmp"  # as a process leaves it that is killed while writing
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    fill(tmp_path, 1_000_000, seed=3, num=50)
    assert not stale.exists() and cache_size(tmp_path) <= 1_000_000


def cache_size_now(folder: Path) -> int:
    """`cache_size` while others write and delete."""
    total = 0
    for path in folder.glob("*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
