"""The dashboard under load: `python -m bench.dashboard_load first|load DIR`, where DIR was made and
indexed by bench.dashboard.

`first` starts the dashboard and asks for its first pages. `load` has 50 open pages ask every 5 s,
for two minutes, while somebody writes the catalog as a build does; before that the same writes are
made alone, for comparison.
"""

import argparse
import itertools
import os
import random
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.dashboard import CATALOG, milliseconds
from tools.dashboard.search import SEARCH_FILE

NUM_PAGES, POLL_S = 50, 5.0


def first(folder: Path) -> None:
    """Seconds from the start to the first page, and milliseconds of the following ones."""
    with _dashboard(folder, folder / "own-first") as (url, _):
        for path in ("/", f"/data/{folder.name}/defects", f"/data/{folder.name}/preprocessing"):
            times = [milliseconds(partial(_get, url + path)) for _ in range(7)]
            median = statistics.median(times[1:])
            print(f"{path}: first {times[0]:.0f} ms, then median {median:.1f} ms")


def load(folder: Path, seconds: float) -> None:
    """A build's writes alone for half of the time, then with 50 pages that ask every 5 s."""
    alone = _writes(folder / CATALOG, seconds / 2)
    with _dashboard(folder, folder / "own-first") as (url, process):
        stop = threading.Event()
        times: list[float] = []
        errors: list[str] = []
        pages = [
            threading.Thread(target=_poll, args=(url, path, number, stop, times, errors))
            for number, path in zip(
                range(NUM_PAGES), itertools.cycle(_polled(folder)), strict=False
            )
        ]
        for page in pages:
            page.start()
        before_s = _cpu_s(process.pid)
        beside = _writes(folder / CATALOG, seconds)
        cpu_s = _cpu_s(process.pid) - before_s
        stop.set()
        for page in pages:
            page.join()
    times.sort()
    print(
        f"{len(times)} requests, {len(errors)} errors {errors[:3]}; median "
        f"{statistics.median(times):.1f} ms, 99% {times[len(times) * 99 // 100]:.1f} ms; writes a "
        f"second {alone.per_s:.1f} alone, {beside.per_s:.1f} beside {len(pages)} pages "
        f"({beside.per_s / alone.per_s - 1:+.1%}), CPU of one {alone.cpu_ms:.2f} and "
        f"{beside.cpu_ms:.2f} ms; the dashboard took {cpu_s / seconds:.1%} of a core"
    )


def _polled(folder: Path) -> list[str]:
    base = f"/data/{folder.name}"
    return [f"{base}/preprocessing/live", f"{base}/defects?status=rejected", "/", f"{base}/case/7"]


def _poll(
    url: str,
    path: str,
    number: int,
    stop: threading.Event,
    times: list[float],
    errors: list[str],
) -> None:
    """One open page: it remembers the ETag, as a browser does."""
    etag = ""
    stop.wait(number / 10)  # fifty people don't open a page in the same moment
    while not stop.is_set():
        request = urllib.request.Request(url + path, headers={"If-None-Match": etag})
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                answer.read()
                etag = answer.headers["etag"]
        except urllib.error.HTTPError as error:
            if error.code != 304:
                errors.append(f"{path}: {error.code}")
        except OSError as error:
            errors.append(f"{path}: {error}")
        times.append(1000 * (time.perf_counter() - started))
        stop.wait(POLL_S)


class Writes(NamedTuple):
    """Transactions of 500 rows each: how many a second, and CPU milliseconds of one, which other
    work on the machine changes less.
    """

    per_s: float
    cpu_ms: float


def _writes(path: Path, seconds: float) -> Writes:
    """In a process of its own, as a stage of a build writes them."""
    code = (
        "import sys, time; from bench.dashboard_load import write_for; from pathlib import Path; "
        "print(*write_for(Path(sys.argv[1]), float(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(path), str(seconds)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Writes(*map(float, answer.split()))


def write_for(path: Path, seconds: float) -> Writes:
    """Update 500 rows in each transaction until the time is over."""
    rng = random.Random(0)
    with closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as db:
        last = db.execute("SELECT max(id) FROM clips").fetchone()[0]
        started, started_cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            begin = rng.randrange(1, last - 500)
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.executemany(
                    "UPDATE clips SET detail = ? WHERE id = ?",
                    [(str(count), number) for number in range(begin, begin + 500)],
                )
            count += 1
        cpu_s, wall_s = time.process_time() - started_cpu, time.perf_counter() - started
        return Writes(count / wall_s, 1000 * cpu_s / count)


@contextmanager
def _dashboard(folder: Path, own: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The dashboard as a process of its own; prints when its first page came."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tools.dashboard", "--dataset", str(folder)]
    command += ["--own", str(own), "--port", str(port)]
    (own / folder.name).mkdir(parents=True, exist_ok=True)
    ready = folder / "own" / SEARCH_FILE
    if ready.is_file() and not (own / folder.name / SEARCH_FILE).exists():
        shutil.copyfile(ready, own / folder.name / SEARCH_FILE)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                _get(url)
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError("the dashboard ended; see its message above") from None
                time.sleep(0.02)
        print(f"first page {time.perf_counter() - started:.2f} s after the start of the process")
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        body: bytes = answer.read()
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.dashboard_load")
    parser.add_argument("what", choices=["first", "load"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="of load")
    options = parser.parse_args()
    if options.what == "first":
        first(options.folder)
    else:
        load(options.folder, options.seconds)


if __name__ == "__main__":
    main()
