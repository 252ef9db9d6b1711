"""A whole build, top to bottom: labels in, a dataset folder out.

Every stage takes the clips of one status from the catalog and writes the outcome back, so a build
that was killed anywhere goes on where it stood when it is called again, and one that has nothing
left to do does nothing. Shards are planned once, after every item was hashed or has failed;
encoding them is independent work for the executors; the manifest is written last, by rename, when
every planned shard stands.

The configuration arrives taken apart: each stage gets the tables that it obeys.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from tqdm import tqdm

from loader.config import ConfigError
from loader.files import write_atomic
from loader.manifest import (
    MANIFEST_FILE,
    ShardInfo,
    Split,
    encode_manifest,
    make_manifest,
    recipe_id,
)
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.tables import FETCHED, INGESTED, SOUND, UNAVAILABLE, WANTED
from shardgen.encode.config import EncodeConfig, ExecutorConfig
from shardgen.encode.unit import spec_of
from shardgen.encode.write import remove_leftovers
from shardgen.recipe import full_recipe
from shardgen.report.config import TargetsConfig
from shardgen.report.estimate import estimate
from shardgen.report.files import write_reports
from shardgen.report.summary import status_line, summary
from shardgen.rules.config import RulesConfig
from shardgen.stages.config import FetchConfig, LabelsConfig
from shardgen.stages.encode import encode_shards, shards_to_write
from shardgen.stages.fetch import fetch_media
from shardgen.stages.filter import filter_labels
from shardgen.stages.ingest import ingest_labels
from shardgen.stages.plan import plan_shards, settle_duplicates
from shardgen.stages.probe import probe_media

CATALOG_FILE = "catalog.sqlite"
CONFIG_FILE = "config.toml"
STAGES = ("labels", "filter", "fetch", "probe", "plan", "encode", "report")


class BuildInputs(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration taken apart: what each stage gets of it (`config.take_apart`)."""

    output: Path
    labels: LabelsConfig
    rules: RulesConfig
    fetch: FetchConfig
    cache: Path  # where downloads are stored
    encode: EncodeConfig
    executor: ExecutorConfig
    targets: TargetsConfig
    manifest_version: Literal[1, 2]
    recipe: dict[str, Any]  # what of the configuration decides bytes
    config_toml: str  # the whole of it, resolved, to be echoed into the output


def build(inputs: BuildInputs, last_stage: str = STAGES[-1], dry_run: bool = False) -> bool:
    """Build the dataset that `inputs` describe, up to `last_stage`. With `dry_run` only the
    labels are read and filtered, and what is to be expected is printed.

    Returns False if shards are left that couldn't be encoded now, or clips for which the cache
    had no room: the next build goes on with them. Raises ConfigError, CatalogError,
    ExecutorError or OSError; what was finished then stands.
    """
    output, labels = inputs.output, inputs.labels
    output.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    with alone_in(output), Catalog(output / CATALOG_FILE) as catalog:
        remove_leftovers(output)
        database = catalog.database
        model = Path(inputs.encode.model)
        recipe = full_recipe(inputs.recipe, model, database.recall, database.remember)
        catalog.adopt_recipe(recipe_id(recipe), f"{labels.limit} {labels.sample_fraction}")
        write_atomic(output / CONFIG_FILE, inputs.config_toml.encode())
        for name in run_stages(catalog, inputs, recipe, failures):
            if dry_run and name == "filter":
                print(estimate(catalog, inputs.rules))
                return True
            if name != STAGES[-1]:  # the report has told more
                print(f"{name}: {status_line(catalog.status_counts())}")
            if name == last_stage:
                break
        num_waiting = sum(
            count.num_labels for count in catalog.status_counts() if count.reason == "cache_full"
        )
    for failure in failures:
        print(f"not encoded: {failure}")
    if num_waiting:
        print(
            f"not fetched: {num_waiting} clips wait for room in the cache; run the same command "
            f"to go on"
        )
    return not failures and not num_waiting


def run_stages(
    catalog: Catalog, inputs: BuildInputs, recipe: dict[str, Any], failures: list[str]
) -> Iterator[str]:
    """All stages in order, each with its bar; yields the name of each when it is done. Shards
    that can't be encoded now are added to `failures`, a line each, and then no manifest is
    written.
    """
    output, labels, rules = inputs.output, inputs.labels, inputs.rules
    root = Path(labels.root)

    with stage("labels", None, "label") as bar:
        ingest_labels(
            catalog,
            root,
            max_bytes=labels.max_bytes,
            workers=labels.workers,
            advance=bar.update,
        )
    yield "labels"

    with stage("filter", catalog.count(INGESTED)) as bar:
        filter_labels(catalog, labels, rules, bar.update)
    yield "filter"

    with stage("fetch", catalog.count(WANTED, UNAVAILABLE)) as bar:
        fetch_media(catalog, root, inputs.cache, inputs.fetch, bar.update)
    yield "fetch"

    with stage("probe", catalog.count(FETCHED)) as bar:
        probe_media(catalog, rules, labels.workers, bar.update)
    yield "probe"

    settle_duplicates(catalog)
    with stage("plan", catalog.count(SOUND)) as bar:
        plan_shards(catalog, rules, bar.update)
    yield "plan"

    names = shards_to_write(catalog, output)
    spec = spec_of(inputs.encode, output, rules.windows.fit)
    with stage("encode", len(names), "shard") as bar:
        failures += encode_shards(catalog, names, spec, inputs.executor, bar.update)
    yield "encode"

    with stage("report", catalog.count()) as bar:
        report = write_reports(catalog, output, root, rules.windows.fit, inputs.targets, bar.update)
    finished = catalog.shards.finished()
    if not failures:
        splits: dict[Split, list[ShardInfo]] = {
            "train": [info for split, info in finished if split == "train"],
            "val": [info for split, info in finished if split == "val"],
        }
        manifest = make_manifest(recipe, splits, version=inputs.manifest_version)
        write_atomic(output / MANIFEST_FILE, encode_manifest(manifest))
    print(summary(report, finished))
    yield "report"


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold the output folder's lock; it falls with the process. Raises ConfigError if another
    build has it.
    """
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{output}: another build is at work in this folder; wait for it or stop it"
            ) from error
        yield
    finally:
        os.close(folder)


def stage(name: str, total: int | None, unit: str = "clip") -> "tqdm[None]":
    """The progress bar of a stage."""
    return tqdm(
        desc=f"{STAGES.index(name) + 1}/{len(STAGES)} {name:<6}",
        total=total,
        unit=f" {unit}s",
        dynamic_ncols=True,
    )
