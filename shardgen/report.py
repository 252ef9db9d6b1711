"""What became of the data: quality_report.json, clean_dataset.csv, defective_samples.csv, and the summary of a build.

What is counted is the label file, and each stands in exactly one status: the totals are asserted to add up, per
category and in all. Both tables are made in one pass over the catalog, a row at a time, whatever its size.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loader.manifest import ShardInfo
from shardgen.catalog import Catalog
from shardgen.media import Probe
from shardgen.tables import ACCEPTED, FINAL
from shardgen.write import atomic_file, write_atomic

REPORT_FILE, CLEAN_FILE, DEFECTIVE_FILE = "quality_report.json", "clean_dataset.csv", "defective_samples.csv"
CLEAN_COLUMNS = ("label", "media", "clip_id", "media_type", "category", "programme", "split", "num_samples", "flags",
                 "declared_size", "probed_size", "probed_fps", "probed_duration_s", "prompt")
DEFECTIVE_COLUMNS = ("label", "clip_id", "media_type", "category", "status", "reason", "detail", "byte_offset",
                     "declared", "probed")
_probe_decoder = msgspec.json.Decoder(Probe)
Buckets = Sequence[tuple[str, str, str, int]]


def write_reports(catalog: Catalog, output: Path, root: Path, advance: Callable[[int], None]) -> None:
    """Write the three files into `output`. Raises OSError."""
    sizes: Counter[tuple[str, str]] = Counter()
    lengths_s: Counter[int] = Counter()
    with atomic_file(output / CLEAN_FILE) as clean_file, atomic_file(output / DEFECTIVE_FILE) as defective_file:
        clean = csv.writer(clean_text := io.TextIOWrapper(clean_file, "utf-8", newline="", write_through=True))
        defective = csv.writer(
            defective_text := io.TextIOWrapper(defective_file, "utf-8", newline="", write_through=True))
        clean.writerow(CLEAN_COLUMNS)
        defective.writerow(DEFECTIVE_COLUMNS)
        for row in catalog.clips():
            label = str((root / row["label"]).resolve())
            if row["status"] == ACCEPTED:
                probe = _probe_decoder.decode(row["probe"])
                declared = f"{row['declared_width_px']}x{row['declared_height_px']}"
                probed = f"{probe.width_px}x{probe.height_px}"
                sizes[declared, probed] += 1
                lengths_s[int(probe.duration_s)] += 1
                prompts = dict.fromkeys(window.prompt for window in catalog.clip_windows(row["id"]))
                clean.writerow((label, catalog.media_path(row["media_xxh3"]).resolve(), row["clip_id"],
                                row["media_type"], row["category"], row["programme"], row["split"],
                                row["num_windows"], row["flags"], declared, probed, probe.fps, probe.duration_s,
                                "\n".join(prompts)))
            else:
                defective.writerow((label, *(row[name] for name in DEFECTIVE_COLUMNS[1:])))
            advance(1)
        clean_text.detach()
        defective_text.detach()
    report = quality_report(catalog.buckets(), catalog.count(), catalog.finished_shards())
    report["declared_against_probed_size"] = [{"declared": declared, "probed": probed, "clips": count}
                                              for (declared, probed), count in sorted(sizes.items())]
    report["clips_by_whole_seconds"] = {str(seconds): count for seconds, count in sorted(lengths_s.items())}
    write_atomic(output / REPORT_FILE, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def quality_report(buckets: Buckets, num_labels: int, shards: Sequence[tuple[str, ShardInfo]]) -> dict[str, Any]:
    """Counts of label files by category, status and reason, and of samples by split and shape."""
    check_totals(buckets, num_labels)
    categories: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for category, status, reason, count in buckets:
        categories.setdefault(category, Counter())[status] += count
        if reason:
            reasons.setdefault(status, Counter())[reason] += count
    samples: dict[str, Counter[str]] = {}
    for split, info in shards:
        samples.setdefault(split, Counter())[info.bucket] += info.num_samples
    return {"label_files": num_labels,
            "statuses": {status: sum(counts[status] for counts in categories.values()) for status in FINAL},
            "categories": {name: {**{status: counts[status] for status in FINAL}, "total": counts.total()}
                           for name, counts in sorted(categories.items())},
            "reasons": {status: dict(sorted(counts.items())) for status, counts in sorted(reasons.items())},
            "samples": {split: dict(sorted(counts.items())) for split, counts in sorted(samples.items())}}


def check_totals(buckets: Buckets, num_labels: int) -> None:
    """Every label file stands in exactly one status, and a build has left none on its way."""
    total = sum(count for *_, count in buckets)
    assert total == num_labels, f"{total} label files in buckets, {num_labels} in the catalog"
    unsettled = {status for _, status, _, _ in buckets} - set(FINAL)
    assert not unsettled, f"label files left in {sorted(unsettled)}"


def summary(buckets: Buckets, num_labels: int, shards: Sequence[tuple[str, ShardInfo]]) -> str:
    """The end of a build: a table of label files per category and status, the reasons, and what was written."""
    report = quality_report(buckets, num_labels, shards)
    statuses = [status for status in FINAL if report["statuses"][status]]
    rows = [["category", *statuses, "total"]]
    for name, counts in report["categories"].items():
        rows.append([name or "(none)", *(str(counts[status]) for status in statuses), str(counts["total"])])
    rows.append(["total", *(str(report["statuses"][status]) for status in statuses), str(num_labels)])
    lines = ["", _table(rows), ""]
    for status, reasons in report["reasons"].items():
        lines.append(f"{status}: " + ", ".join(f"{reason} {count}" for reason, count in reasons.items()))
    for split, counts in report["samples"].items():
        of_split = [info for side, info in shards if side == split]
        shapes = ", ".join(f"{bucket} {count}" for bucket, count in counts.items())
        lines.append(f"{split}: {sum(counts.values())} samples ({shapes}) in {len(of_split)} shards, "
                     f"{sum(info.bytes for info in of_split) / 1e6:.1f} MB")
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> str:
    """Columns aligned; Hangul is two cells wide in a terminal."""
    def width(text: str) -> int:
        return len(text) + sum("\u1100" <= character <= "\uffdc" for character in text)

    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0] + " " * (widths[0] - width(row[0])) + "".join(
            "  " + " " * (size - width(cell)) + cell for cell, size in zip(row[1:], widths[1:], strict=True))
        for row in rows)
