"""Training: several runs on one chart each, their states, and what differs between them."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash
from starlette.requests import Request
from starlette.responses import Response

from tools.dashboard.render import View, explained_names
from tools.dashboard.runs import (
    Curves,
    config_differences,
    config_of,
    metric_curves,
    running_mean,
    summarise,
    validation_curves,
)

MAX_RUNS_SHOWN, DEFAULT_RUNS = 8, 1
# columns that belong on one chart; what a run has beside these gets a chart of its own
VALIDATION_CHARTS = {
    "relative": ("relative", "train_relative"),
    "sigma": ("sigma ",),
    "task": ("task ",),
    "category": ("category ",),
    "psnr_db": ("psnr_db",),
}
METRIC_CHARTS = (
    "loss",
    "lr",
    "grad_norm",
    "s_per_step",
    "tokens_per_s",
    "memory_gib",
    "loss_scale",
)
MIN_SMOOTHED = 60  # records, below which the mean of a twentieth says nothing
NO_CHART = ("step", "epoch")


class Series(NamedTuple):
    """One line: the values of a column of a run."""

    run: int
    label: str
    faint: bool  # noisy, with its running mean drawn over it
    steps: int  # which of the step columns that are sent along
    values: list[float | None]


class Chart(NamedTuple):
    """`name` is a key of the explanations; `unit` stands at the y axis."""

    name: str
    title: str
    unit: str
    explained: bool
    series: list[Series]


def training(request: Request) -> Response:
    return _answer(View(request, "training"), "training.html")


def live(request: Request) -> Response:
    """States and time left, asked for every few seconds by an open page."""
    return _answer(View(request, "training"), "_training.html")


def _answer(view: View, template: str) -> Response:
    runs = view.state.runs()
    chosen = chosen_runs(view, runs)
    return view.answer(
        template,
        runs=runs,
        chosen=list(chosen),
        summaries=[summarise(view.state, name, folder) for name, folder in chosen.items()],
        differences=config_differences([config_of(folder) for folder in chosen.values()]),
        max_runs=MAX_RUNS_SHOWN,
    )


def chosen_runs(view: View, runs: dict[str, Path]) -> dict[str, Path]:
    """The runs that the query names, else the newest one."""
    wanted = [name for name in view.request.query_params.getlist("run") if name in runs]
    names = list(dict.fromkeys(wanted))[:MAX_RUNS_SHOWN] or list(runs)[:DEFAULT_RUNS]
    return {name: runs[name] for name in names}


def data(request: Request) -> Response:
    """The curves as JSON, with an ETag of what they hold."""
    view = View(request)
    chosen = chosen_runs(view, view.state.runs())
    body = msgspec.json.encode(charts_of(view, chosen))
    etag = f'"{xxhash.xxh3_64_hexdigest(body)}"'
    headers = {"etag": etag, "vary": "Cookie, Accept-Language"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def charts_of(view: View, chosen: dict[str, Path]) -> dict[str, Any]:
    """Charts with their series and words, ready to be drawn."""
    metrics = [metric_curves(view.state, folder) for folder in chosen.values()]
    validations = [validation_curves(view.state, folder) for folder in chosen.values()]
    names, num_runs = list(chosen), len(chosen)
    charts = [
        _chart(view, name, columns, names, metrics, 0)
        for name, columns in _metric_charts(metrics).items()
    ]
    charts[1:1] = [
        _chart(view, name, prefixes, names, validations, num_runs)
        for name, prefixes in VALIDATION_CHARTS.items()
    ]
    return {
        "runs": names,
        "strides": [curves.stride for curves in metrics],
        "step": view.t("training.step"),
        "steps": [each.columns.get("step", []) for each in (*metrics, *validations)],
        "charts": [chart._asdict() | {"series": _plain(chart)} for chart in charts if chart.series],
    }


def _plain(chart: Chart) -> list[dict[str, Any]]:
    return [series._asdict() for series in chart.series]


def _metric_charts(metrics: list[Curves]) -> dict[str, tuple[str, ...]]:
    """Chart -> its columns: those of METRIC_CHARTS, then one for every other column. The time of a
    step stands with its parts, whose names end in _s.
    """
    found = {column: None for curves in metrics for column in curves.columns}
    parts = [name for name in found if name.endswith("_s") and not name.endswith("_per_s")]
    charts = {name: (name, *parts) if name == "s_per_step" else (name,) for name in METRIC_CHARTS}
    drawn = {column for columns in charts.values() for column in columns}
    others = [name for name in found if name not in drawn and name not in NO_CHART]
    return charts | {name: (name,) for name in others}


def _chart(
    view: View,
    name: str,
    prefixes: tuple[str, ...],
    runs: list[str],
    curves: list[Curves],
    first_steps: int,
) -> Chart:
    """Every column that is one of `prefixes`, or begins with one that ends in a space."""
    series = []
    for place, (run, each) in enumerate(zip(runs, curves, strict=True)):
        for column, values in each.columns.items():
            if not any(column == p or (p[-1] == " " and column.startswith(p)) for p in prefixes):
                continue
            short = column.partition(" ")[2] or column
            alone = len(prefixes) == 1 and prefixes[0] == column
            label = run if alone else short if len(runs) == 1 else f"{run}: {short}"
            smooth = name == "loss" and len(values) >= MIN_SMOOTHED
            series.append(Series(place, label, smooth, first_steps + place, values))
            if smooth:
                width = len(values) // 20
                label = view.t("training.mean_of", run=run, n=width * each.stride)
                means = running_mean(values, width)
                series.append(Series(place, label, False, first_steps + place, means))
    key = f"chart.{name}"
    title, unit = view.words(key, name), view.words(f"{key}_unit", "")
    return Chart(name, title, unit, name in explained_names(), series)
