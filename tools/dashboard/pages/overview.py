"""Overview: how many label files there are and where they ended, and the newest runs."""

import sqlite3
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from shardgen.catalog.database import CatalogError
from shardgen.catalog.tables import FINAL
from tools.dashboard.files import FileProblem
from tools.dashboard.records import QualityReport
from tools.dashboard.render import View
from tools.dashboard.runs import summarise
from tools.dashboard.sources import Dataset
from tools.dashboard.state import State

NUM_RUNS = 5


class DatasetSummary(NamedTuple):
    """The counts of a dataset and the file they come from."""

    dataset: Dataset
    source: str  # "" where nothing could be read
    label_files: int | None
    statuses: list[tuple[str, int]]
    adds_up: bool
    num_samples: int | None
    problem: str
    num_decisions: int


def overview(request: Request) -> Response:
    view = View(request, "overview")
    runs = list(view.state.runs().items())[:NUM_RUNS]
    return view.answer(
        "overview.html",
        summaries=[summary(view.state, each) for each in view.state.sources.datasets.values()],
        runs=[summarise(view.state, name, folder) for name, folder in runs],
        num_runs=len(view.state.runs()),
        evaluations=list(view.state.evaluations()),
        newest=None if not runs else runs[0][0],
    )


def summary(state: State, dataset: Dataset) -> DatasetSummary:
    """From the report of a finished build, else from the catalog of one that runs."""
    report = state.report(dataset)
    problem = ""
    if isinstance(report, QualityReport) and report.label_files is not None:
        source, statuses, label_files = "quality_report.json", report.statuses, report.label_files
        num_samples = sum(sum(shapes.values()) for shapes in report.samples.values())
        samples: int | None = num_samples if report.samples else None
    else:
        if isinstance(report, FileProblem):
            problem = f"{report.name}: {report.detail}"
        try:
            statuses, source = state.status_counts(dataset), "catalog.sqlite"
            label_files = sum(statuses.values())
        except (CatalogError, sqlite3.OperationalError) as error:
            return DatasetSummary(dataset, "", None, [], False, None, problem or str(error), 0)
        samples = None
    order = {name: place for place, name in enumerate(FINAL)}
    shown = sorted(statuses.items(), key=lambda item: order.get(item[0], len(order)))
    return DatasetSummary(
        dataset=dataset,
        source=source,
        label_files=label_files,
        statuses=[(name, count) for name, count in shown if count],
        adds_up=sum(statuses.values()) == label_files,
        num_samples=samples,
        problem=problem,
        num_decisions=state.review.num_decisions(dataset.name),
    )
