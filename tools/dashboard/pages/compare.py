"""Compare: the tables of an evaluation, with intervals, in all and by category."""

from collections.abc import Iterable
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tools.dashboard import media
from tools.dashboard.files import FileProblem
from tools.dashboard.render import View, explained_names
from tools.dashboard.sources import RESULT_FILE
from tools.evaluate.result import Comparison, Metric, Result

REFERENCES = ("real", "base")


class MetricTable(NamedTuple):
    """One metric: a row per category ("" first, for all), a column per variant."""

    name: str
    unit: str
    model: str
    target: str
    variants: list[str]
    rows: list[tuple[str, list[Metric | None]]]


def metric_tables(result: Result) -> list[MetricTable]:
    """The metrics in the order of the file; real and base come before the candidates."""
    names = list(dict.fromkeys(metric.name for metric in result.metrics))
    listed = [*(each.name for each in result.variants), *(each.variant for each in result.metrics)]
    variants = sorted(dict.fromkeys(listed), key=lambda name: name not in REFERENCES)
    tables = []
    for name in names:
        of_name = [metric for metric in result.metrics if metric.name == name]
        found = {(metric.category, metric.variant): metric for metric in of_name}
        categories = sorted({metric.category for metric in of_name})
        rows = [(each, [found.get((each, variant)) for variant in variants]) for each in categories]
        tables.append(
            MetricTable(
                name=name,
                unit=_first(metric.unit for metric in of_name),
                model=_first(metric.model for metric in of_name),
                target=_first(metric.target for metric in of_name),
                variants=variants,
                rows=rows,
            )
        )
    return tables


def _first(texts: Iterable[str]) -> str:
    """The first that says something: a target stands with the candidates alone."""
    return next(filter(None, texts), "")


def comparison_rows(result: Result) -> tuple[list[Comparison], list[Comparison]]:
    """(of all prompts, of single categories)."""
    whole = [each for each in result.comparisons if not each.category]
    return whole, [each for each in result.comparisons if each.category]


def compare(request: Request) -> Response:
    view = View(request, "compare")
    name, result = chosen_result(view)
    found = result if isinstance(result, Result) else Result()
    whole, by_category = comparison_rows(found)
    return view.answer(
        "compare.html",
        evaluations=list(view.state.evaluations()),
        evaluation=name,
        result=found,
        problem=result if isinstance(result, FileProblem) else None,
        tables=metric_tables(found),
        comparisons=whole,
        by_category=by_category,
        known=explained_names(),
        num_votes=view.state.review.vote_counts().get(name, 0),
    )


def chosen_result(view: View) -> tuple[str, Result | FileProblem | None]:
    """The evaluation that the query names, else the first, and its result.json."""
    evaluations = view.state.evaluations()
    name = view.query("evaluation")
    if name not in evaluations:
        name = next(iter(evaluations), "")
    if not name:
        return "", None
    return name, view.state.json_files.read(evaluations[name] / RESULT_FILE, Result)


def picture(request: Request) -> Response:
    """A plot or contact sheet by its number in result.json."""
    view = View(request)
    name, result = chosen_result(view)
    number = request.path_params["number"]
    if not isinstance(result, Result) or number >= len(result.pictures):
        raise HTTPException(404, view.t("error.gone"))
    path = media.folder_file(view.state.evaluations()[name], result.pictures[number])
    if path is None:
        raise HTTPException(404, view.t("error.gone"))
    return media.file_answer(path)
