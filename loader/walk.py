"""One split, walked once: every sample by itself, in key order, the tail included. For
validation, which chooses its samples from the whole split and must see the same ones in every
world.

There are no threads and no state here, nothing random, and no caption is dropped: which samples,
as which task and with which seed is for the caller to say.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import torch

from loader.batch import Batch, BatchMaker, Choice
from loader.dataset import open_datasets
from loader.feed_config import FeedConfig
from loader.manifest import DatasetError, Split
from loader.order import once
from loader.read import TooManyDamagedError
from loader.sample import SampleMeta
from loader.shape import Bucket
from loader.shard import DamagedError
from loader.vae.encoder import VAEEncoder

MAX_OPEN = 64  # shards per dataset; in key order the next sample lies in any of them


class WalkPlace(NamedTuple):
    """One sample of a walk: (shard, position) of `dataset`."""

    key: str
    dataset: int
    shard: int
    position: int
    bucket: Bucket


class Walk:
    """The samples of one split of `data.datasets`: `places` lists them in key order, without the
    excluded ones; `batch` reads one.

    Of `data` this takes datasets, exclude, condition and the cache; weights, i2v_share,
    caption_dropout and threads are of no meaning here. Raises DatasetError for datasets that
    can't be used, which a split with a damaged index is.
    """

    def __init__(
        self,
        data: FeedConfig,
        split: Split,
        device: torch.device | str,
        vae: VAEEncoder | None = None,
        reads_given: bool = False,
    ):
        self.datasets = open_datasets(data, split)
        # no damage is tolerated: another sample in its place would be another measurement
        self._readers = [
            dataset.reader(max_open=MAX_OPEN, max_damaged=0) for dataset in self.datasets
        ]
        self._maker = BatchMaker(
            self.datasets,
            self._readers,
            condition=data.condition,
            device=torch.device(device),
            vae=vae,
            reads_given=reads_given,
        )
        places = []
        for number, (dataset, reader) in enumerate(zip(self.datasets, self._readers, strict=True)):
            try:
                keys = [reader.keys(shard) for shard in range(len(dataset.shards))]
            except DamagedError as error:
                raise DatasetError(
                    f"{dataset.name}: {error}; run `shardgen verify` on it"
                ) from error
            for key, shard, position in once(keys, dataset.excluded):
                bucket = Bucket.parse(dataset.shards[shard].bucket)
                places.append(WalkPlace(key, number, shard, position, bucket))
        self.places: list[WalkPlace] = sorted(places)

    def batch(
        self, place: WalkPlace, *, is_i2v: bool, seed: int, drop_caption: bool = False
    ) -> Batch:
        """The sample as a batch of one; `is_i2v` and `seed` are passed on. `drop_caption`: with
        the text of the empty prompt. Raises TooManyDamagedError, naming it, if it is damaged.
        """

        def choose(meta: SampleMeta) -> Choice:
            return Choice(is_i2v=is_i2v, caption_dropped=drop_caption, seed=seed)

        where = [(place.shard, place.position)]
        with self._no_other(place):
            return self._maker.make(place.dataset, place.bucket, where, choose)

    def meta(self, place: WalkPlace) -> SampleMeta:
        """The sample's metadata alone. Raises TooManyDamagedError if it is damaged."""
        with self._no_other(place):
            return self._readers[place.dataset].read(place.shard, place.position, lambda _: ()).meta

    def members(self, place: WalkPlace, names: Collection[str]) -> dict[str, bytes]:
        """The sample's stored members of these names, those that it has. Raises
        TooManyDamagedError if one is damaged.
        """
        with self._no_other(place):
            sample = self._readers[place.dataset].read(
                place.shard, place.position, lambda there: [name for name in there if name in names]
            )
        return {name: bytes(view) for name, view in sample.members.items() if name in names}

    @contextmanager
    def _no_other(self, place: WalkPlace) -> Iterator[None]:
        """What the reader says of max_damaged, which has no meaning here, is said otherwise."""
        try:
            yield
        except TooManyDamagedError as error:
            damage = self._readers[place.dataset].damages[-1]
            raise TooManyDamagedError(
                f"{damage}; no other sample is taken in its place where samples are compared: run "
                f"`shardgen verify` on {self.datasets[place.dataset].name} and restore it, or "
                f"leave its label out by data.exclude"
            ) from error

    def close(self) -> None:
        """Stop waiting for servers."""
        for dataset in self.datasets:
            dataset.store.close()

    def __enter__(self) -> "Walk":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
