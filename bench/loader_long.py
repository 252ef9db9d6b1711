"""What only size and time show of the loader: `python -m bench.loader_long [--samples 1000000]
[--batches 100000]`.

start   a dataset of a million samples (10,000 names for one small shard of 100): seconds from
        nothing to the first batch, and from a fresh feed by load_state_dict to the batch in the
        middle of the epoch; each in a new process
memory  resident memory over 100,000 batches of 64x32x1
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from loader.feed import Feed
from loader.manifest import MANIFEST_FILE, Manifest, encode_manifest, read_manifest
from tools.fake.batch import write_synthetic_dataset
from tools.fake.feed import make_feed

BUCKET, SHARD_SAMPLES, GLOBAL_BATCH = "64x32x1", 100, 24


def long_feed(folder: Path) -> Feed:
    return make_feed(
        folder,
        global_batch=GLOBAL_BATCH,
        world_size=8,
        i2v_share=0.4,
        caption_dropout=0.1,
    )


def write_many(folder: Path, num_samples: int) -> None:
    """One shard of 100 samples under so many names that they make `num_samples`."""
    write_synthetic_dataset(
        folder, {BUCKET: SHARD_SAMPLES}, samples_per_shard=SHARD_SAMPLES, text_dim=8
    )
    manifest = read_manifest(folder)
    (one,) = manifest.splits["train"]
    names = [f"{one.name[:-6]}{i:06d}" for i in range(num_samples // SHARD_SAMPLES)]
    for name in names[1:]:
        for suffix in (".tar", ".idx", ".xxh3"):
            os.link(folder / "train" / (one.name + suffix), folder / "train" / (name + suffix))
    shards = [msgspec.structs.replace(one, name=name) for name in names]
    (folder / MANIFEST_FILE).write_bytes(
        encode_manifest(
            Manifest(recipe=manifest.recipe, recipe_id=manifest.recipe_id, splits={"train": shards})
        )
    )


def start_s(folder: Path, from_batch: int) -> float:
    begin_s = time.perf_counter()
    with long_feed(folder) as feed:
        if from_batch:
            feed.load_state_dict(
                json.loads(json.dumps(feed.state_dict() | {"batches": from_batch}))
            )
        batch, _ = next(feed)
        assert batch.index == from_batch
        return time.perf_counter() - begin_s


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_many(folder, arguments.samples)
        middle = arguments.samples // GLOBAL_BATCH // 2
        seconds: dict[int, list[float]] = {0: [], middle: []}
        for _ in range(arguments.rounds):
            for batch, runs in seconds.items():
                # imports are done before the clock starts
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    runs.append(pool.apply(start_s, (folder, batch)))
        for batch, runs in seconds.items():
            print(
                f"to batch {batch} of {arguments.samples} samples: {statistics.median(runs):.2f} s "
                f"({min(runs):.2f} to {max(runs):.2f}, n = {len(runs)})",
                flush=True,
            )
        with long_feed(folder) as feed:
            for i in range(arguments.batches + 1):
                next(feed)
                if i in (
                    arguments.batches // 20,
                    *range(0, arguments.batches + 1, arguments.batches // 4),
                ):
                    print(f"after {i} batches: {resident_mib():.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
