"""Decisions: who claims to have decided what, and the list that builds and training obey."""

from collections import Counter
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from loader.manifest import DatasetError
from tools.dashboard import exports
from tools.dashboard.render import View
from tools.dashboard.review import Decision

MAX_SHOWN = 500


def decisions(request: Request) -> Response:
    view = View(request, "decisions")
    dataset = view.chosen
    newest = view.state.review.newest(dataset.name)
    standing = [each for each in newest if each.verdict != "undecided"]
    decided = {each.label for each in newest}
    in_file, problem = [], ""
    try:
        in_file = exports.exclusions_of(dataset)
    except DatasetError as error:
        problem = str(error)
    latest = view.state.review.latest(dataset.name, MAX_SHOWN)
    catalog = view.state.catalogs[dataset.name]
    rows = {each.label: catalog.labelled(each.label) for each in latest}
    return view.answer(
        "decisions.html",
        latest=latest,
        rows=rows,
        total=view.state.review.num_decisions(dataset.name),
        verdicts=Counter(each.verdict for each in standing),
        types=Counter(each.type for each in standing if each.verdict == "exclude"),
        people=Counter(each.person for each in standing),
        path=dataset.exclusions,
        num_in_file=len(in_file),
        num_by_hand=sum(each.label not in decided for each in in_file),
        problem=problem,
        # a write may have failed, or a hand may have been at it
        up_to_date=exports.exclusion_rows(newest, in_file) == sorted(in_file),
    )


def download(request: Request) -> Response:
    """Every decision that was ever taken about the dataset, overruled ones included."""
    view = View(request)
    rows = view.state.review.latest(view.chosen.name, -1)
    body = exports.csv_bytes(Decision._fields, reversed(rows))
    return csv_response(body, f"decisions-{view.chosen.name}.csv")


def csv_response(body: bytes, name: str) -> Response:
    # a header is ASCII; names need not be
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
    return Response(body, headers=headers, media_type="text/csv; charset=utf-8")
