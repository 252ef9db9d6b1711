"""Byte strings in a folder of bounded size, shared by the ranks of a host without a server.

Each entry begins with its own hash, so that a half-written or damaged one is a miss. Entries
appear by rename. The process that has written a hundredth of the bound looks, under a file lock,
whether the least recently used entries must go. The folder may be deleted at any time. Files that
are not named as an entry is are never touched: somebody may have named a folder of his own.

Left out: a cache in memory (the page cache is one).
"""

import errno
import fcntl
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import NamedTuple

import xxhash

from loader.files import TEMPORARY, atomic_file

log = logging.getLogger(__name__)
_HASH_BYTES = 16
# An entry in its folder: the hash of what it is or is a part of, which part, and while it is
# written, by whom.
_ENTRY = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{30}(-\d+-\d+)?(\.\d+-\d+\.tmp)?")
_STALE_S = 600.0  # a temporary file this old belongs to a killed process
# share of the bound above which entries are deleted, and down to which
_FULL, _ROOMY = 0.9, 0.8


class _Entry(NamedTuple):
    used_s: float  # the file's mtime: `get` sets it
    num_bytes: int
    path: Path


class Cache:
    """Byte strings by name in a folder of at most about `max_bytes`; any number of processes may
    share it. A name is an xxh3_128 in hex, with or without "-OFFSET-SIZE" of a part.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._unchecked_bytes = 0
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._make_room()

    def get(self, name: str) -> memoryview | None:
        """What `put` stored under `name`, or None if it is not there (any more) or damaged."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        payload = memoryview(data)[_HASH_BYTES:]
        return payload if xxhash.xxh3_128_digest(payload) == data[:_HASH_BYTES] else None

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Store `data`. A full disk is no fault of the reader's: it is logged, and the cache
        stays as it is.
        """
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True)
            # an entry that a power cut tore is a miss, so nothing needs to wait for the disk
            with atomic_file(path, durable=False) as file:
                file.write(xxhash.xxh3_128_digest(data))
                file.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning(
                "%s: the cache can't take %d bytes more: %s",
                self._folder,
                len(data),
                error.strerror,
            )
        with self._lock:
            self._unchecked_bytes += len(data)
            due = self._unchecked_bytes > self._max_bytes // 100
            if due:
                self._unchecked_bytes = 0
        if due:
            self._make_room()

    def drop(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name

    def _make_room(self) -> None:
        """Above nine tenths of the bound, delete the least recently used down to eight tenths;
        one process at a time.

        The others wait for it: if they went on writing, a slow disk would let them run past the
        bound.
        """
        with (self._folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = []
            for path in self._folder.glob("*/*"):
                if not _ENTRY.fullmatch(path.relative_to(self._folder).as_posix()):
                    continue
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # a temporary file that has just got its name
                entries.append(_Entry(status.st_mtime, status.st_size, path))
            total_bytes = sum(entry.num_bytes for entry in entries)
            is_full = total_bytes > _FULL * self._max_bytes
            target_bytes = int(_ROOMY * self._max_bytes) if is_full else total_bytes
            for entry in sorted(entries):
                is_old = entry.used_s < time.time() - _STALE_S
                is_stale = entry.path.name.endswith(TEMPORARY) and is_old
                if total_bytes > target_bytes or is_stale:
                    entry.path.unlink(missing_ok=True)
                    total_bytes -= entry.num_bytes
