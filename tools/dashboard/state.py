"""Everything that lives as long as the process: sources, indexes, caches, the review file."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from tools.dashboard.catalog import CatalogView
from tools.dashboard.files import FileProblem, JsonFiles, LineFiles, Recent
from tools.dashboard.guard import Attempts, csrf_token, read_secret, session_cookie
from tools.dashboard.indexing import Indexer
from tools.dashboard.records import QualityReport
from tools.dashboard.review import Review
from tools.dashboard.sources import Dataset, Sources, find_evaluations, find_runs

SHARED_S = 4.0  # below the 5 s in which an open page asks again


class State(NamedTuple):
    """One per process; pages get it from the application."""

    sources: Sources
    token: str
    secret: bytes
    review: Review
    catalogs: dict[str, CatalogView]
    indexers: dict[str, Indexer]
    json_files: JsonFiles
    line_files: LineFiles
    recent: Recent
    attempts: Attempts

    @property
    def csrf(self) -> str:
        return csrf_token(self.secret)

    @property
    def session(self) -> str:
        return session_cookie(self.secret, self.token)

    def report(self, dataset: Dataset) -> QualityReport | FileProblem | None:
        """The dataset's quality_report.json; None while there is none."""
        return self.json_files.read(dataset.folder / "quality_report.json", QualityReport)

    def status_counts(self, dataset: Dataset) -> dict[str, int]:
        """Label files per status as the catalog has them, a few seconds old at most. Raises what
        CatalogView does.
        """
        view = self.catalogs[dataset.name]
        return self.recent.get(("statuses", dataset.name), view.status_counts)

    def runs(self) -> dict[str, Path]:
        return self.recent.get("runs", lambda: find_runs(self.sources.runs))

    def evaluations(self) -> dict[str, Path]:
        return self.recent.get("evaluations", lambda: find_evaluations(self.sources.runs))


def open_state(sources: Sources, token: str = "") -> State:
    """Make the dashboard's own folder ready; indexes are not filled before their `start`."""
    catalogs = {name: CatalogView(each.catalog) for name, each in sources.datasets.items()}
    return State(
        sources=sources,
        token=token,
        secret=read_secret(sources.own),
        review=Review(sources.own),
        catalogs=catalogs,
        indexers={
            name: Indexer(catalogs[name], each.own) for name, each in sources.datasets.items()
        },
        json_files=JsonFiles(),
        line_files=LineFiles(),
        recent=Recent(SHARED_S),
        attempts=Attempts(),
    )


def file_version(path: Path) -> str:
    """Short name of a file's contents, so that a browser takes a new one at once."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
