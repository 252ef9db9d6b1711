"""What the tests of the stages share: a configuration, footage of a colour, and all stages up to
the plan in one call.
"""

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from bench.label_tree import label_bytes, make_label
from loader.manifest import ShardInfo, recipe_id
from loader.mp4 import encode_mp4
from shardgen.catalog.adopt import adopt_exclusions, adopt_recipe
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.tables import FINAL
from shardgen.config import ShardgenConfig, recipe_of, rules_of
from shardgen.encode.config import EncodeConfig
from shardgen.rules.config import WindowsConfig
from shardgen.stages.config import FetchConfig, LabelsConfig
from shardgen.stages.fetch import fetch_media
from shardgen.stages.filter import filter_labels
from shardgen.stages.ingest import ingest_labels
from shardgen.stages.plan import plan_shards, settle_duplicates
from shardgen.stages.probe import probe_media
from shardgen.stages.recheck import flag_changed_media

Ends = dict[str, tuple[str, str]]


def config_of(root: Path, **changes: Any) -> ShardgenConfig:
    return msgspec.structs.replace(
        ShardgenConfig(
            output=str(root.parent),
            labels=LabelsConfig(root=str(root), workers=1),
            encode=EncodeConfig(model=""),
            windows=WindowsConfig(buckets=("64x32x5", "64x32x1"), samples_per_shard=4),
            fetch=FetchConfig(retries=0),
        ),
        **changes,
    )


def open_catalog(config: ShardgenConfig) -> Catalog:
    return Catalog(Path(config.output) / "catalog.sqlite")


def advance(_: int) -> None: ...


def judge_and_fetch(
    catalog: Catalog, config: ShardgenConfig, excluded: frozenset[str] = frozenset()
) -> None:
    adopt_exclusions(catalog.database, excluded)
    filter_labels(catalog, config.labels, rules_of(config), excluded, advance)
    flag_changed_media(catalog, Path(config.labels.root), 2, advance)
    cache = Path(config.output) / "cache"
    fetch_media(catalog, Path(config.labels.root), cache, config.fetch, advance)


def run(config: ShardgenConfig, excluded: frozenset[str] = frozenset()) -> Ends:
    """All stages up to the plan; label -> (status, reason)."""
    with open_catalog(config) as catalog:
        selection = f"{config.labels.limit}/{config.labels.sample_fraction}"
        adopt_recipe(catalog.database, recipe_id(recipe_of(config)), selection)
        ingest_labels(
            catalog, Path(config.labels.root), max_bytes=config.labels.max_bytes, workers=1
        )
        judge_and_fetch(catalog, config, excluded)
        probe_media(catalog, rules_of(config), 1, advance)
        settle_duplicates(catalog, rules_of(config))
        plan_shards(catalog, rules_of(config), advance)
        ends = {row.label: (row.status, row.reason) for row in catalog.clips()}
        assert (
            sum(count.num_labels for count in catalog.status_counts())
            == len(ends)
            == catalog.count(*FINAL)
        )
        return ends


def shards(config: ShardgenConfig) -> dict[str, list[str]]:
    """Shard name -> its labels."""
    with open_catalog(config) as catalog:
        return {
            name: [window.label for window in catalog.shards.plan(name).windows]
            for name in catalog.shards.unfinished()
        }


def row(config: ShardgenConfig, label: str) -> dict[str, Any]:
    with open_catalog(config) as catalog:
        return next(each._asdict() for each in catalog.clips() if each.label == label)


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), (shade % 256, shade // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(num_frames: int, shade: int = 0) -> bytes:
    return encode_mp4(np.full((num_frames, 32, 64, 3), shade, np.uint8), 24.0)


def add_image(root: Path, clip_id: str, media: bytes | None, **label: Any) -> str:
    """Write an image's label and, unless None, its file; returns the label's path."""
    root.mkdir(exist_ok=True)
    made = make_label(clip_id, shots=(("", ""),), media_type="image", **label)
    if media is None:
        made["source_data_info"]["clip_proxy_url"] = ""
    else:
        (root / f"{clip_id}.png").write_bytes(media)
    (root / f"{clip_id}.json").write_bytes(label_bytes(made))
    return f"{clip_id}.json"


def finish_all(config: ShardgenConfig) -> None:
    """Every planned shard counts as written."""
    with open_catalog(config) as catalog:
        for name in catalog.shards.unfinished():
            bucket = catalog.shards.plan(name).bucket
            digests = {"tar_xxh3": "", "idx_xxh3": "", "xxh3_xxh3": ""}
            info = ShardInfo(name=name, bucket=bucket, num_samples=1, bytes=1, **digests)
            catalog.shards.finish(name, info)
