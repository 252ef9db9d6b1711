"""Defects: label files by reason, filters, Korean search, a page at a time."""

import sqlite3
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from tools.dashboard.catalog import CatalogView, Clip
from tools.dashboard.render import View
from tools.dashboard.search import (
    COUNT_LIMIT,
    MAX_QUERY_CHARS,
    Column,
    Filter,
    Page,
    choices,
    find,
    needs_scan,
    open_search,
    runs_of,
)

PAGE_SIZE = 50
CHOICE_FIELDS = ("status", "reason", "category", "station", "media_type")
COLUMNS: dict[str, Column] = {"caption": "caption", "stt": "stt", "ocr": "ocr"}


class Hits(NamedTuple):
    """A page of rows and how it was found: "index", or "scan" with whether it saw everything."""

    page: Page
    rows: list[Clip]
    method: str
    complete: bool


def asked(view: View) -> Filter:
    """The filter that the query names."""
    return Filter(
        status=view.query("status"),
        reason=view.query("reason"),
        category=view.query("category"),
        station=view.query("station"),
        media_type=view.query("media_type"),
        programme=view.query("programme"),
        first_day=view.query("from"),
        last_day=view.query("to"),
        text=view.query("text")[:MAX_QUERY_CHARS].strip(),
        column=COLUMNS.get(view.query("column"), "all"),
    )


def defects(request: Request) -> Response:
    view = View(request, "defects")
    wanted = asked(view)
    catalog = view.state.catalogs[view.chosen.name]
    indexer = view.state.indexers[view.chosen.name]
    progress = indexer.progress
    after, before = view.integer("after", 0) or 0, view.integer("before")
    options: dict[str, list[tuple[str, int]]] = {}
    if progress.rows_ready:
        with open_search(indexer.path) as db:
            chosen = tuple(getattr(wanted, field) for field in CHOICE_FIELDS)
            options = view.state.recent.get(
                ("choices", view.chosen.name, chosen), lambda: _options(db, wanted)
            )
            use_index = not wanted.text or (progress.texts_ready and not needs_scan(wanted.text))
            if use_index:
                page = find(db, wanted, after, before, PAGE_SIZE)
                hits = Hits(page, _rows(catalog, page.ids), "index", True)
            else:
                hits = _scan(catalog, wanted, after)
    elif wanted.text:
        hits = _scan(catalog, wanted, after)
    else:
        hits = _unfiltered(catalog, after)
    by_id = catalog.claims(wanted.text) if wanted.text and not after and not before else []
    labels = [row.label for row in (*by_id, *hits.rows)]
    return view.answer(
        "defects.html",
        wanted=wanted,
        options=options,
        progress=progress,
        num_labels=_num_labels(view),
        hits=hits,
        by_id=by_id,
        decisions=view.state.review.standing(view.chosen.name, labels) if labels else {},
        count_limit=COUNT_LIMIT,
        first_page=not after and before is None,
    )


def _options(db: sqlite3.Connection, wanted: Filter) -> dict[str, list[tuple[str, int]]]:
    """What each filter can be set to, with the label files that would be left."""
    return {field: choices(db, field, wanted) for field in CHOICE_FIELDS}


def _rows(catalog: CatalogView, ids: list[int]) -> list[Clip]:
    return catalog.clips(ids) if ids else []


def _scan(catalog: CatalogView, wanted: Filter, after: int) -> Hits:
    """Without an index the texts are read one by one, and the filters apply to what is found."""
    found = catalog.scan(runs_of(wanted.text) or [wanted.text], after, PAGE_SIZE + 1)
    ids = found.ids[:PAGE_SIZE]
    rows = [row for row in _rows(catalog, ids) if _matches(row, wanted)]
    following = ids[-1] if len(found.ids) > PAGE_SIZE else None
    return Hits(Page(ids, None, following, None), rows, "scan", found.complete)


def _unfiltered(catalog: CatalogView, after: int) -> Hits:
    """The first pages before there is any index: rows as they come."""
    ids = [row.id for row in catalog.page(after, PAGE_SIZE + 1)]
    following = ids[PAGE_SIZE - 1] if len(ids) > PAGE_SIZE else None
    page = Page(ids[:PAGE_SIZE], None, following, None)
    return Hits(page, _rows(catalog, page.ids), "scan", True)


def _matches(row: Clip, wanted: Filter) -> bool:
    same = all(
        not getattr(wanted, field) or getattr(wanted, field) == getattr(row, field)
        for field in (*CHOICE_FIELDS, "programme")
    )
    first, last = wanted.first_day, wanted.last_day or "9999-12-31"
    return same and (
        not (wanted.first_day or wanted.last_day) or first <= row.broadcast_date <= last
    )


def _num_labels(view: View) -> int | None:
    try:
        return sum(view.state.status_counts(view.chosen).values())
    except sqlite3.OperationalError:
        return None
