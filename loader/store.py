"""Where a dataset's files lie: in a folder, or behind a URL (remote.py). Two calls are all that a
reader needs: a whole small file, and a range of a tar.
"""

import os
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from loader.manifest import MANIFEST_FILE, DatasetError, Manifest, load_manifest

_thread = threading.local()  # `buffer`: what this thread's reads of local files go into


class File(Protocol):
    """An open tar."""

    def read(self, offset: int, size: int) -> memoryview:
        """Up to `size` bytes at `offset`, fewer at the end of the file; valid until this thread's
        next read.
        """

    def forget(self, offset: int, size: int) -> None:
        """What `read` gave for these was damaged: it must not come from a cache again."""


class Store(Protocol):
    """A dataset folder. `read_file` and `open` raise FileNotFoundError for what isn't there;
    after `close` no call waits for a server that does not answer.

    `xxh3` is the file's hash by the manifest, "" where there is none: a name for caches. Readers
    check it themselves.
    """

    def read_file(self, name: str, xxh3: str = "") -> bytes: ...
    def open(self, name: str, size: int, xxh3: str) -> File: ...
    def missing(self, names: list[str]) -> list[str] | None:
        """Those of these files that are not there, or None where asking costs as much as reading
        them.
        """

    def close(self) -> None: ...


class LocalFile:
    """pread into a buffer per thread: fresh memory for megabytes each time would cost more than
    the read.
    """

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # closed when the last reader, perhaps in another thread, drops it
        weakref.finalize(self, os.close, self._fd)

    def read(self, offset: int, size: int) -> memoryview:
        buffer = getattr(_thread, "buffer", b"")
        if len(buffer) < size:
            # twice as much, so that it seldom grows: what isn't touched costs no memory
            buffer = _thread.buffer = np.empty(2 * size, np.uint8)
        view, num_read = memoryview(buffer)[:size], 0
        while num_read < size:
            count = os.preadv(self._fd, [view[num_read:]], offset + num_read)
            if count == 0:
                break
            num_read += count
        return view[:num_read]

    def forget(self, offset: int, size: int) -> None:
        pass


class LocalStore:
    """A folder on a disk of this machine."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read_file(self, name: str, xxh3: str = "") -> bytes:
        return (self.folder / name).read_bytes()

    def open(self, name: str, size: int, xxh3: str) -> File:
        return LocalFile(self.folder / name)

    def missing(self, names: list[str]) -> list[str] | None:
        return [name for name in names if not (self.folder / name).is_file()]

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
        from loader.cache import Cache
        from loader.remote import RemoteStore
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
    read_bytes = partial(store.read_file, MANIFEST_FILE)
    return store, load_manifest(read_bytes, f"{location}/{MANIFEST_FILE}")
