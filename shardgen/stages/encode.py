"""The stage that has planned shards encoded: each is independent work for an executor, and its
result goes into the catalog when it is on disk. Shards that were written and have vanished since
are made again, and must come out as they were.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from loader.manifest import ShardInfo
from loader.sample import EMPTY_PROMPT_FILE
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.database import CatalogError
from shardgen.catalog.rates import remember_rate
from shardgen.encode.config import ExecutorConfig
from shardgen.encode.lookahead import run_units
from shardgen.encode.speed import EncodeSpeed
from shardgen.encode.unit import EncodeSpec, ShardJob, ShardResult
from shardgen.encode.worker import encode_unit
from shardgen.encode.write import remove_shard, stored_size


def shards_to_write(catalog: Catalog, output: Path) -> list[str]:
    """Names of the planned shards that do not stand on disk, in order."""
    lost = [
        info.name
        for split, info in catalog.shards.finished()
        if stored_size(output / split, info.name) != info.bytes
    ]
    return sorted(lost + catalog.shards.unfinished())


def encode_shards(
    catalog: Catalog,
    names: Sequence[str],
    spec: EncodeSpec,
    executor: ExecutorConfig,
    advance: Callable[[int], None],
) -> tuple[list[str], EncodeSpeed]:
    """Encode the shards of these names, and the empty prompt if it isn't there; returns what went
    wrong, a line per shard, and how fast it was.

    Raises OSError if the output can't be written or the models can't be read, because no other
    shard would fare better then; ExecutorError if the workers themselves fail.
    """
    finished = {info.name: info for _, info in catalog.shards.finished()}
    failures: list[str] = []
    speed, begin_s = EncodeSpeed(), time.monotonic()
    units = run_units(
        partial(encode_unit, spec=spec, decode_threads=executor.decode_threads),
        _jobs(catalog, names, Path(spec.output), failures),
        executor,
        device=spec.device,
        threads=spec.threads,
    )
    for job, result in units:
        if isinstance(result, OSError):
            raise result
        if isinstance(result, ValueError):
            failures.append(f"{job.plan.name if job else EMPTY_PROMPT_FILE}: {result}")
        elif isinstance(result, ShardResult):
            problem = _record(catalog, result, finished.get(result.name))
            if problem:
                failures.append(problem)
                # what stands under this name is what the catalog has, or nothing: the size of
                # its files alone would not tell them apart
                remove_shard(
                    Path(spec.output) / catalog.shards.plan(result.name).split, result.name
                )
            speed.add(result.info.num_samples if result.info else 0, result.times)
            advance(1)
    speed.elapsed_s = time.monotonic() - begin_s
    remember_rate(catalog.database, speed.elapsed_s, speed.num_windows)
    return failures, speed


def _jobs(
    catalog: Catalog, names: Sequence[str], output: Path, failures: list[str]
) -> Iterator[ShardJob | None]:
    """The units of work, None for the empty prompt. A shard whose footage is gone is a line in
    `failures` instead.
    """
    if not (output / EMPTY_PROMPT_FILE).is_file():
        yield None
    for name in names:
        plan = catalog.shards.plan(name)
        try:
            # Whole paths: a worker of a cluster stands in another folder.
            media = {
                window.media_xxh3: str(catalog.media.path(window.media_xxh3).resolve())
                for window in plan.windows
            }
        except CatalogError as error:
            failures.append(f"{name}: {error}")
            continue
        yield ShardJob(plan, media)


def _record(catalog: Catalog, result: ShardResult, before: ShardInfo | None) -> str | None:
    """Write a finished shard into the catalog. One that stood `before` must be what it was; else
    says so.
    """
    if before is None:
        catalog.shards.finish(result.name, result.info, result.lost, result.flags)
        return None
    if result.info == before:
        return None
    return (
        f"{result.name}: was lost, and encoding it again gives other bytes than the catalog has "
        f"(another device or number of threads?); build into a new output folder"
    )
