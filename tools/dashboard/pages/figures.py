"""Statistics and Quality: the figures of quality_report.json, with their sample sizes."""

from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from shardgen.catalog.tables import FINAL
from tools.dashboard.files import FileProblem
from tools.dashboard.records import Check, QualityReport
from tools.dashboard.render import View
from tools.dashboard.sources import RESULT_FILE
from tools.evaluate.result import Metric, Result

SPLITS = ("accepted_train", "accepted_val")
MAX_SIZE_PAIRS = 30


class Bar(NamedTuple):
    """One bar of a chart: `share` is of the longest."""

    name: str
    value: int
    share: float


class Table(NamedTuple):
    """Counts by category: a header of column codes, rows of (category, counts), the totals."""

    columns: list[str]
    rows: list[tuple[str, list[int | None]]]
    totals: list[int | None]


def bars(counts: dict[str, int]) -> list[Bar]:
    longest = max(counts.values(), default=0)
    return [Bar(name, count, count / longest if longest else 0) for name, count in counts.items()]


def category_table(report: QualityReport) -> Table:
    """Label files of each category by status, with the split of those that were accepted."""
    columns = [status for status in FINAL if report.statuses.get(status)]
    columns += ["total", *SPLITS]
    rows = [
        (name, [counts.get(column) for column in columns])
        for name, counts in report.categories.items()
    ]
    totals: list[int | None] = []
    for column in columns:
        if column == "total":
            totals.append(report.label_files)
        elif column in SPLITS:
            totals.append(sum(counts.get(column, 0) for counts in report.categories.values()))
        else:
            totals.append(report.statuses[column])
    return Table(columns, rows, totals)


def length_bars(report: QualityReport) -> list[Bar]:
    """Accepted videos by whole seconds, with the empty seconds between."""
    found = {int(text): count for text, count in report.accepted_videos_by_whole_seconds.items()}
    if not found:
        return []
    return bars({str(second): found.get(second, 0) for second in range(min(found), max(found) + 1)})


def _reason_bars(report: QualityReport) -> list[tuple[str, list[Bar]]]:
    """Bars by status, all on one scale."""
    longest = max((count for each in report.reasons.values() for count in each.values()), default=0)
    return [
        (status, [Bar(name, count, count / longest) for name, count in counts.items()])
        for status, counts in report.reasons.items()
        if longest
    ]


def statistics(request: Request) -> Response:
    view = View(request, "statistics")
    report = view.state.report(view.chosen)
    if not isinstance(report, QualityReport):
        return view.answer("no_report.html", problem=report)
    videos = sum(report.accepted_videos_by_whole_seconds.values())
    pairs = report.declared_against_probed_size
    return view.answer(
        "statistics.html",
        report=report,
        table=category_table(report),
        reasons=_reason_bars(report),
        lengths=length_bars(report),
        num_videos=videos,
        sizes=pairs[:MAX_SIZE_PAIRS],
        num_more_sizes=max(0, len(pairs) - MAX_SIZE_PAIRS),
        num_sized=sum(pair.clips for pair in pairs),
        num_same=sum(pair.clips for pair in pairs if pair.declared == pair.probed),
        flags=bars(report.flags),
    )


def grade(checks: list[Check]) -> str:
    """One word for all checks that have a target: "reached" if all of them do, "missed" if one is
    missed, "open" if none is but one was not measured, "no_targets" without any target.
    """
    wanted = [check for check in checks if check.target not in ("", "not set")]
    if not wanted:
        return "no_targets"
    if any(check.reached is False for check in wanted):
        return "missed"
    return "reached" if all(check.reached for check in wanted) else "open"


def quality(request: Request) -> Response:
    view = View(request, "quality")
    report = view.state.report(view.chosen)
    problem = report if isinstance(report, FileProblem) else None
    checks = report.checks if isinstance(report, QualityReport) else []
    evaluations = view.state.evaluations()
    name = view.query("evaluation") or next(iter(evaluations), "")
    result = None
    if name in evaluations:
        result = view.state.json_files.read(evaluations[name] / RESULT_FILE, Result)
    metrics: list[Metric] = []
    if isinstance(result, Result):
        metrics = [metric for metric in result.metrics if not metric.category]
    return view.answer(
        "quality.html",
        problem=problem,
        checks=checks,
        grade=grade(checks),
        num_wanted=sum(check.target not in ("", "not set") for check in checks),
        num_reached=sum(bool(check.reached) for check in checks),
        evaluations=list(evaluations),
        evaluation=name,
        metrics=metrics,
        result=result,
        votes=view.state.review.vote_counts(),
    )
