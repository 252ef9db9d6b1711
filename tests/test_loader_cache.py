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
        cache.put(f"{i % 97:032x}-{seed}-{i}", os.urandom(5000))


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1_000_000)
    first, name = "0" * 32, "ab" + "0" * 30
    cache.put(first, b"f" * 5000)
    cache.put(name, b"x" * 5000)
    for i in range(150):
        cache.put(f"{i % 97 + 1:032x}-{i}-10", bytes([i % 256]) * 10_000)
        os.utime(tmp_path / "ab" / name)
        assert cache_size(tmp_path) <= 1_000_000
    used = cache.get(name)
    assert used is not None and bytes(used) == b"x" * 5000 and cache.get(first) is None
    assert cache_size(tmp_path) > 500_000


def test_what_is_no_entry_stays_in_a_folder_that_holds_other_things(tmp_path: Path) -> None:
    (tmp_path / "photos" / "2025").mkdir(parents=True)
    theirs = tmp_path / "photos" / "1.raw"
    theirs.write_bytes(bytes(2_000_000))
    unfinished = tmp_path / "photos" / "2.raw.1-1.tmp"
    unfinished.touch()
    for path in (theirs, unfinished):
        os.utime(path, (0, 0))
    cache = Cache(tmp_path, 1_000_000)
    for i in range(200):
        cache.put(f"{i:032x}", bytes(10_000))
    assert theirs.exists() and unfinished.exists()
    assert cache.get(f"{199:032x}") is not None
    assert cache_size(tmp_path) - theirs.stat().st_size <= 1_010_000


def test_processes_share_the_bound_and_a_killed_one_leaves_nothing_in_the_way(
    tmp_path: Path,
) -> None:
    processes = [
        multiprocessing.get_context("spawn").Process(
            target=fill, args=(tmp_path, 1_000_000, seed), daemon=True
        )
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
    stale = (
        tmp_path / "00" / f"{0:032x}.1-1.tmp"
    )  # as a process leaves it that is killed while writing
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
