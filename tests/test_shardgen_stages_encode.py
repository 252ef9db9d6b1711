"""A shard that was written once stands as it was, or does not stand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stage_runs import add_image, advance, config_of, open_catalog, png, run

from loader.manifest import ShardInfo
from shardgen.encode.config import ExecutorConfig
from shardgen.encode.unit import ShardResult, ShardTimes, spec_of
from shardgen.encode.write import IDX, TAR, XXH3, write_shard
from shardgen.stages.encode import encode_shards, shards_to_write


def test_a_lost_shard_that_comes_back_with_other_bytes_never_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "labels")
    add_image(tmp_path / "labels", "2000001", png(1))
    run(config)
    spec = spec_of(config.encode, tmp_path, "letterbox")
    contents = iter([b"first", b"other", b"other", b"first"])  # of one size

    def run_units(_: object, jobs: Iterator[Any], *rest: object, **named: object) -> Iterator[Any]:
        for job in jobs:
            if job is not None:
                info: ShardInfo = write_shard(
                    tmp_path / job.plan.split,
                    job.plan.name,
                    job.plan.bucket,
                    [(job.plan.windows[0].key, {"json": next(contents)})],
                )
                times = ShardTimes(wall_s=1, waiting_s=0, vae_s=1, text_s=0, writing_s=0)
                yield job, ShardResult(job.plan.name, info, [], [], times)

    monkeypatch.setattr("shardgen.stages.encode.run_units", run_units)
    with open_catalog(config) as catalog:

        def encode() -> list[str]:
            names = shards_to_write(catalog, tmp_path)
            return encode_shards(catalog, names, spec, ExecutorConfig(), advance)[0]

        assert encode() == []
        ((split, info),) = catalog.shards.finished()
        (tmp_path / split / (info.name + IDX)).unlink()
        for _ in range(2):
            (problem,) = encode()
            assert "gives other bytes than the catalog has" in problem
            files = [tmp_path / split / (info.name + suffix) for suffix in (TAR, IDX, XXH3)]
            assert not any(file.exists() for file in files)
        assert encode() == [] and shards_to_write(catalog, tmp_path) == []
