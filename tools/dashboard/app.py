"""The application: every route, and what happens to errors."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from shardgen.catalog.database import CatalogError
from tools.dashboard import media
from tools.dashboard.guard import LOOPBACK, Guard
from tools.dashboard.pages import (
    case,
    compare,
    decisions,
    defects,
    explain,
    figures,
    login,
    overview,
    preprocessing,
    samples,
    training,
    vote,
)
from tools.dashboard.render import STATIC, View
from tools.dashboard.sources import Sources
from tools.dashboard.state import open_state

DATA = "/data/{dataset}"


def create_app(
    sources: Sources,
    *,
    token: str = "",
    hosts: tuple[str, ...] = LOOPBACK,
    with_index: bool = True,
) -> Starlette:
    """The dashboard over `sources`. `token`: what visitors have to give, "" for nobody asks.
    `hosts`: the names that it answers to. `with_index`: keep the search indexes up to date.
    """
    state = open_state(sources, token)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if with_index:
            for indexer in state.indexers.values():
                indexer.start()
        yield
        if with_index:
            for indexer in state.indexers.values():
                indexer.stop()

    guard = Middleware(Guard, hosts=frozenset(hosts), token=token, secret=state.secret)
    app = Starlette(
        routes=_routes(),
        middleware=[guard],
        lifespan=lifespan,
        exception_handlers={
            HTTPException: _refused,
            CatalogError: _busy,
            sqlite3.OperationalError: _busy,
        },
    )
    app.state.dashboard = state
    return app


def _routes() -> list[Route | Mount]:
    return [
        Route("/", overview.overview),
        Route("/login", login.login),
        Route("/login", login.enter, methods=["POST"]),
        Route("/favicon.ico", _favicon),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/explain/{name}", explain.explain),
        Route(f"{DATA}/statistics", figures.statistics),
        Route(f"{DATA}/quality", figures.quality),
        Route(f"{DATA}/defects", defects.defects),
        Route(f"{DATA}/case/{{clip:int}}", case.case),
        Route(f"{DATA}/case/{{clip:int}}", case.decide, methods=["POST"]),
        Route(f"{DATA}/case/{{clip:int}}/player", case.player),
        Route(f"{DATA}/sample/{{key}}", case.sample),
        Route(f"{DATA}/decisions", decisions.decisions),
        Route(f"{DATA}/decisions.csv", decisions.download),
        Route(f"{DATA}/preprocessing", preprocessing.preprocessing),
        Route(f"{DATA}/preprocessing/live", preprocessing.live),
        Route(f"{DATA}/media/clip/{{clip:int}}", media.clip_media),
        Route(f"{DATA}/media/proxy/{{clip:int}}", media.proxy_media),
        Route(f"{DATA}/media/still/{{clip:int}}", media.still_media),
        Route(f"{DATA}/media/sample/{{key}}.{{extension}}", media.sample_media),
        Route("/training", training.training),
        Route("/training/live", training.live),
        Route("/training/data", training.data),
        Route("/samples", samples.samples),
        Route("/samples/clip/{step:int}/{number:int}", samples.clip),
        Route("/compare", compare.compare),
        Route("/compare/picture/{number:int}", compare.picture),
        Route("/vote", vote.vote),
        Route("/vote", vote.answer, methods=["POST"]),
        Route("/vote/clip/{token}/{side}", vote.clip),
        Route("/votes.csv", vote.download),
    ]


def _favicon(_: Request) -> Response:
    return FileResponse(STATIC / "favicon.svg")


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    view = View(request, "error", outside=True)
    message = error.detail if error.detail != "Not Found" else view.t("error.no_page")
    return view.answer(
        "error.html", error.status_code, status=error.status_code, message=message, retry=False
    )


def _busy(request: Request, error: Exception) -> Response:
    """A catalog that is not there yet, or that somebody holds for a moment: the page tries again by
    itself.
    """
    view = View(request, "error", outside=True)
    message = f"{view.t('error.busy')} ({error})"
    return view.answer("error.html", 503, status=503, message=message, retry=True)
