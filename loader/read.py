"""The samples of one split, with a substitute for each that can't be used.

A sample that can't be used is reported, counted, and replaced by the next intact one of the same
bucket: the rule depends on the dataset alone, so every rank keeps its number of steps and a
repeated run sees the same samples. When more than `max_damaged` samples turn out bad, the run
stops: that many are no accident. A shard that is gone counts with all of its samples.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from loader.manifest import ShardInfo
from loader.shape import WAN22, LatentLayout
from loader.shard import Damage, DamagedError, Sample, Shard, Wanted, open_shard, read_sample
from loader.store import Store

log = logging.getLogger(__name__)


class TooManyDamagedError(ValueError):
    """More samples were damaged than the run tolerates; the message names the last and the
    limit.
    """


def replacements(
    shards: Sequence[ShardInfo], shard: int, position: int
) -> Iterator[tuple[int, int]]:
    """The sample itself, then what may stand in for it: the rest of its shard in a circle, then
    the next shards of its bucket.

    Those start at the same position, so that the samples of a lost shard don't all turn into one.
    """
    num_shards = len(shards)
    for step in range(num_shards):
        i = (shard + step) % num_shards
        if shards[i].bucket == shards[shard].bucket:
            num_samples = shards[i].num_samples
            for offset in range(num_samples):
                yield i, (position + offset) % num_samples


class Reader:
    """Reads the samples of one split of a dataset; safe to use from several threads.

    At most `max_open` shards stay open (their index in memory, their file descriptor). `media`
    are the shards with the samples' media, by name, of an index of foreign tars. `excluded`
    samples, as (shard, position), never stand in for another one. `damages` lists what could not
    be used, each once, `num_damaged` counts its samples.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        shards: Sequence[ShardInfo],
        *,
        max_open: int,
        max_damaged: int,
        media: Mapping[str, ShardInfo] = {},
        layout: LatentLayout = WAN22,
        excluded: AbstractSet[tuple[int, int]] = frozenset(),
    ):
        self._store, self._split, self._shards, self._media = store, split, shards, media
        self._layout, self._excluded = layout, excluded
        self._rejected: set[tuple[str, str]] = set()  # (shard, key)
        self._max_open, self._max_damaged = max_open, max_damaged
        self._open: OrderedDict[int, _Slot] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self.damages: list[Damage] = []
        self.num_damaged = 0

    def read(self, shard: int, position: int, wanted: Wanted) -> Sample:
        """The sample, or the first intact one of `replacements`. Raises TooManyDamagedError."""
        lost_shard = -1
        for i, candidate in replacements(self._shards, shard, position):
            if i == lost_shard or (i, candidate) in self._excluded:
                continue
            try:
                sample = read_sample(self._shard(i), candidate, wanted, self._layout)
            except DamagedError as error:
                self.report(error.damage)
                if not error.damage.key:
                    lost_shard = i  # none of its samples can be had
                continue
            if (sample.shard, sample.meta.key) not in self._rejected:
                return sample
        raise TooManyDamagedError(
            f"no intact sample is left in the shards of {self._shards[shard].bucket}: run "
            f"`shardgen verify` on the dataset, and restore it"
        )

    def reject(self, damage: Damage) -> None:
        """Replace a sample from now on, though its bytes are intact. Raises TooManyDamagedError
        beyond the limit.
        """
        self._rejected.add((damage.shard, damage.key))
        self.report(damage)

    def report(self, damage: Damage) -> None:
        """Count and log what could not be used. Raises TooManyDamagedError beyond the limit."""
        with self._lock:
            is_new = damage not in self.damages
            if is_new:
                self.damages.append(damage)
                self.num_damaged += damage.num_samples
            num = self.num_damaged
        if is_new:
            log.warning("damaged samples: %d of at most %d: %s", num, self._max_damaged, damage)
        if num > self._max_damaged:
            raise TooManyDamagedError(
                f"{damage}; that makes {num} samples, and max_damaged allows {self._max_damaged}. "
                f"Run `shardgen verify` on the dataset; restore it, or raise max_damaged"
            )

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples, in tar order. Raises DamagedError."""
        opened = self._shard(shard)
        return [opened.key(position) for position in range(len(opened.samples))]

    def _shard(self, i: int) -> Shard:
        with self._lock:
            slot = self._open.setdefault(i, _Slot())
            self._open.move_to_end(i)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        with slot.lock:
            if slot.shard is None:
                info = self._shards[i]
                slot.shard = open_shard(self._store, self._split, info, self._media.get(info.name))
            return slot.shard


class _Slot:
    """A place for an open shard; its lock keeps two threads from opening the same one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shard: Shard | None = None
