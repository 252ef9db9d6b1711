"""What became of the data, as files: quality_report.json, clean_dataset.csv,
defective_samples.csv, metadata.jsonl.

What is counted is the label file, and each stands in exactly one status: the totals are asserted
to add up, per category and in all. All files are made in one pass over the catalog, a row at a
time, whatever its size.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loader.files import atomic_file, write_atomic
from loader.manifest import ShardInfo
from loader.shape import Bucket
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.database import CatalogError
from shardgen.catalog.rows import Clip, StatusCount
from shardgen.catalog.tables import ACCEPTED, FINAL
from shardgen.labels.parse import Label
from shardgen.media.geometry import Fitting
from shardgen.media.probe import Probe
from shardgen.report.config import TargetsConfig
from shardgen.report.figures import Figures, against_targets
from shardgen.report.spreadsheet import csv_header, csv_row
from shardgen.rules.windows import Window

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


def write_reports(
    catalog: Catalog,
    output: Path,
    root: Path,
    fit: Fitting,
    targets: TargetsConfig,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Write the four files into `output`; returns what quality_report.json holds. `root` is the
    label tree. Raises OSError.
    """
    figures = Figures()
    with (
        atomic_file(output / CLEAN_FILE) as clean_file,
        atomic_file(output / DEFECTIVE_FILE) as defective_file,
        atomic_file(output / METADATA_FILE) as metadata_file,
    ):
        clean_file.write(csv_header(CLEAN_COLUMNS))
        defective_file.write(csv_header(DEFECTIVE_COLUMNS))
        # One pass: each clip goes into the figures and into one of the two tables.
        for clip in catalog.clips():
            figures.add(clip)
            label_path = str((root / clip.label).resolve())
            if clip.status != ACCEPTED:
                defective_file.write(csv_row(DEFECTIVE_COLUMNS, _defective(clip, label_path)))
            else:
                assert clip.probe is not None, f"{clip.label} is accepted without a probe"
                windows = catalog.shards.windows_of(clip.id)
                prompts = list(dict.fromkeys(window.prompt for window in windows))
                figures.add_accepted(clip, clip.probe, prompts)
                values = _clean(clip, clip.probe, windows[0], fit) | {
                    "label": label_path,
                    "media": _media(catalog, clip),
                    "prompt": "\n".join(prompts),
                }
                clean_file.write(csv_row(CLEAN_COLUMNS, values))
                line = metadata_line(clip, catalog.labels.read(clip.id), clip.probe, prompts)
                metadata_file.write(msgspec.json.encode(line) + b"\n")
            advance(1)
    report = quality_report(catalog.status_counts(), catalog.count(), catalog.shards.finished())
    report |= _measured(figures, targets)
    for name, counts in report["categories"].items():
        counts |= {
            f"accepted_{split}": figures.num_by_split[name, split] for split in figures.programmes
        }
    text = msgspec.json.format(msgspec.json.encode(report), indent=1)
    write_atomic(output / REPORT_FILE, text + b"\n")
    return report


def _clean(clip: Clip, probe: Probe, window: Window, fit: Fitting) -> dict[str, object]:
    """The columns of an accepted clip that come from it alone."""
    return {
        "clip_id": clip.clip_id,
        "media_type": clip.media_type,
        "category": clip.category,
        "programme": clip.programme,
        "split": clip.split,
        "num_samples": clip.num_windows,
        "flags": clip.flags,
        "declared_size": clip.declared_size,
        "probed_size": f"{probe.width_px}x{probe.height_px}",
        "scale_factor": round(probe.fit(Bucket.parse(window.bucket), fit).factor, 4),
        "probed_fps": probe.fps,
        "probed_duration_s": probe.duration_s,
    }


def _defective(clip: Clip, label_path: str) -> dict[str, object]:
    return {
        "label": label_path,
        "clip_id": clip.clip_id,
        "media_type": clip.media_type,
        "category": clip.category,
        "status": clip.status,
        "reason": clip.reason,
        "detail": clip.detail,
        "byte_offset": clip.byte_offset,
        "declared": clip.declared,
        "probed": clip.probed,
    }


def _media(catalog: Catalog, clip: Clip) -> str:
    """Where the clip's footage lies; its URL if the cache has evicted it since."""
    try:
        return str(catalog.media.path(clip.media_xxh3).resolve())
    except CatalogError:
        return clip.url


def metadata_line(clip: Clip, label: Label, probe: Probe, prompts: Sequence[str]) -> dict[str, Any]:
    """A clip as the users' metadata.jsonl has it."""
    return {
        "clip_id": clip.clip_id,
        "video_url": label.url,
        "thumbnail_urls": label.thumbnail_urls,
        "prompt": " ".join(prompts),
        "stt_script": label.stt_script,
        "duration": probe.duration_s,
        "fps": probe.fps,
    }


def _measured(figures: Figures, targets: TargetsConfig) -> dict[str, Any]:
    """The parts of the report that come from the clips one by one."""
    programmes = figures.programmes
    both = sorted(programmes["train"] & programmes["val"])
    seconds = figures.num_by_whole_seconds
    return {
        "programmes": {
            **{split: len(names) for split, names in programmes.items()},
            "on_both_sides": both,
        },
        "flags": dict(sorted(figures.num_by_flag.items())),
        "declared_against_probed_size": [
            {"declared": declared, "probed": probed, "clips": count}
            for (declared, probed), count in figures.num_by_sizes.most_common()
        ],
        "accepted_videos_by_whole_seconds": {
            str(length): seconds[length] for length in sorted(seconds)
        },
        "checks": against_targets(figures.checks(), targets),
    }


def quality_report(
    counts: Sequence[StatusCount], num_labels: int, shards: Sequence[tuple[str, ShardInfo]]
) -> dict[str, Any]:
    """Counts of label files by category, status and reason, and of samples by split and shape."""
    check_totals(counts, num_labels)
    categories: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for count in counts:
        categories.setdefault(count.category, Counter())[count.status] += count.num_labels
        if count.reason:
            reasons.setdefault(count.status, Counter())[count.reason] += count.num_labels
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


def check_totals(counts: Sequence[StatusCount], num_labels: int) -> None:
    """Every label file stands in exactly one status, and none is still on its way."""
    total = sum(count.num_labels for count in counts)
    assert total == num_labels, f"{total} label files in buckets, {num_labels} in the catalog"
    unsettled = {count.status for count in counts} - set(FINAL)
    assert not unsettled, f"label files stay in {sorted(unsettled)}"
