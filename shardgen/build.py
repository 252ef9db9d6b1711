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
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from loader.config import ConfigError
from loader.exclusions import excluded_labels, read_exclusions
from loader.files import write_atomic
from loader.manifest import (
    MANIFEST_FILE,
    ShardInfo,
    Split,
    encode_manifest,
    make_manifest,
    recipe_id,
)
from loader.sample import EMPTY_PROMPT_FILE
from loader.shape import LatentLayout
from shardgen.catalog.adopt import adopt_exclusions, adopt_media, adopt_recipe, forgets_plan
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.rows import StatusCount
from shardgen.catalog.tables import (
    ACCEPTED,
    FETCHED,
    GONE,
    INGESTED,
    SOUND,
)
from shardgen.encode.config import EncodeConfig, ExecutorConfig
from shardgen.encode.device import check_device
from shardgen.encode.unit import spec_of
from shardgen.encode.write import remove_leftovers, remove_shard
from shardgen.recipe import full_recipe
from shardgen.report.config import TargetsConfig
from shardgen.report.estimate import estimate
from shardgen.report.files import write_reports
from shardgen.report.progress import Progress
from shardgen.report.summary import status_line, summary
from shardgen.rules.config import RulesConfig
from shardgen.stages.config import FetchConfig, LabelsConfig
from shardgen.stages.encode import encode_shards, shards_to_write
from shardgen.stages.fetch import TO_FETCH, fetch_media
from shardgen.stages.filter import filter_labels
from shardgen.stages.ingest import ingest_labels
from shardgen.stages.plan import plan_shards, settle_duplicates
from shardgen.stages.probe import probe_media
from shardgen.stages.recheck import flag_changed_media

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
    layout: LatentLayout  # of the latents that encode.model's VAE makes
    recipe: dict[str, Any]  # what of the configuration decides bytes
    config_toml: str  # the whole of it, resolved, to be echoed into the output


class EmptyBuildError(ValueError):
    """There is nothing to make a dataset of; the message says what became of the label files."""


def build(inputs: BuildInputs, last_stage: str = STAGES[-1], dry_run: bool = False) -> bool:
    """Build the dataset that `inputs` describe, up to `last_stage`. With `dry_run` only the
    labels are read and filtered, and what is to be expected is printed.

    Returns False if shards are left that couldn't be encoded now, or clips for which the cache
    had no room: the next build goes on with them. Raises ConfigError, DatasetError (exclusions),
    CatalogError, EmptyBuildError, ExecutorError or OSError; what was finished then stands.
    """
    # What can be seen to fail is looked at before anything is written.
    check_device(inputs.encode, inputs.executor)
    exclusions = inputs.labels.exclusions
    excluded = excluded_labels(read_exclusions(Path(exclusions))) if exclusions else frozenset()
    output = inputs.output
    output.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    with alone_in(output), Catalog(output / CATALOG_FILE) as catalog:
        remove_leftovers(output)
        recipe = adopt(catalog, inputs)
        write_atomic(output / CONFIG_FILE, inputs.config_toml.encode())
        for name in run_stages(catalog, inputs, recipe, excluded, failures):
            counts = catalog.status_counts()
            if dry_run and name == "filter":
                has_condition = bool(inputs.encode.condition)
                print(estimate(catalog, inputs.rules, inputs.layout, has_condition))
                return True
            if name != STAGES[-1]:  # the report has told more
                print(f"{name}: {status_line(counts)}")
            if name == last_stage:
                break
        num_waiting = sum(count.num_labels for count in counts if count.reason == "cache_full")
        if name == "plan" and not num_waiting and not catalog.shards.num_planned():
            raise EmptyBuildError(nothing_to_encode(counts))
    for failure in failures:
        print(f"not encoded: {failure}")
    if num_waiting:
        print(
            f"not fetched: {num_waiting} clips wait for room in the cache; run the same command "
            f"to go on"
        )
    return not failures and not num_waiting


def adopt(catalog: Catalog, inputs: BuildInputs) -> dict[str, Any]:
    """Start a build in its catalog; returns the whole recipe. Raises CatalogError if shards were
    written under another one.
    """
    database, labels, output = catalog.database, inputs.labels, inputs.output
    model = Path(inputs.encode.model)
    recipe = full_recipe(inputs.recipe, model, database.recall, database.remember)
    if forgets_plan(database, recipe_id(recipe)):
        # No shard is in the catalog as written. What a worker that was killed has put in place
        # all the same, and the empty prompt, may not be what the new recipe makes.
        for name in catalog.shards.unfinished():
            remove_shard(output / catalog.shards.plan(name).split, name)
        for file in (EMPTY_PROMPT_FILE, MANIFEST_FILE):
            (output / file).unlink(missing_ok=True)
    adopt_recipe(database, recipe_id(recipe), f"{labels.limit} {labels.sample_fraction}")
    if inputs.fetch.reuse:
        adopt_media(database, Path(inputs.fetch.reuse) / CATALOG_FILE)
    return recipe


def run_stages(
    catalog: Catalog,
    inputs: BuildInputs,
    recipe: dict[str, Any],
    excluded: Set[str],
    failures: list[str],
) -> Iterator[str]:
    """All stages in order, each with its progress; yields the name of each when it is done.
    `excluded` are the labels that reviewers have excluded. Shards that can't be encoded now are
    added to `failures`, a line each, and then no manifest is written.
    """
    output, labels, rules = inputs.output, inputs.labels, inputs.rules
    root = Path(labels.root)

    def stage(name: str, total: int | None, unit: str = "clip") -> Progress:
        return Progress(output, name, f"{STAGES.index(name) + 1}/{len(STAGES)}", total, unit)

    # label files -> ingested, or unreadable
    with stage("labels", None, "label") as progress:
        ingest_labels(
            catalog,
            root,
            max_bytes=labels.max_bytes,
            workers=labels.workers,
            advance=progress.update,
        )
    if catalog.count() == catalog.count(GONE):
        raise EmptyBuildError(
            f"labels.root = {root}: no label file (*.json) lies in it; it must hold "
            f"{{image,video}}/batch_NNNN/ID.json"
        )
    yield "labels"

    # ingested -> wanted, by the rules that need the label alone
    if num_unknown := adopt_exclusions(catalog.database, excluded):
        print(
            f"exclusions: {num_unknown} of {len(excluded)} excluded labels name no label file "
            f"below {root}"
        )
    with stage("filter", catalog.count(INGESTED)) as progress:
        filter_labels(catalog, labels, rules, excluded, progress.update)
    yield "filter"

    # wanted -> fetched: local files hashed, others downloaded
    with stage("fetch", catalog.count(*TO_FETCH, ACCEPTED)) as progress:
        flag_changed_media(catalog, root, inputs.fetch.workers, progress.update)
        fetch_media(catalog, root, inputs.cache, inputs.fetch, progress.update)
    yield "fetch"

    # fetched -> sound, by the rules that need the footage
    with stage("probe", catalog.count(FETCHED)) as progress:
        probe_media(catalog, rules, labels.workers, progress.update)
    yield "probe"

    # sound -> accepted, in a planned shard: from here on nothing moves
    settle_duplicates(catalog, rules)
    with stage("plan", catalog.count(SOUND)) as progress:
        plan_shards(catalog, rules, progress.update)
    yield "plan"

    # planned shards -> written shards
    if catalog.shards.num_planned():
        names = shards_to_write(catalog, output)
        spec = spec_of(inputs.encode, output, rules.windows.fit)
        with stage("encode", len(names), "shard") as progress:
            failed, speed = encode_shards(catalog, names, spec, inputs.executor, progress.update)
        failures += failed
        if speed.num_windows:
            print(speed.summary())
        yield "encode"

    # What became of all of them, and last of all the manifest: a folder that has one is complete.
    with stage("report", catalog.count()) as progress:
        report = write_reports(
            catalog, output, root, rules.windows.fit, inputs.targets, progress.update
        )
    finished = catalog.shards.finished()
    print(summary(report, finished))
    counts = catalog.status_counts()
    if not finished and not failures and all(count.reason != "cache_full" for count in counts):
        raise EmptyBuildError(nothing_to_encode(counts))
    if finished and not failures:
        splits: dict[Split, list[ShardInfo]] = {
            "train": [info for split, info in finished if split == "train"],
            "val": [info for split, info in finished if split == "val"],
        }
        manifest = make_manifest(
            recipe,
            splits,
            layout=inputs.layout,
            condition=inputs.encode.condition,
            version=inputs.manifest_version,
        )
        write_atomic(output / MANIFEST_FILE, encode_manifest(manifest))
    yield "report"


def nothing_to_encode(counts: Sequence[StatusCount]) -> str:
    """Why a build has no sample, from what became of its label files."""
    reasons: Counter[str] = Counter()
    for count in counts:
        reasons[f"{count.status}: {count.reason}"] += count.num_labels
    listed = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
    return (
        f"none of {reasons.total()} label files gives a sample, so there is no dataset ({listed}); "
        f"loosen the rule that took most, or look at defective_samples.csv"
    )


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
