"""A whole build, top to bottom: labels in, a dataset folder out.

Every stage takes the clips of one status from the catalog and writes the outcome back, so a build
that was killed anywhere goes on where it stood when it is called again, and one that has nothing
left to do does nothing. Shards are planned once, after every item was hashed or has failed;
encoding them is independent work for the executors; the manifest is written last, by rename, when
every planned shard stands.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from tqdm import tqdm

from loader.config import ConfigError, dump_toml
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
from shardgen.catalog.catalog import Catalog, CatalogError
from shardgen.catalog.tables import FETCHED, INGESTED, SOUND, UNAVAILABLE, WANTED
from shardgen.config import ShardgenConfig, check_paths
from shardgen.encode.executors import Failure, run_local, run_ray
from shardgen.encode.unit import EncodeSpec, ShardJob, ShardResult, encode_unit
from shardgen.encode.write import remove_leftovers, stored_size
from shardgen.media.pictures import choose_mp4_encoder
from shardgen.recipe import full_recipe
from shardgen.report.estimate import estimate, remember_rate
from shardgen.report.files import status_line, summary, write_reports
from shardgen.stages.fetch import fetch_media
from shardgen.stages.filter import filter_labels, plan_shards, probe_media, settle_duplicates
from shardgen.stages.ingest import ingest_labels

CATALOG_FILE = "catalog.sqlite"
CONFIG_FILE = "config.toml"
STAGES = ("labels", "filter", "fetch", "probe", "plan", "encode", "report")


def build(config: ShardgenConfig, last_stage: str = STAGES[-1], dry_run: bool = False) -> bool:
    """Build the dataset that `config` describes, up to `last_stage`. With `dry_run` only the
    labels are read and filtered, and what is to be expected is printed.

    Returns False if shards are left that couldn't be encoded now, or clips for which the cache
    had no room: the next build goes on with them. Raises ConfigError, CatalogError, PictureError,
    ExecutorError or OSError; what was finished then stands.
    """
    check_paths(config)
    config = settle_encoder(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    with alone_in(output), Catalog(output / CATALOG_FILE) as catalog:
        remove_leftovers(output)
        recipe = full_recipe(config, catalog.recall, catalog.remember)
        catalog.adopt_recipe(
            recipe_id(recipe), f"{config.labels.limit} {config.labels.sample_fraction}"
        )
        write_atomic(output / CONFIG_FILE, dump_toml(config).encode())
        for name in run_stages(catalog, config, recipe, failures):
            if dry_run and name == "filter":
                print(estimate(catalog, config))
                return True
            if name != STAGES[-1]:  # the report has told more
                print(f"{name}: {status_line(catalog.buckets())}")
            if name == last_stage:
                break
        num_waiting = sum(
            count for *_, reason, count in catalog.buckets() if reason == "cache_full"
        )
    for failure in failures:
        print(f"not encoded: {failure}")
    if num_waiting:
        print(
            f"not fetched: {num_waiting} clips wait for room in the cache; run the same command to go on"
        )
    return not failures and not num_waiting


def run_stages(
    catalog: Catalog, config: ShardgenConfig, recipe: dict[str, Any], failures: list[str]
) -> Iterator[str]:
    """All stages in order, each with its bar; yields the name of each when it is done. Shards
    that can't be encoded now are added to `failures`, a line each, and then no manifest is
    written.
    """
    output, root = Path(config.output), Path(config.labels.root)
    with stage("labels", None, "label") as bar:
        ingest_labels(
            catalog,
            root,
            max_bytes=config.labels.max_bytes,
            workers=config.labels.workers,
            advance=bar.update,
        )
    yield "labels"
    with stage("filter", catalog.count(INGESTED)) as bar:
        filter_labels(catalog, config, bar.update)
    yield "filter"
    with stage("fetch", catalog.count(WANTED, UNAVAILABLE)) as bar:
        fetch_media(catalog, config, bar.update)
    yield "fetch"
    with stage("probe", catalog.count(FETCHED)) as bar:
        probe_media(catalog, config, bar.update)
    yield "probe"
    settle_duplicates(catalog)
    with stage("plan", catalog.count(SOUND)) as bar:
        plan_shards(catalog, config, bar.update)
    yield "plan"
    failures += encode_shards(catalog, config)
    yield "encode"

    finished = catalog.finished_shards()
    with stage("report", catalog.count()) as bar:
        report = write_reports(catalog, config, bar.update)
    if not failures:
        splits: dict[Split, list[ShardInfo]] = {
            "train": [info for split, info in finished if split == "train"],
            "val": [info for split, info in finished if split == "val"],
        }
        write_atomic(
            output / MANIFEST_FILE,
            encode_manifest(make_manifest(recipe, splits, version=config.manifest_version)),
        )
    print(summary(report, finished))
    yield "report"


def encode_shards(catalog: Catalog, config: ShardgenConfig) -> list[str]:
    """Encode every planned shard that does not stand on disk yet; returns what went wrong, a line
    per shard.
    """
    output = Path(config.output)
    finished = {info.name: info for split, info in catalog.finished_shards()}
    lost = [
        info.name
        for split, info in catalog.finished_shards()
        if stored_size(output / split, info.name) != info.bytes
    ]
    names = sorted(lost + catalog.unfinished_shards())

    def jobs() -> Iterator[ShardJob | None]:
        if not (output / EMPTY_PROMPT_FILE).is_file():
            yield None
        for name in names:
            plan = catalog.shard_plan(name)
            try:  # whole paths: a worker of a cluster stands in another folder
                media = {
                    window.media_xxh3: str(catalog.media_path(window.media_xxh3).resolve())
                    for window in plan.windows
                }
            except CatalogError as error:
                failures.append(f"{name}: {error}")
                continue
            yield ShardJob(plan, media)

    failures: list[str] = []
    num_samples, begin_s = 0, time.monotonic()
    work = partial(
        encode_unit, spec=encode_spec(config), decode_threads=config.executor.decode_threads
    )
    with stage("encode", len(names), "shard") as bar:
        for job, result in run_units(work, jobs(), config):
            # the output can't be written or the model read: no shard will fare better
            if isinstance(result, OSError):
                raise result
            if isinstance(result, ValueError):
                failures.append(f"{job.plan.name if job else EMPTY_PROMPT_FILE}: {result}")
            elif isinstance(result, ShardResult):
                problem = record_shard(catalog, result, finished.get(result.name))
                failures += [problem] if problem else []
                num_samples += result.info.num_samples if result.info else 0
                bar.update(1)
    remember_rate(catalog, time.monotonic() - begin_s, num_samples)
    return failures


def record_shard(catalog: Catalog, result: ShardResult, before: ShardInfo | None) -> str | None:
    """Write a finished shard into the catalog. One that stood `before` must be what it was; else
    says so.
    """
    if before is None:
        lost = [(lost.key, lost.reason, lost.detail) for lost in result.lost]
        catalog.finish_shard(result.name, result.info, lost, result.notes)
        return None
    if result.info == before:
        return None
    return (
        f"{result.name}: was lost, and encoding it again gives other bytes than the catalog has (another device or "
        f"number of threads?); build into a new output folder"
    )


def run_units(
    work: Callable[[ShardJob | None], ShardResult | None],
    jobs: Iterator[ShardJob | None],
    config: ShardgenConfig,
) -> Iterator[tuple[ShardJob | None, ShardResult | Failure | None]]:
    """The executor that the configuration names."""
    executor, threads = config.executor, config.encode.threads
    if executor.kind == "local":
        return run_local(work, jobs, executor.workers, worker_environments(config))
    return run_ray(
        work,
        jobs,
        executor.workers,
        executor.address,
        thread_environment(threads),
        threads,
        int(config.encode.device == "cuda"),
    )


def encode_spec(config: ShardgenConfig) -> EncodeSpec:
    """What every worker is told."""
    encode = config.encode
    return EncodeSpec(
        output=str(Path(config.output).resolve()),
        model=str(Path(encode.model).resolve()),
        device=encode.device,
        dtype=encode.dtype,
        threads=encode.threads,
        text_batch=encode.text_batch,
        vae_batch=encode.vae_batch,
        fit=config.windows.fit,
        zstd_level=encode.zstd_level,
        jpg_quality=encode.jpg_quality,
        jpg_for_images=encode.jpg_for_images,
        mp4=encode.mp4,
        mp4_encoder="h264_nvenc" if encode.mp4_encoder == "h264_nvenc" else "libx264",
    )


def settle_encoder(config: ShardgenConfig) -> ShardgenConfig:
    """The configuration with the H.264 encoder by name: from here on it is part of the recipe.
    Raises PictureError.
    """
    encoder = choose_mp4_encoder(config.encode.mp4_encoder) if config.encode.mp4 else "libx264"
    return replace(config, encode=replace(config.encode, mp4_encoder=encoder))


def worker_environments(config: ShardgenConfig) -> list[dict[str, str]]:
    """Threads for each worker, and on CUDA one of the visible GPUs, in turn."""
    threads = thread_environment(config.encode.threads)
    if config.encode.device != "cuda":
        return [threads] * config.executor.workers
    visible = os.environ.get(
        "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(config.executor.workers)))
    ).split(",")
    if len(visible) < config.executor.workers:
        raise ConfigError(
            f"executor.workers = {config.executor.workers}, but CUDA_VISIBLE_DEVICES names {visible}: on "
            f"CUDA a worker needs a GPU of its own"
        )
    return [
        threads | {"CUDA_VISIBLE_DEVICES": device} for device in visible[: config.executor.workers]
    ]


def thread_environment(threads: int) -> dict[str, str]:
    """Threads per process, for libraries that read them once when they are loaded."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


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
