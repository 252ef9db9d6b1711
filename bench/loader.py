"""How fast samples come: `python -m bench.loader [--shape 1280x704x49] [--rounds 5] [--peers
PYTHON] [--only NAME]`.

Every subject gives the same two tensors per sample in this machine's memory: the latent, and the
text padded to 512 rows; the consumer copies both once, as a trainer does to its device, so that
nothing lazy goes uncounted. Subjects: our feed; the limit, which is pread, zstd (with its
checksum and without) and one copy in as many threads, without hashes, order, merged planes or
padding; webdataset, litdata and mosaicml-streaming under a torch DataLoader at their best of 0, 1
and 2 workers. Every run is a process of its own; the subjects take turns, `--rounds` times.
PYTHON is an interpreter that has litdata and mosaicml-streaming installed (they pin many
packages, so they are no dependency); without it they are left out, and standard error says so.
Before each run the files are read into the page cache, or, "cold", dropped from it; "http" reads
from a server on loopback.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local

import numpy as np
import torch
import zstandard

from bench import loader_peers as peers
from loader.order import Order
from loader.pinned import HostMemory
from loader.sample import without_checksum
from loader.shard import open_shard
from loader.store import read_dataset
from tools.fake.batch import write_synthetic_dataset
from tools.fake.feed import make_feed

NUM_THREADS = 2
CPU = torch.device("cpu")
WARM_UP = 8  # samples before the clock of the rate starts


def feed_samples(
    location: str, num_threads: int = NUM_THREADS, device: torch.device = CPU, num_epochs: int = 1
) -> Iterator[peers.Pair]:
    feed = make_feed(
        location,
        global_batch=1,
        i2v_share=0.4,
        caption_dropout=0.0,
        device=device,
        num_threads=num_threads,
        max_ahead=2 * num_threads,
    )
    with feed:
        for _ in range(num_epochs * feed.num_batches_per_epoch):
            batch, _ = next(feed)
            yield batch.latent_BCTHW[0], batch.text_BSD[0]


def limit_samples(
    location: str,
    num_threads: int = NUM_THREADS,
    device: torch.device = CPU,
    num_epochs: int = 1,
    checksum: bool = True,
) -> Iterator[peers.Pair]:
    """pread, zstd and one copy of every tensor member, in the feed's order. The planes stay as
    they are.

    On a GPU the one copy goes from pinned memory to it, on a side stream, as the feed's does.
    Without `checksum` zstd leaves that out, as it does in the feed.
    """
    store, manifest = read_dataset(location)
    shards = manifest.splits["train"]
    order = Order([shards], seed=0, global_batch=1)
    opened = [open_shard(store, "train", shard) for shard in shards]
    files = [
        os.open(Path(location) / "train" / f"{shard.name}.tar", os.O_RDONLY) for shard in shards
    ]
    thread, memory = local(), HostMemory(device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def job(n: int) -> tuple[torch.Tensor, ...]:
        if not hasattr(thread, "stored"):
            thread.stored, thread.planes = bytearray(1 << 25), bytearray(1 << 25)
        batch, tensors = order.batch(n), []
        shard = int(batch.shard_G[0])
        for name, offset, size in opened[shard].samples[batch.position_G[0]]:
            if name.endswith(".zst"):
                stored = memoryview(thread.stored)[:size]
                os.preadv(files[shard], [stored], offset)
                num_bytes = zstandard.frame_content_size(stored)
                if stream is not None:
                    pinned = memory.empty((num_bytes,), torch.uint8)
                planes = (pinned.numpy().data if stream is not None else memoryview(thread.planes))[
                    :num_bytes
                ]
                frame = stored if checksum else without_checksum(stored)
                with zstandard.ZstdDecompressor().stream_reader(frame) as source:
                    source.readinto(planes)
                if stream is not None:
                    with torch.cuda.stream(stream):
                        tensors.append(pinned.to(device, non_blocking=True))
                else:
                    tensors.append(memory.empty((num_bytes,), torch.uint8))
                    tensors[-1].numpy()[:] = np.frombuffer(planes, np.uint8)
        return tuple(tensors)

    ahead, num = 2 * num_threads, num_epochs * order.batches_per_epoch[0]
    with ThreadPoolExecutor(num_threads) as pool:
        pending = deque(pool.submit(job, n) for n in range(ahead))
        for n in range(ahead, num + ahead):
            latent, text = pending.popleft().result()
            if n < num:
                pending.append(pool.submit(job, n))
            yield latent, text


def samples(subject: str, location: str) -> Iterator[peers.Pair]:
    name, _, workers = subject.partition(":")
    match name:
        case "ours":
            return feed_samples(location)
        case "limit":
            return limit_samples(location, checksum=workers != "unchecked")
        case "webdataset":
            return peers.webdataset_samples(location, int(workers))
        case "plain":
            return peers.webdataset_samples(location, int(workers), plain=True)
        case "litdata":
            return peers.litdata_samples(Path(location + ".litdata"), int(workers))
        case "mosaic":
            return peers.mosaic_samples(Path(location + ".mosaic"), int(workers))
    raise SystemExit(f"no subject {subject}")


def measure(subject: str, location: str) -> dict[str, float]:
    """One epoch in this process: rate, bytes of tensors handed out, CPU, time to the first
    sample, memory.
    """
    torch.set_num_threads(1)
    begin_s = time.perf_counter()
    num = num_bytes = 0
    start_s = first_s = cpu_s = 0.0
    staging = torch.empty(1 << 24, dtype=torch.uint8)
    for pair in samples(subject, location):
        num += 1
        for tensor in pair:
            staging[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
        if num == 1:
            first_s = time.perf_counter() - begin_s
        if num == WARM_UP:
            start_s, cpu_s = time.perf_counter(), _cpu_s()
        if num > WARM_UP:
            num_bytes += sum(tensor.nbytes for tensor in pair)
    elapsed_s = time.perf_counter() - start_s
    num -= WARM_UP
    peak_kib = sum(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "samples_per_s": num / elapsed_s,
        "bytes_per_s": num_bytes / elapsed_s,
        "num": num,
        "cpu_ms_per_sample": (_cpu_s() - cpu_s) / num * 1e3,
        "first_s": first_s,
        "peak_mib": peak_kib / 1024,
    }


def _cpu_s() -> float:
    return sum(os.times()[:4])


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(folder: Path) -> None:
    """The dataset's files and its forms for the other libraries: the cold runs have thrown out
    all of them.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def run(python: str, subject: str, location: str, folder: Path, cold: bool) -> dict[str, float]:
    (drop_from_cache if cold else read_into_cache)(folder)
    command = [python, "-m", "bench.loader", "--measure", subject, "--location", location]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{subject}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(subjects: list[tuple[str, str, str, bool]], folder: Path, num_rounds: int) -> None:
    """Run (label, subject, location, cold) in turns and print medians, least and most."""
    results: dict[str, list[dict[str, float]]] = {label: [] for label, *_ in subjects}
    for i in range(num_rounds):
        for label, subject, location, cold in subjects:
            python = (
                arguments.peers if subject.startswith(("litdata", "mosaic")) else sys.executable
            )
            results[label].append(run(python, subject, location, folder, cold))
            print(
                f"round {i + 1}: {label}: {results[label][-1]['samples_per_s']:.1f} samples/s",
                file=sys.stderr,
            )
    print(
        "| subject | samples/s: median (least to most) | MB/s of tensors | CPU ms/sample | "
        "first sample s | peak MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for label, runs in results.items():
        rates = [result["samples_per_s"] for result in runs]
        middle = {key: statistics.median(result[key] for result in runs) for key in runs[0]}
        print(
            f"| {label} | {middle['samples_per_s']:.1f} ({min(rates):.1f} to {max(rates):.1f}) | "
            f"{middle['bytes_per_s'] / 1e6:.0f} | {middle['cpu_ms_per_sample']:.1f} | "
            f"{middle['first_s']:.2f} | {middle['peak_mib']:.0f} |"
        )


def main() -> None:
    folder = arguments.folder / arguments.shape
    location = str(folder / "data")
    if not (folder / "data" / "manifest.json").exists():
        write_synthetic_dataset(
            folder / "data",
            {arguments.shape: arguments.samples},
            samples_per_shard=32,
            text_dim=4096,
        )
    subjects = [
        ("ours", "ours", location, False),
        ("limit", "limit", location, False),
        ("limit without zstd's checksum", "limit:unchecked", location, False),
    ]
    subjects += [
        (f"webdataset, {n} workers", f"webdataset:{n}", location, False) for n in (0, 1, 2)
    ]
    subjects.append(("webdataset, plain codec, 0 workers", "plain:0", location, False))
    if arguments.peers:
        for name, write in (("litdata", "write_litdata"), ("mosaic", "write_mosaic")):
            if not Path(f"{location}.{name}").exists():
                code = (
                    "import sys; from pathlib import Path; "
                    "from bench import loader_peers as peers; "
                    f"peers.{write}(*map(Path, sys.argv[1:]))"
                )
                subprocess.run(
                    [arguments.peers, "-c", code, location, f"{location}.{name}"], check=True
                )
            subjects += [
                (f"{name}, {n} workers", f"{name}:{n}", location, False) for n in (0, 1, 2)
            ]
    else:
        print("litdata and mosaicml-streaming: left out, no --peers", file=sys.stderr)
    subjects += [("ours, cold", "ours", location, True)]
    subjects += [
        (f"{name}, 0 workers, cold", f"{name}:0", location, True)
        for name in ("webdataset", "litdata", "mosaic")
        if arguments.peers or name == "webdataset"
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "bench.range_server", str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = f"{server.stdout.readline().strip()}/data"
        subjects += [
            ("ours, http", "ours", url, False),
            ("webdataset, 0 workers, http", "webdataset:0", url, False),
        ]
        subjects = [entry for entry in subjects if arguments.only in entry[0]]
        report(subjects, folder, arguments.rounds)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_loader"))
    parser.add_argument("--shape", default="1280x704x49")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", metavar="PYTHON", default="")
    parser.add_argument(
        "--only", metavar="NAME", default="", help="subjects whose name contains this"
    )
    parser.add_argument(
        "--measure", metavar="SUBJECT", help="one run in this process (the benchmark calls itself)"
    )
    parser.add_argument("--location")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.location)))
    else:
        main()
