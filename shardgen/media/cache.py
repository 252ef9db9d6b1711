"""The size limit of the download cache. What a planned or coming shard still needs is never
evicted.

The limit is soft by what is in flight, because servers don't always say how large a file is. When
nothing may go, no more is fetched in this build: the clips are named (cache_full), the shards are
encoded, and the next build fetches on.
"""

import threading
from collections import Counter
from collections.abc import Set
from pathlib import Path


def cached_files(cache: Path) -> list[tuple[int, int, Path]]:
    """(mtime_ns, size in bytes, path) of every whole file in the cache, the oldest first; its
    name is its xxh3_128.
    """
    files = [(path.stat(), path) for path in cache.glob("[0-9a-f][0-9a-f]/*")]
    return sorted((status.st_mtime_ns, status.st_size, path) for status, path in files)


class CacheBudget:
    """How much the cache may still take. `full` and `hold` are for the fetching threads, the rest
    for the one that writes the catalog.
    """

    def __init__(self, cache: Path, limit_bytes: int) -> None:
        self.cache, self.limit_bytes = cache, limit_bytes
        self.held_bytes = sum(size for _, size, _ in cached_files(cache))
        self.full = False
        self._arriving: Counter[str] = Counter()
        self._lock = threading.Lock()

    def hold(self, media_xxh3: str) -> None:
        """A download with this hash is about to get its name. An unused file may have that name:
        now it is used.
        """
        with self._lock:
            self._arriving[media_xxh3] += 1

    def release(self, media_xxh3: str) -> None:
        """The catalog knows of it now."""
        with self._lock:
            self._arriving[media_xxh3] -= 1

    def add(self, size_bytes: int) -> bool:
        """Count a new file; True if the limit is passed now and something should be evicted."""
        self.held_bytes += size_bytes
        return self.held_bytes > self.limit_bytes and not self.full

    def evict(self, unused: Set[str]) -> list[Path]:
        """Delete the oldest of the files that are `unused` (xxh3_128 hex) until a tenth is free;
        returns them.

        If that doesn't get below the limit, the cache is full. A file that is neither unused nor
        in use has just been fetched: it stays.
        """
        evicted = []
        files = cached_files(self.cache)
        self.held_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self.held_bytes <= 0.9 * self.limit_bytes:
                break
            # so that no download gets this name between the question and the deletion
            with self._lock:
                if path.name not in unused or self._arriving[path.name] > 0:
                    continue
                path.unlink()
            evicted.append(path)
            self.held_bytes -= size
        self.full = self.held_bytes > self.limit_bytes
        return evicted
