"""What became of the data: quality_report.json, clean_dataset.csv, defective_samples.csv,
metadata.jsonl, the summary.

What is counted is the label file, and each stands in exactly one status: the totals are asserted
to add up, per category and in all. All files are made in one pass over the catalog, a row at a
time, whatever its size.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loader.files import atomic_file, write_atomic
from loader.manifest import ShardInfo
from loader.shape import Bucket
from shardgen.catalog.catalog import Catalog, CatalogError
from shardgen.catalog.tables import ACCEPTED, FINAL
from shardgen.config import ShardgenConfig
from shardgen.media.probe import Probe
from shardgen.report.figures import Check, Figures, against_targets, metadata_line

REPORT_FILE, METADATA_FILE = "quality_report.json", "metadata.jsonl"
CLEAN_FILE, DEFECTIVE_FILE = "clean_dataset.csv", "defective_samples.csv"
CLEAN_COLUMNS = (
    "label",
    "media",
    "clip_id",
    "media_type",
    "category",
    "programme",
    "split",
    "num_samples",
    "flags",
    "declared_size",
    "probed_size",
    "scale_factor",
    "probed_fps",
    "probed_duration_s",
    "prompt",
)
DEFECTIVE_COLUMNS = (
    "label",
    "clip_id",
    "media_type",
    "category",
    "status",
    "reason",
    "detail",
    "byte_offset",
    "declared",
    "probed",
)
_decode_probe = msgspec.json.Decoder(Probe).decode
REACHED = {True: "reached", False: "missed", None: ""}
# (category, status, reason, label files), as catalog.buckets gives them
Counts = Sequence[tuple[str, str, str, int]]


def write_reports(
    catalog: Catalog, config: ShardgenConfig, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Write the four files into the output folder; returns what quality_report.json holds. Raises
    OSError.
    """
    output, root = Path(config.output), Path(config.labels.root)
    sizes: Counter[tuple[str, str]] = Counter()
    lengths_s: Counter[int] = Counter()
    flags: Counter[str] = Counter()
    splits: Counter[tuple[str, str]] = Counter()
    programmes: dict[str, set[str]] = {"train": set(), "val": set()}
    figures = Figures()
    with (
        atomic_file(output / CLEAN_FILE) as clean_file,
        atomic_file(output / DEFECTIVE_FILE) as defective_file,
        atomic_file(output / METADATA_FILE) as metadata_file,
    ):
        clean_file.write(csv_row(CLEAN_COLUMNS))
        defective_file.write(csv_row(DEFECTIVE_COLUMNS))
        for row in catalog.clips():
            probe = _decode_probe(row["probe"]) if row["probe"] else None
            if row["media_xxh3"]:
                figures.add_media(row, probe)
            if probe:
                sizes[_declared_size(row), f"{probe.width_px}x{probe.height_px}"] += 1
            label = str((root / row["label"]).resolve())
            if row["status"] != ACCEPTED:
                defective_file.write(
                    csv_row((label, *(row[name] for name in DEFECTIVE_COLUMNS[1:])))
                )
            else:
                assert probe is not None
                windows = catalog.clip_windows(row["id"])
                prompts = list(dict.fromkeys(window.prompt for window in windows))
                bucket = Bucket.parse(windows[0].bucket)
                factor = probe.fit(bucket, config.windows.fit).factor
                figures.add_accepted(probe, prompts)
                lengths_s[int(probe.duration_s)] += probe.media_type == "video"
                flags.update(row["flags"].split())
                splits[row["category"], row["split"]] += 1
                programmes[row["split"]].add(row["programme"])
                clean_file.write(
                    csv_row(
                        (
                            label,
                            _media(catalog, row),
                            row["clip_id"],
                            row["media_type"],
                            row["category"],
                            row["programme"],
                            row["split"],
                            row["num_windows"],
                            row["flags"],
                            _declared_size(row),
                            f"{probe.width_px}x{probe.height_px}",
                            round(factor, 4),
                            probe.fps,
                            probe.duration_s,
                            "\n".join(prompts),
                        )
                    )
                )
                line = metadata_line(row, catalog.label(row["id"]), probe, prompts)
                metadata_file.write(msgspec.json.encode(line) + b"\n")
            advance(1)
    report = quality_report(catalog.buckets(), catalog.count(), catalog.finished_shards())
    report["programmes"] = {
        **{split: len(names) for split, names in programmes.items()},
        "on_both_sides": sorted(programmes["train"] & programmes["val"]),
    }
    for name, counts in report["categories"].items():
        counts |= {f"accepted_{split}": splits[name, split] for split in programmes}
    report["flags"] = dict(sorted(flags.items()))
    report["declared_against_probed_size"] = [
        {"declared": declared, "probed": probed, "clips": count}
        for (declared, probed), count in sizes.most_common()
    ]
    report["accepted_videos_by_whole_seconds"] = {
        str(length): lengths_s[length] for length in sorted(+lengths_s)
    }
    report["checks"] = against_targets(figures.checks(), config.report.targets)
    write_atomic(
        output / REPORT_FILE, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
    )
    return report


def _media(catalog: Catalog, row: Any) -> str:
    """Where the clip's footage lies; its URL if the cache has let it go since."""
    try:
        return str(catalog.media_path(row["media_xxh3"]).resolve())
    except CatalogError:
        return str(row["url"])


def _declared_size(row: Any) -> str:
    return (
        f"{row['declared_width_px']}x{row['declared_height_px']}"
        if row["declared_width_px"]
        else "unknown"
    )


def csv_row(values: Sequence[object]) -> bytes:
    """One row, UTF-8, quoted where it has to be, so that newlines and quotes in captions
    survive.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)
    return text.getvalue().encode()


def quality_report(
    counts: Counts, num_labels: int, shards: Sequence[tuple[str, ShardInfo]]
) -> dict[str, Any]:
    """Counts of label files by category, status and reason, and of samples by split and shape."""
    check_totals(counts, num_labels)
    categories: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for category, status, reason, count in counts:
        categories.setdefault(category, Counter())[status] += count
        if reason:
            reasons.setdefault(status, Counter())[reason] += count
    samples: dict[str, Counter[str]] = {}
    for split, info in shards:
        samples.setdefault(split, Counter())[info.bucket] += info.num_samples
    return {
        "label_files": num_labels,
        "statuses": {status: sum(each[status] for each in categories.values()) for status in FINAL},
        "categories": {
            name: {**{status: each[status] for status in FINAL}, "total": each.total()}
            for name, each in sorted(categories.items())
        },
        "reasons": {status: dict(each.most_common()) for status, each in sorted(reasons.items())},
        "samples": {split: dict(sorted(each.items())) for split, each in sorted(samples.items())},
    }


def check_totals(counts: Counts, num_labels: int) -> None:
    """Every label file stands in exactly one status, and a build has left none on its way."""
    total = sum(count for *_, count in counts)
    assert total == num_labels, f"{total} label files in buckets, {num_labels} in the catalog"
    unsettled = {status for _, status, _, _ in counts} - set(FINAL)
    assert not unsettled, f"label files left in {sorted(unsettled)}"


def summary(report: dict[str, Any], shards: Sequence[tuple[str, ShardInfo]]) -> str:
    """The end of a build: a table of label files per category and status, the reasons, and what
    was written.
    """
    statuses = [status for status in FINAL if report["statuses"][status]]
    rows = [["category", *statuses, "total"]]
    for name, counts in report["categories"].items():
        rows.append(
            [name or "(none)", *(str(counts[status]) for status in statuses), str(counts["total"])]
        )
    rows.append(
        [
            "total",
            *(str(report["statuses"][status]) for status in statuses),
            str(report["label_files"]),
        ]
    )
    lines = ["", table(rows), ""]
    for status, reasons in report["reasons"].items():
        lines.append(
            f"{status}: " + ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        )
    both = report["programmes"]["on_both_sides"]
    lines.append(
        f"programmes: {report['programmes']['train']} in train, {report['programmes']['val']} in val, "
        f"{f'ON BOTH SIDES: {both}' if both else 'none on both sides'}"
    )
    for split, counts in report["samples"].items():
        of_split = [info for side, info in shards if side == split]
        shapes = ", ".join(f"{bucket} {count}" for bucket, count in counts.items())
        lines.append(
            f"{split}: {sum(counts.values())} samples ({shapes}) in {len(of_split)} shards, "
            f"{sum(info.bytes for info in of_split) / 1e6:.1f} MB"
        )
    return "\n".join(lines)


def status_line(counts: Counts) -> str:
    """Label files per status, on one line: where a build stands between two stages."""
    statuses: Counter[str] = Counter()
    for _, status, _, count in counts:
        statuses[status] += count
    return f"{statuses.total()} label files: " + ", ".join(
        f"{name} {count}" for name, count in statuses.most_common()
    )


def summary_of_checks(checks: Sequence[Check]) -> str:
    """The figures as a table."""
    return table(
        [
            ["check", "value", "", "target", "", "n"],
            *(
                [
                    check.name,
                    str(check.value),
                    "" if isinstance(check.value, str) else check.unit,
                    check.target,
                    REACHED[check.reached],
                    str(check.sample_size),
                ]
                for check in checks
            ),
        ]
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned; Hangul is two cells wide in a terminal."""

    def width(text: str) -> int:
        return len(text) + sum("\u1100" <= character <= "\uffdc" for character in text)

    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0]
        + " " * (widths[0] - width(row[0]))
        + "".join(
            "  " + " " * (size - width(cell)) + cell
            for cell, size in zip(row[1:], widths[1:], strict=True)
        )
        for row in rows
    )
