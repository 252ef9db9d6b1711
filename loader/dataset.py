"""The datasets of a run, opened: manifest, the shards of one split, what is missing of them, and
which samples people have excluded.

Missing files are not damage. A copy that was cut short must not train on the shards that happen
to be there, so a folder is checked whole before the first sample is read. A server is asked for
one file at a time, so what it lacks is found on the way and counts against `max_damaged` with all
its samples (read.py).
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from loader.exclusions import excluded_labels, read_exclusions
from loader.feed_config import FeedConfig
from loader.manifest import DatasetError, Manifest, ShardInfo, Split, media_shards
from loader.order import Places
from loader.read import Reader
from loader.sample import JSON
from loader.shard import DamagedError, open_shard, read_members
from loader.store import Store, read_dataset

log = logging.getLogger(__name__)
SUFFIXES = (".idx", ".xxh3", ".tar")
_NUM_LOOKUPS = 16  # shards whose metadata are read at a time


class Dataset(NamedTuple):
    """One split of a dataset. `media` are the shards with the samples' media, by shard name, of
    an index of foreign tars; else it is empty.
    """

    name: str
    store: Store
    manifest: Manifest
    split: Split
    shards: list[ShardInfo]
    media: dict[str, ShardInfo]
    excluded: Places

    def reader(self, *, max_open: int, max_damaged: int) -> Reader:
        return Reader(
            self.store,
            self.split,
            self.shards,
            max_open=max_open,
            max_damaged=max_damaged,
            media=self.media,
            layout=self.manifest.layout,
            excluded=self.excluded,
        )


def open_datasets(data: FeedConfig, split: Split) -> list[Dataset]:
    """Open the datasets of a run. Raises DatasetError for one that can't be used or lacks files,
    and for exclusions that can't be read.
    """
    if data.exclude and len(data.exclude) != len(data.datasets):
        raise DatasetError(
            f"data.exclude names {len(data.exclude)} files for {len(data.datasets)} datasets; "
            f'give one for each, "" for none'
        )
    cache_dir = Path(data.cache_dir) if data.cache_dir else None
    cache_bytes = int(data.cache_gib * 2**30)
    datasets = []
    for name, exclude in zip(data.datasets, data.exclude or [""] * len(data.datasets), strict=True):
        store, manifest = read_dataset(name, cache_dir, cache_bytes)
        shards, media = manifest.splits.get(split, []), media_shards(manifest)
        check_files(name, store, split, shards, media)
        dataset = Dataset(name, store, manifest, split, shards, media, excluded=frozenset())
        if exclude:
            labels = excluded_labels(read_exclusions(Path(exclude)))
            dataset = dataset._replace(excluded=find_labels(dataset, labels))
        if media and data.condition == "latent":
            raise DatasetError(
                f"{name}: an index of foreign tars holds no latents; set data.condition = "
                f'"raw", which makes them in training'
            )
        datasets.append(dataset)
    return datasets


def stored_latents(data: FeedConfig) -> FeedConfig:
    """What validation and samples read of a run's datasets, however training makes its latents and
    first frames: those that are stored, of the datasets that store any. Raises DatasetError.
    """
    excludes = data.exclude or [""] * len(data.datasets)
    kept = [
        (name, exclude)
        for name, exclude in zip(data.datasets, excludes, strict=True)
        if not media_shards(read_dataset(name)[1])
    ]
    return msgspec.structs.replace(
        data,
        datasets=[name for name, _ in kept],
        exclude=[exclude for _, exclude in kept],
        condition="latent",
    )


def check_files(
    name: str,
    store: Store,
    split: str,
    shards: Sequence[ShardInfo],
    media: Mapping[str, ShardInfo],
) -> None:
    """Raises DatasetError if files of these shards are missing, where the store can tell."""
    files_of = {
        info.name: [
            f"{split}/{one.name}{suffix}"
            for one in (info, media.get(info.name))
            if one is not None
            for suffix in SUFFIXES
        ]
        for info in shards
    }
    missing = store.missing([path for paths in files_of.values() for path in paths])
    if not missing:
        return
    gone = set(missing)
    lost = [info for info in shards if gone.intersection(files_of[info.name])]
    num_samples = sum(info.num_samples for info in shards)
    num_lost = sum(info.num_samples for info in lost)
    raise DatasetError(
        f"{name}: {len(lost)} of {len(shards)} shards of {split} lack files, which is {num_lost} "
        f"of {num_samples} samples; the first is {missing[0]}. Copy the dataset whole; a shard "
        f"that is lost for good is made again by `shardgen build`"
    )


class _Labelled(msgspec.Struct):
    """Of a KEY.json; all other fields are ignored."""

    label: str


def find_labels(dataset: Dataset, labels: frozenset[str]) -> Places:
    """The samples of these labels. Only their metadata say whose they are, so those of the whole
    split are read; what can't be read is not found, and is damage once it is trained on.
    """

    def search(number: int) -> set[tuple[int, int, str]]:
        found: set[tuple[int, int, str]] = set()
        try:
            shard = open_shard(dataset.store, dataset.split, dataset.shards[number])
        except DamagedError:
            return found
        for position in range(len(shard.samples)):
            try:
                data = read_members(shard, position, [JSON])[JSON]
                label = msgspec.json.decode(data, type=_Labelled).label
            except (DamagedError, msgspec.MsgspecError):
                continue
            if label in labels:
                found.add((number, position, label))
        return found

    with ThreadPoolExecutor(_NUM_LOOKUPS) as pool:
        found_by_shard = list(pool.map(search, range(len(dataset.shards))))
    found = set().union(*found_by_shard)
    log.info(
        "%s: %d samples of %s are excluded, by %d of the %d labels in the list",
        dataset.name,
        len(found),
        dataset.split,
        len({label for _, _, label in found}),
        len(labels),
    )
    return frozenset((shard, position) for shard, position, _ in found)
