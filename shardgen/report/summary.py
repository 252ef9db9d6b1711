"""What became of the data, as tables in a terminal."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from loader.manifest import ShardInfo
from shardgen.catalog.rows import StatusCount
from shardgen.catalog.tables import FINAL
from shardgen.report.figures import Check

_REACHED = {True: "reached", False: "missed", None: ""}


def summary(report: dict[str, Any], shards: Sequence[tuple[str, ShardInfo]]) -> str:
    """The end of a build: a table of label files per category and status, the reasons, and what
    was written.
    """
    statuses = [status for status in FINAL if report["statuses"][status]]
    # Label files per category and status; a status that none has gets no column.
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
    # Why, and what was written.
    for status, reasons in report["reasons"].items():
        lines.append(
            f"{status}: " + ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        )
    programmes = report["programmes"]
    both = programmes["on_both_sides"]
    lines.append(
        f"programmes: {programmes['train']} in train, {programmes['val']} in val, "
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


def status_line(counts: Sequence[StatusCount]) -> str:
    """Label files per status, on one line: where a build stands between two stages."""
    statuses: Counter[str] = Counter()
    for count in counts:
        statuses[count.status] += count.num_labels
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
                    _REACHED[check.reached],
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
