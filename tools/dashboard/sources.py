"""What the dashboard looks at: datasets and runs by name, and the folder that holds its own files.

A name in a URL is looked up in what was found here and never becomes part of a path.
"""

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loader.exclusions import EXCLUSIONS_FILE
from train.records import METRICS_FILE

# as shardgen.build calls them, which would bring torch along
CATALOG_FILE, CONFIG_FILE = "catalog.sqlite", "config.toml"
STATUS_FILE, RESULT_FILE = "status.json", "result.json"
EVALUATIONS, SAMPLES = "evaluations", "samples"
# runs may stand in folders of folders, but a whole disk is not searched for them
MAX_DEPTH, MAX_RUNS = 3, 500
_NAME = re.compile(r"[\w.-]{1,80}")
_STEP_FOLDER = re.compile(r"step-\d{6,}")


class SourceError(ValueError):
    """A dataset or folder that can't be shown; the message names it and what to do."""


class Dataset(NamedTuple):
    """A dataset folder. `label_root` is None where its recipe can't be read or names a folder that
    is not there: the pages then do without labels and media beside them.
    """

    name: str
    folder: Path
    label_root: Path | None
    cache: Path
    own: Path  # the dashboard's files about this dataset
    exclusions: Path

    @property
    def catalog(self) -> Path:
        return self.folder / CATALOG_FILE

    @property
    def media_roots(self) -> list[Path]:
        """Only files below these folders are ever served."""
        roots = [self.folder, self.cache, *([self.label_root] if self.label_root else [])]
        return [root.resolve() for root in roots]


class Sources(NamedTuple):
    """Everything that was named on the command line."""

    datasets: dict[str, Dataset]
    runs: Path | None
    own: Path

    @property
    def proxies(self) -> Path:
        return self.own / "proxies"


def find_sources(datasets: Sequence[str], runs: Path | None, own: Path) -> Sources:
    """Check what the command line names: `datasets` as PATH or NAME=PATH. Raises SourceError."""
    found: dict[str, Dataset] = {}
    for text in datasets:
        name, separator, path = text.partition("=")
        folder = Path(path if separator else text).absolute()
        name = name if separator else folder.name
        if not _NAME.fullmatch(name):
            raise SourceError(f"dataset name {name!r}: letters, digits, _ . - only; give NAME=PATH")
        if name in found:
            raise SourceError(f"two datasets are called {name}: give one of them as NAME=PATH")
        if not folder.is_dir():
            raise SourceError(f"{folder}: no such dataset folder; `shardgen build` makes it")
        found[name] = _dataset(name, folder, own / name)
    if runs is not None and not runs.is_dir():
        raise SourceError(f"{runs}: no such folder of runs")
    if not found and runs is None:
        raise SourceError("nothing to show: give --dataset FOLDER, --runs FOLDER or both")
    return Sources(found, runs.absolute() if runs else None, own.absolute())


def _dataset(name: str, folder: Path, own: Path) -> Dataset:
    config = _read_toml(folder / CONFIG_FILE)
    root = Path(str(config.get("labels", {}).get("root", "")) or folder / "missing").absolute()
    cache = Path(str(config.get("fetch", {}).get("cache", "")) or folder / "cache").absolute()
    # A dataset on a read-only disk keeps its list of exclusions with the dashboard's own files.
    writable = os.access(folder, os.W_OK)
    exclusions = (folder if writable else own) / EXCLUSIONS_FILE
    return Dataset(name, folder, root if root.is_dir() else None, cache, own, exclusions)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}


def find_runs(runs: Path | None) -> dict[str, Path]:
    """Name -> folder of every run below `runs`, the most recently written first. The name is its
    path below `runs` ("." for the folder itself).
    """
    if runs is None:
        return {}
    found = [folder for folder in _walk(runs, MAX_DEPTH) if is_run(folder)]
    found.sort(key=_last_written, reverse=True)
    return {folder.relative_to(runs).as_posix(): folder for folder in found[:MAX_RUNS]}


def is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or (folder / STATUS_FILE).is_file()


def find_evaluations(runs: Path | None) -> dict[str, Path]:
    """Name -> folder of every evaluation with a result, of a run or beside the runs."""
    if runs is None:
        return {}
    homes = {runs: "", **{folder: f"{name}/" for name, folder in find_runs(runs).items()}}
    found = {
        f"{prefix if prefix != './' else ''}{path.parent.name}": path.parent
        for home, prefix in homes.items()
        for path in sorted((home / EVALUATIONS).glob(f"*/{RESULT_FILE}"))
    }
    return dict(sorted(found.items()))


def sample_steps(run: Path) -> dict[int, Path]:
    """Step -> folder of samples of a run, in order."""
    try:
        folders = [each for each in (run / SAMPLES).iterdir() if _STEP_FOLDER.fullmatch(each.name)]
    except OSError:
        return {}
    return {int(each.name[5:]): each for each in sorted(folders, key=lambda each: each.name)}


def _walk(folder: Path, depth: int) -> list[Path]:
    found = [folder]
    if depth:
        try:
            children = sorted(each for each in folder.iterdir() if each.is_dir())
        except OSError:
            return found
        for child in children:
            # checkpoints and samples hold no runs, and a run may have thousands of them
            if not is_run(folder) and not child.is_symlink() and not child.name.startswith("."):
                found += _walk(child, depth - 1)
    return found


def _last_written(run: Path) -> int:
    times = [0]
    for name in (METRICS_FILE, STATUS_FILE):
        try:
            times.append((run / name).stat().st_mtime_ns)
        except OSError:
            continue
    return max(times)


def inside(path: Path, roots: Sequence[Path]) -> Path | None:
    """The real path if it is a file below one of the (resolved) roots, else None."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        return None
    return real if real.is_file() and any(real.is_relative_to(root) for root in roots) else None
