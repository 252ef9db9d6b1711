"""How fast labels get into the catalog: `python -m bench.ingest [--labels 455648] [--rounds 1]`.

Writes a tree of labels of the users' size and traps, then runs, in turn and several times: the
loop that a script would be (json.load, csv.writer, the same fields, one process), our ingest, our
ingest over the unchanged tree, and our ingest of a tree of a quarter of the size. Page cache
warm: the files were just written or read. Prints medians, spread and the three claims: the rate,
the factor over the loop, and linearity. A virtual machine may have less than it shows as cores:
what one busy process per core gets is measured before and after each ingest, because a rate means
little without it.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.label_tree import write_label_tree
from shardgen.catalog.catalog import Catalog
from shardgen.stages.ingest import ingest_labels


def json_csv_loop(root: Path, out: Path) -> None:
    """The baseline: every field that the catalog holds, one csv row per label."""
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8") as label_file:
                    label = json.load(label_file)
                source, raw = label["source_data_info"], label["raw_data_info"]
                generated, captions = (
                    source["ai_generated_info"],
                    label["labeling_data_info"]["caption_info"],
                )
                media = raw["source_media_info"]
                writer.writerow(
                    [
                        path,
                        source["clip_id"],
                        media["media_type"],
                        generated["mid_category"],
                        source["source_mbc"],
                        source["broadcast_date"],
                        source["clip_proxy_url"],
                        source["clip_proxy_thumbnail_url"],
                        generated["keyword"],
                        generated["stt_script"],
                        [
                            (s["description"], s["tc_in"], s["tc_out"])
                            for s in generated["scene_description_auto"]
                        ],
                        [(c["text"], c["tc_in"], c["tc_out"]) for c in captions["object_level"]],
                        [c["text"] for c in captions["semantic_level"]],
                        [c["text"] for c in captions["application_level"]],
                        media["resolution"] or raw["raw_data_info"]["basic_info"]["resolution"],
                        media["details"].get("length"),
                        media["details"].get("frame_rate"),
                    ]
                )


def ingest(root: Path, database: Path, num_labels: int) -> None:
    with Catalog(database) as catalog:
        ingest_labels(catalog, root)
        if catalog.count("ingested") != num_labels:
            raise SystemExit(
                f"the catalog holds {catalog.count('ingested')} of {num_labels} labels"
            )


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and seconds of CPU in this process and its children."""
    start, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    return time.perf_counter() - start, sum(after[:4]) - sum(before[:4])


def cores_given(num_cores: int) -> float:
    """What as many busy processes get of `num_cores` cores: their CPU seconds per second by the
    clock.
    """
    command = [sys.executable, "-c", "for _ in range(8_000_000): pass"]

    def count() -> None:
        busy = [subprocess.Popen(command) for _ in range(num_cores)]
        if any(process.wait() for process in busy):
            raise SystemExit("a process that only counts has failed")

    wall_s, cpu_s = timed(count)
    return cpu_s / wall_s


def spread(values: Sequence[float], digits: str = ".2f") -> str:
    """ "median (least to most)"."""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:{digits}} ({least:{digits}} to {most:{digits}})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Labels per second into the catalog.")
    parser.add_argument("--labels", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where to write the tree (default: a temporary folder)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        run(Path(name), options.labels, options.rounds)


def run(folder: Path, num_labels: int, rounds: int) -> None:
    trees = {num_labels: folder / "labels", num_labels // 4: folder / "quarter"}
    for size, root in trees.items():
        write_label_tree(root, size)
        json_csv_loop(root, folder / "loop.csv")  # warms the page cache
    measured: dict[str, list[tuple[float, float]]] = {
        "loop": [],
        "ingest": [],
        "unchanged": [],
        "quarter": [],
    }
    database = folder / "catalog.sqlite"
    cores = len(os.sched_getaffinity(0))
    given = []
    for _ in range(rounds):
        measured["loop"].append(
            timed(lambda: json_csv_loop(trees[num_labels], folder / "loop.csv"))
        )
        for name, size in (("quarter", num_labels // 4), ("ingest", num_labels)):
            for path in folder.glob("catalog.sqlite*"):
                path.unlink()
            before = cores_given(cores)
            measured[name].append(timed(lambda size=size: ingest(trees[size], database, size)))  # type: ignore[misc]
        given.append((before + cores_given(cores)) / 2)
        rate = num_labels / measured["ingest"][-1][0]
        print(f"  given {given[-1]:.2f} cores: ingest {rate:,.0f} labels/s", flush=True)
        measured["unchanged"].append(timed(lambda: ingest(trees[num_labels], database, num_labels)))
    seconds = {name: [wall_s for wall_s, _ in runs] for name, runs in measured.items()}
    print(
        f"{num_labels} labels, {cores} cores (given {spread(given)}), {rounds} interleaved rounds; "
        f"median (least to most)"
    )
    for name, size in (
        ("loop", num_labels),
        ("ingest", num_labels),
        ("unchanged", num_labels),
        ("quarter", num_labels // 4),
    ):
        rates = [size / each for each in seconds[name]]
        cpu_us = 1e6 * statistics.median(cpu_s for _, cpu_s in measured[name]) / size
        print(
            f"  {name:<10} {spread(rates, ',.0f')} labels/s, "
            f"{statistics.median(seconds[name]):.2f} s, CPU {cpu_us:.1f} us/label"
        )
    factors = [loop / ours for loop, ours in zip(seconds["loop"], seconds["ingest"], strict=True)]
    growth = [
        full / quarter for full, quarter in zip(seconds["ingest"], seconds["quarter"], strict=True)
    ]
    print(f"  factor over the loop {spread(factors)}")
    print(f"  time for four times the labels {spread(growth)}")
    parent, child = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(
        f"  memory at most {(parent + cores * child) / 2**10:.0f} MiB: the parent's peak "
        f"{parent / 2**10:.0f}, and {cores} workers of at most {child / 2**10:.0f}"
    )
    print(f"  catalog {database.stat().st_size / num_labels:.0f} bytes per label")


if __name__ == "__main__":
    main()
