"""A request as pages see it, and templates as they come out of it.

Jinja escapes everything; a caption is text, whatever it holds. Numbers are written the same way in
both languages, and what is None reads "not measured".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode

import jinja2
import xxhash
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tools.dashboard.files import FileProblem
from tools.dashboard.language import (
    LANGUAGE_COOKIE,
    NOT_MEASURED,
    check_words,
    choose_language,
    code_words,
    load_wording,
    translator,
)
from tools.dashboard.sources import Dataset
from tools.dashboard.state import State, file_version

HERE = Path(__file__).parent
STATIC = HERE / "static"
DATASET_COOKIE = "newsreel_dataset"
PERSON_COOKIE = "newsreel_person"
COOKIE_AGE_S = 365 * 86400


def number(value: Any, digits: int = 4) -> str:
    """1234567 -> "1,234,567", 0.123456 -> "0.1235", "text" as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """93784.0 -> "1 d 2 h", 75.0 -> "1 min 15 s"."""
    whole = round(seconds)
    parts = [("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60)]
    shown = [f"{value} {unit}" for unit, value in (*parts, ("s", whole % 60)) if value]
    return " ".join(shown[:2]) or "0 s"


def make_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted"] = lambda text: quote(str(text), safe="")
    environment.filters["duration"] = duration
    return environment


_environment = make_environment()
_wording = load_wording()


class View:
    """One request: who asks in which language for which dataset, and how to answer."""

    def __init__(self, request: Request, page: str = "", *, outside: bool = False) -> None:
        """`outside`: an error or the login, which must not look anything up."""
        self.request, self.page = request, page
        self.state: State = request.app.state.dashboard
        self.language = choose_language(request)
        self.t = translator(_wording, self.language)
        self.dataset = None if outside else self._dataset()

    def _dataset(self) -> Dataset | None:
        """The dataset of the path; elsewhere the one that was looked at last."""
        datasets = self.state.sources.datasets
        name = self.request.path_params.get("dataset")
        if name is not None:
            if name not in datasets:
                raise HTTPException(404, self.t("error.no_dataset"))
            return datasets[name]
        known = datasets.get(self.cookie(DATASET_COOKIE))
        return known or next(iter(datasets.values()), None)

    @property
    def chosen(self) -> Dataset:
        """The dataset of a page that is about one."""
        assert self.dataset is not None, "a route without {dataset} asks for it"
        return self.dataset

    @property
    def person(self) -> str:
        return self.cookie(PERSON_COOKIE)

    def cookie(self, name: str) -> str:
        """What `set_cookie` has set; "" for nothing."""
        return unquote(self.request.cookies.get(name, ""))

    def words(self, key: str, default: str) -> str:
        """The sentence of `key`, or `default` where there is none."""
        return self.t(key) if key in _wording else default

    def query(self, name: str, default: str = "") -> str:
        return self.request.query_params.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int | None:
        """A whole number of the query that fits SQLite's; `default` for anything else."""
        text = self.query(name)
        if text.isascii() and text.isdigit() and len(text) < 19:
            return int(text)
        return default

    def with_query(self, **changes: Any) -> str:
        """The query of this page with some values changed; None takes one away."""
        values = {**self.request.query_params, **changes}
        kept = {name: value for name, value in values.items() if value not in (None, "")}
        return f"?{urlencode(kept)}" if kept else "?"

    def _context(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "t": self.t,
            "view": self,
            "language": self.language,
            "state": self.state,
            "dataset": self.dataset,
            "page": self.page,
            "csrf": self.state.csrf,
            "n": self.n,
            "code": lambda code: code_words(code, self.language),
            "check": lambda name, text="": check_words(name, text, self.language),
            "static": _static_url,
            "is_problem": lambda value: isinstance(value, FileProblem),
            **more,
        }

    def n(self, value: Any, digits: int = 4) -> str:
        """A number as it is shown; None is "not measured"."""
        if value is None or value == NOT_MEASURED[0]:
            return NOT_MEASURED[self.language == "ko"]
        return number(value, digits)

    def answer(self, template: str, http_status: int = 200, **context: Any) -> Response:
        """A page or a part of one. Its ETag is of what it says, so a page that asks every few
        seconds is told when nothing has changed.
        """
        text = _environment.get_template(template).render(self._context(context))
        body = text.encode("utf-8", errors="replace")
        etag = f'"{xxhash.xxh3_64_hexdigest(body)}"'
        headers = {"etag": etag, "vary": "Cookie, Accept-Language"}
        if http_status == 200 and self.request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        response = Response(body, http_status, headers, "text/html; charset=utf-8")
        if self.query("lang") in ("en", "ko"):
            self.set_cookie(response, LANGUAGE_COOKIE, self.query("lang"))
        if "dataset" in self.request.path_params and self.dataset:
            if self.cookie(DATASET_COOKIE) != self.dataset.name:
                self.set_cookie(response, DATASET_COOKIE, self.dataset.name)
        return response

    def set_cookie(self, response: Response, name: str, value: str) -> None:
        response.set_cookie(
            name, quote(value), max_age=COOKIE_AGE_S, httponly=True, samesite="strict"
        )


def explained_names() -> list[str]:
    """The figures that have a page of their own, beside the checks of the report."""
    return [key.removeprefix("term.") for key in _wording if key.startswith("term.")]


_static_urls: dict[str, str] = {}


def _static_url(name: str) -> str:
    """URL of a static file, with its version."""
    if name not in _static_urls:
        _static_urls[name] = f"/static/{name}?v={file_version(STATIC / name)}"
    return _static_urls[name]
