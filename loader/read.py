"""One sample out of a shard: where it lies (.idx), its bytes (one pread), whether they are intact
(.xxh3).

The members of a sample are adjacent in the tar, so what is wanted of it is one contiguous read
into a buffer that the thread keeps; each member is then checked against its xxh3_64 before
anything looks at it. A sample that can't be used is reported, counted, and replaced by the next
intact one of the same bucket: the rule depends on the dataset alone, so every rank keeps its
number of steps and a repeated run sees the same samples. When more than `max_damaged` samples
turn out bad, the run stops: that many are no accident.

Left out: mmap (a truncated file would be a bus error, and one read per sample costs nothing
beside zstd), and reading several samples at once (the shuffle has parted neighbours).
"""

import errno
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from loader.manifest import (
    MANIFEST_FILE,
    DatasetError,
    Manifest,
    Member,
    ShardInfo,
    decode_hashes,
    decode_index,
    load_manifest,
)
from loader.sample import JSON, LATENT, SampleError, SampleMeta, decode_meta, split_member_name
from loader.shape import WAN22

log = logging.getLogger(__name__)

# the extensions that a sample has -> those to read beside json
Wanted = Callable[[Sequence[str]], Sequence[str]]


class TooManyDamagedError(ValueError):
    """More samples were damaged than the run tolerates; the message names the last and the
    limit.
    """


class Damage(NamedTuple):
    """A sample that could not be used. `key` is "" and `member` the file where the shard itself
    is unreadable.
    """

    shard: str
    key: str
    member: str
    reason: str

    def __str__(self) -> str:
        return f"shard {self.shard}, key {self.key or '(unknown)'}, member {self.member}: {self.reason}"


class DamagedError(ValueError):
    """Carries a Damage from where it is found to where the sample is replaced."""

    def __init__(self, damage: Damage):
        super().__init__(str(damage))
        self.damage = damage


class Sample(NamedTuple):
    """`members` holds the verified stored bytes by extension; they are valid until this thread's
    next read.
    """

    meta: SampleMeta
    shard: str
    members: dict[str, memoryview]


class File(Protocol):
    def read(self, offset: int, size: int) -> memoryview:
        """Up to `size` bytes at `offset`, fewer at the end of the file; valid until this thread's
        next read.
        """

    def forget(self, offset: int, size: int) -> None:
        """What `read` gave for these was damaged: it must not come from a cache again."""


class Store(Protocol):
    """Where a dataset lies. The first two methods raise FileNotFoundError for what isn't there;
    after `close` nobody waits for a server that does not answer.

    `xxh3` is the file's hash by the manifest, "" where there is none: a name for caches. Readers
    check it themselves.
    """

    def read_file(self, name: str, xxh3: str = "") -> bytes: ...
    def open(self, name: str, size: int, xxh3: str) -> File: ...
    def close(self) -> None: ...


class LocalFile:
    """pread into a buffer per thread: fresh memory for megabytes each time would cost more than
    the read.
    """

    _buffers = threading.local()

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # not before the last reader in another thread lets go of it
        weakref.finalize(self, os.close, self._fd)

    def read(self, offset: int, size: int) -> memoryview:
        buffer = getattr(self._buffers, "buffer", b"")
        if len(buffer) < size:  # twice, so that it seldom grows: what isn't touched costs no memory
            buffer = self._buffers.buffer = np.empty(2 * size, np.uint8)
        view, num_read = memoryview(buffer)[:size], 0
        while num_read < size and (
            got := os.preadv(self._fd, [view[num_read:]], offset + num_read)
        ):
            num_read += got
        return view[:num_read]

    def forget(self, offset: int, size: int) -> None:
        pass


class LocalStore:
    def __init__(self, folder: Path):
        self.folder = folder

    def read_file(self, name: str, xxh3: str = "") -> bytes:
        return (self.folder / name).read_bytes()

    def open(self, name: str, size: int, xxh3: str) -> File:
        return LocalFile(self.folder / name)

    def close(self) -> None:
        pass


def open_store(location: Path | str, cache_dir: Path | None = None, cache_bytes: int = 0) -> Store:
    """The store behind a folder or a URL; a remote one keeps up to `cache_bytes` in `cache_dir`,
    where there is one.

    Raises DatasetError for a URL that can't be used.
    """
    if "://" not in str(location):
        return LocalStore(Path(location))
    try:
        from loader.remote import Cache, RemoteStore
    except ImportError as error:
        raise DatasetError(
            f"{location}: remote datasets need the extra remote: pip install 'newsreel[remote]' "
            f"({error})"
        ) from error
    return RemoteStore(str(location), Cache(cache_dir, cache_bytes) if cache_dir else None)


def read_dataset(
    location: Path | str, cache_dir: Path | None = None, cache_bytes: int = 0
) -> tuple[Store, Manifest]:
    """The store of a dataset and its manifest. Raises DatasetError."""
    store = open_store(location, cache_dir, cache_bytes)
    return store, load_manifest(
        partial(store.read_file, MANIFEST_FILE), f"{location}/{MANIFEST_FILE}"
    )


class Shard(NamedTuple):
    """An open shard: members by sample, hash by member name; `media` holds further members of the
    same samples.
    """

    info: ShardInfo
    file: File
    samples: list[list[Member]]
    hashes: dict[str, str]
    media: "Shard | None"


def open_shard(store: Store, split: str, info: ShardInfo, media: ShardInfo | None = None) -> Shard:
    """Open a shard (and that of its media) and check the side files against the manifest. Raises
    DamagedError.
    """
    name = f"{split}/{info.name}"
    part = ".idx"
    try:
        index = store.read_file(f"{name}.idx", info.idx_xxh3)
        if xxhash.xxh3_128_hexdigest(index) != info.idx_xxh3:
            raise DatasetError("its hash differs from the manifest's")
        samples = decode_index(index, f"{name}.idx")
        if len(samples) != info.num_samples:
            raise DatasetError(
                f"it holds {len(samples)} samples, the manifest says {info.num_samples}"
            )
        part = ".xxh3"
        hashes = store.read_file(f"{name}.xxh3", info.xxh3_xxh3)
        if xxhash.xxh3_128_hexdigest(hashes) != info.xxh3_xxh3:
            raise DatasetError("its hash differs from the manifest's")
        part = ".tar"
        file = store.open(f"{name}.tar", info.bytes, info.tar_xxh3)
        return Shard(
            info,
            file,
            samples,
            decode_hashes(hashes, f"{name}.xxh3"),
            open_shard(store, split, media) if media else None,
        )
    except (OSError, DatasetError) as error:
        raise DamagedError(Damage(info.name, "", f"{info.name}{part}", _reason(error))) from error


def _reason(error: OSError | ValueError) -> str:
    """Why a read failed, in words; what isn't the data's fault (too many open files, no
    permission) is raised on.
    """
    if isinstance(error, OSError):
        if error.errno not in (errno.ENOENT, errno.EIO, errno.ESTALE):
            raise error
        return error.strerror or str(error)
    return str(error)


def read_sample(shard: Shard, position: int, wanted: Wanted) -> Sample:
    """Read and check sample `position` of a shard: its json and what `wanted` asks for. Raises
    DamagedError.
    """
    extensions = [split_member_name(member.name)[1] for member in shard.samples[position]]
    key = split_member_name(shard.samples[position][0].name)[0]
    in_media = []
    if shard.media:
        in_media = [split_member_name(member.name)[1] for member in shard.media.samples[position]]
    asked = wanted([*extensions, *in_media])
    views = {}
    if shard.media and (from_media := [extension for extension in asked if extension in in_media]):
        views = {
            extension: memoryview(bytes(view))  # the next read takes the buffer
            for extension, view in _read_members(shard.media, position, from_media).items()
        }
    views |= _read_members(
        shard, position, [JSON, *(extension for extension in asked if extension not in views)]
    )

    def damaged(extension: str, reason: str) -> DamagedError:
        return DamagedError(Damage(shard.info.name, key, f"{key}.{extension}", reason))

    try:
        meta = decode_meta(views[JSON])
    except SampleError as error:
        raise damaged(JSON, str(error)) from error
    if meta.key != key or str(meta.bucket) != shard.info.bucket:
        raise damaged(
            JSON, f"it describes key {meta.key} of {meta.bucket}, in a shard of {shard.info.bucket}"
        )
    if meta.latent.shape != WAN22.latent_shape(meta.bucket):
        raise damaged(
            LATENT,
            f"shape {list(meta.latent.shape)}, a {meta.bucket} has {list(WAN22.latent_shape(meta.bucket))}",
        )
    return Sample(meta, shard.info.name, views)


def _read_members(shard: Shard, position: int, extensions: Sequence[str]) -> dict[str, memoryview]:
    """One read over the members asked for, each checked against its hash."""
    members = {split_member_name(member.name)[1]: member for member in shard.samples[position]}
    key = split_member_name(shard.samples[position][0].name)[0]

    def damaged(extension: str, reason: str) -> DamagedError:
        return DamagedError(Damage(shard.info.name, key, f"{key}.{extension}", reason))

    for extension in extensions:
        if extension not in members:
            raise damaged(extension, f"missing; the sample has {', '.join(members)}")
    first = min(members[extension].offset for extension in extensions)
    end = max(members[extension].offset + members[extension].size for extension in extensions)
    try:
        data = shard.file.read(first, end - first)
    except FileNotFoundError as error:  # a remote shard is first asked for here
        raise DamagedError(
            Damage(shard.info.name, "", f"{shard.info.name}.tar", _reason(error))
        ) from error
    except OSError as error:
        raise damaged(extensions[0], _reason(error)) from error
    views = {}
    for extension in extensions:
        _, offset, size = members[extension]
        views[extension] = data[offset - first : offset - first + size]
        if len(views[extension]) < size:
            reason = f"short: {len(views[extension])} of {size} bytes; the shard is truncated"
        elif xxhash.xxh3_64_hexdigest(views[extension]) != shard.hashes.get(
            members[extension].name
        ):
            reason = "damaged: its bytes differ from the .xxh3 file's hash"
        else:
            continue
        shard.file.forget(first, end - first)
        raise damaged(extension, reason)
    return views


def replacements(
    shards: Sequence[ShardInfo], shard: int, position: int
) -> Iterator[tuple[int, int]]:
    """The sample itself, then what may stand in for it: the rest of its shard in a circle, then
    the next shards.

    Those start at the same position, so that the samples of a lost shard don't all turn into one.
    """
    num = len(shards)
    for i in [(shard + step) % num for step in range(num)]:
        if shards[i].bucket == shards[shard].bucket:
            size = shards[i].num_samples
            yield from ((i, (position + step) % size) for step in range(size))


class Reader:
    """Reads the samples of one split of a dataset; safe to use from several threads.

    At most `max_open` shards stay open (their index in memory, their file descriptor). `damages`
    lists what could not be used, each once. `media` are the shards with the samples' media, by
    name, of an index of foreign tars.
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
    ):
        self._store, self._split, self._shards, self._media = store, split, shards, media
        self._rejected: set[tuple[str, str]] = set()
        self._max_open, self._max_damaged = max_open, max_damaged
        self._open: OrderedDict[int, _Slot] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self.damages: list[Damage] = []

    def read(self, shard: int, position: int, wanted: Wanted) -> Sample:
        """The sample, or the first intact one of `replacements`. Raises TooManyDamagedError."""
        lost = -1
        for i, candidate in replacements(self._shards, shard, position):
            if i == lost:
                continue
            try:
                sample = read_sample(self._shard(i), candidate, wanted)
            except DamagedError as error:
                self.report(error.damage)
                lost = i if not error.damage.key else lost  # none of its samples can be had
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
        """Count and log a sample that could not be used. Raises TooManyDamagedError beyond the
        limit.
        """
        with self._lock:
            if damage in self.damages:
                return
            self.damages.append(damage)
            num = len(self.damages)
        log.warning("damaged sample %d of at most %d: %s", num, self._max_damaged, damage)
        if num > self._max_damaged:
            raise TooManyDamagedError(
                f"{damage}; this is number {num}, and max_damaged allows {self._max_damaged}. "
                f"Run `shardgen verify` on the dataset; restore it, or raise max_damaged"
            )

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
