"""What a figure means: definition, how to read it, and the file it is read from."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shardgen.report.labels_ko_en import CHECKS
from tools.dashboard.language import check_words
from tools.dashboard.render import View, explained_names


def explain(request: Request) -> Response:
    view = View(request, "explain")
    name = request.path_params["name"]
    names = [*explained_names(), *CHECKS]
    if name not in names:
        raise HTTPException(404, view.t("error.no_page"))
    return view.answer(
        "explain.html",
        name=name,
        title=_title(view, name),
        paragraphs=_paragraphs(view, name),
        source=view.words(f"source.{name}", "quality_report.json" if name in CHECKS else ""),
        others=[(each, _title(view, each)) for each in names if each != name],
    )


def _title(view: View, name: str) -> str:
    if name in CHECKS:
        return check_words(name, "", view.language)[0]
    return view.t(f"term.{name}")


def _paragraphs(view: View, name: str) -> list[str]:
    if name in CHECKS:
        report = view.state.report(view.dataset) if view.dataset else None
        checks = {check.name: check.definition for check in getattr(report, "checks", [])}
        found = check_words(name, checks.get(name, ""), view.language)[1]
        return [paragraph for paragraph in (found, view.words(f"meaning.{name}", "")) if paragraph]
    return view.t(f"meaning.{name}").split("\n")
