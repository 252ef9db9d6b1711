"""Preprocessing: stages, rates, failures and shards, while a build runs and after it."""

from collections import Counter
from datetime import UTC, datetime
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from shardgen.catalog.tables import FAILED, FINAL, UNAVAILABLE, UNREADABLE
from tools.dashboard.catalog import CatalogView, ShardRow
from tools.dashboard.records import BuildLine
from tools.dashboard.render import View

BUILD_LOG = "build.jsonl"
# in the order of a build; shardgen.build, which has them too, would bring torch along
STAGES = ("labels", "filter", "fetch", "probe", "plan", "encode", "report")


class StageRow(NamedTuple):
    """A stage as the last line about it says."""

    name: str
    done: float | None
    left: float | None
    rate: float | None
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


def moment(value: float | str | None) -> str:
    """Unix seconds or ISO 8601 as it is shown; "" for none."""
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return value or ""


def stage_rows(lines: list[BuildLine]) -> list[StageRow]:
    """The newest line of every stage that has one, in the order of a build."""
    newest = {line.stage: line for line in lines if line.stage}
    order = {name: place for place, name in enumerate(STAGES)}
    names = sorted(newest, key=lambda name: order.get(name, len(order)))
    return [
        StageRow(
            name,
            newest[name].done,
            newest[name].left,
            newest[name].rate,
            _seconds_left(newest[name]),
            moment(newest[name].time),
        )
        for name in names
    ]


def _seconds_left(line: BuildLine) -> float | None:
    return line.left / line.rate if line.left is not None and line.rate else None


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
    lines = view.state.line_files.follow(dataset.folder / BUILD_LOG, BuildLine)
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
