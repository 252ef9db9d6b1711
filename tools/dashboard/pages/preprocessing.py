"""Preprocessing: stages, rates, failures and shards, while a build runs and after it."""

from collections import Counter
from datetime import UTC, datetime
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from shardgen.catalog.tables import FAILED, FINAL, UNAVAILABLE, UNREADABLE
from shardgen.report.progress import BUILD_FILE, BuildRecord
from tools.dashboard.catalog import CatalogView, ShardRow
from tools.dashboard.render import View

# in the order of a build; shardgen.build, which has them too, would bring torch along
STAGES = ("labels", "filter", "fetch", "probe", "plan", "encode", "report")


class StageRow(NamedTuple):
    """A stage as the last record about it says, and how long the rest will take at that rate."""

    record: BuildRecord
    left_s: float | None
    time: str


class ShardGroup(NamedTuple):
    """Shards of one split and shape."""

    split: str
    bucket: str
    planned: int
    written: int
    num_samples: int
    num_bytes: int


def stage_rows(records: list[BuildRecord]) -> list[StageRow]:
    """The newest record of every stage that has one, in the order of a build."""
    newest = {record.stage: record for record in records}
    order = {name: place for place, name in enumerate(STAGES)}
    rows = []
    for name in sorted(newest, key=lambda name: order.get(name, len(order))):
        record = newest[name]
        left_s = None
        if record.left is not None and record.rate_per_s:
            left_s = record.left / record.rate_per_s
        time = datetime.fromtimestamp(record.time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        rows.append(StageRow(record, left_s, time))
    return rows


def shard_groups(shards: list[ShardRow]) -> list[ShardGroup]:
    groups: dict[tuple[str, str], list[ShardRow]] = {}
    for shard in shards:
        groups.setdefault((shard.split, shard.bucket), []).append(shard)
    return [
        ShardGroup(
            split,
            bucket,
            planned=len(rows),
            written=sum(row.info is not None for row in rows),
            num_samples=sum(row.info.num_samples for row in rows if row.info),
            num_bytes=sum(row.info.bytes for row in rows if row.info),
        )
        for (split, bucket), rows in sorted(groups.items())
    ]


def preprocessing(request: Request) -> Response:
    return _answer(View(request, "preprocessing"), "preprocessing.html")


def live(request: Request) -> Response:
    return _answer(View(request, "preprocessing"), "_preprocessing.html")


def _answer(view: View, template: str) -> Response:
    dataset = view.chosen
    catalog = view.state.catalogs[dataset.name]
    lines = view.state.line_files.follow(dataset.folder / BUILD_FILE, BuildRecord)
    counts = view.state.status_counts(dataset)
    groups = view.state.recent.get(("shards", dataset.name), lambda: _groups(catalog))
    settled = sum(counts.get(status, 0) for status in FINAL)
    return view.answer(
        template,
        stages=stage_rows(lines.read()),
        num_damaged=lines.num_damaged,
        counts=counts,
        total=sum(counts.values()),
        settled=settled,
        failures=Counter({name: counts.get(name, 0) for name in (UNREADABLE, UNAVAILABLE, FAILED)}),
        groups=groups,
        finished=(dataset.folder / "manifest.json").is_file(),
    )


def _groups(catalog: CatalogView) -> list[ShardGroup]:
    return shard_groups(catalog.shards())
