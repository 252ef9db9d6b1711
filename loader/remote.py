"""Datasets behind http(s):// or s3://: Range reads of whole samples, with a cache on disk that
ranks share.

obstore does the transport: one wheel without dependencies whose requests run outside Python's
lock, with S3, GCS, Azure and plain HTTP behind one call. (fsspec would bring aiohttp, an event
loop, and a package more for each kind of store.)

A request is repeated for `retry_for_s` seconds, so a server may die and return; what is not there
is not asked for again. What was read may be kept in a cache (cache.py), which is content-addressed:
an entry's name holds the hash of its shard from the manifest, so that nothing in it is ever out of
date. What the server had damaged does not stay in it: once the server is repaired, so are its
readers.

Left out: reading ahead within a shard (the shuffle parts neighbours), and a cache in memory (the
page cache is one).
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import obstore
import obstore.exceptions
import obstore.store
import xxhash

from loader.cache import Cache

log = logging.getLogger(__name__)
Result = TypeVar("Result")
RETRY_FOR_S = 600.0
_PERMANENT = (
    obstore.exceptions.PermissionDeniedError,
    obstore.exceptions.UnauthenticatedError,
    obstore.exceptions.NotSupportedError,
    obstore.exceptions.InvalidPathError,
)


class RemoteError(ConnectionError):
    """A store does not answer, or refuses; the message names the object, the cause and what to
    do.
    """


class RemoteStore:
    """A dataset folder behind a URL; see loader.store.Store. Credentials and endpoints come from
    the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), as every tool for S3 reads them.

    Without `cache` each epoch reads everything from the server. Raises RemoteError once
    `retry_for_s` is over.
    """

    def __init__(self, url: str, cache: Cache | None, retry_for_s: float = RETRY_FOR_S):
        self.url, self.cache, self._retry_for_s = url.rstrip("/"), cache, retry_for_s
        self._closed = threading.Event()
        try:
            self._store = obstore.store.from_url(
                self.url,
                client_options={
                    "allow_http": url.startswith("http:") or _plain_endpoint(),
                    "timeout": "60s",
                    "connect_timeout": "5s",
                },
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=0)},
            )
        except (ValueError, obstore.exceptions.BaseError) as error:
            raise RemoteError(f"{url}: not a store that can be read: {error}") from error

    def read_file(self, name: str, xxh3: str = "") -> bytes:
        """A whole object; cached where its hash is known, and right. Raises FileNotFoundError and
        RemoteError.
        """
        cached = self.cache.get(xxh3) if self.cache and xxh3 else None
        if cached is not None:
            return bytes(cached)
        data = self._retry(name, lambda: obstore.get(self._store, name).bytes().to_bytes())
        if self.cache and xxh3 and xxhash.xxh3_128_hexdigest(data) == xxh3:
            self.cache.put(xxh3, data)
        return data

    def open(self, name: str, size: int, xxh3: str) -> "RemoteFile":
        return RemoteFile(self, name, size, xxh3)

    def missing(self, names: list[str]) -> list[str] | None:
        return None  # a request for each would take as long as reading them

    def close(self) -> None:
        self._closed.set()

    def read_range(self, name: str, start: int, end: int) -> memoryview:
        """Bytes start:end of an object, fewer at its end. Raises FileNotFoundError and
        RemoteError.
        """

        def request() -> memoryview:
            try:
                return memoryview(obstore.get_range(self._store, name, start=start, end=end))
            except obstore.exceptions.GenericError as error:
                # range not satisfiable; obstore has no class for it
                if "status code: 416" not in str(error):
                    raise
                return memoryview(b"")

        return self._retry(name, request)

    def _retry(self, name: str, request: Callable[[], Result]) -> Result:
        deadline_s, pause_s = time.monotonic() + self._retry_for_s, 0.1
        while True:
            try:
                return request()
            except FileNotFoundError:
                raise FileNotFoundError(
                    errno.ENOENT, "No such object", f"{self.url}/{name}"
                ) from None
            except obstore.exceptions.BaseError as error:
                cause = str(error).split("\n")[0]
                if isinstance(error, _PERMANENT):
                    raise RemoteError(
                        f"{self.url}/{name}: refused: {cause}. Check the credentials, and that the "
                        f"server takes Range requests"
                    ) from error
                if time.monotonic() + pause_s > deadline_s:
                    raise RemoteError(
                        f"{self.url}/{name}: no answer for {self._retry_for_s:g} s: {cause}. Start "
                        f"again once the server is back: the run resumes"
                    ) from error
                log.warning("%s/%s: %s; trying again", self.url, name, cause)
            if self._closed.wait(pause_s):
                raise RemoteError(
                    f"{self.url}/{name}: {cause}; not tried again, because its reader was closed"
                )
            pause_s = min(2 * pause_s, 5.0)


class RemoteFile:
    """A tar behind a URL; see loader.store.File."""

    def __init__(self, store: RemoteStore, name: str, size: int, xxh3: str):
        self._store, self._name, self._size, self._xxh3 = store, name, size, xxh3

    def read(self, offset: int, size: int) -> memoryview:
        cache, entry = self._store.cache, self._entry(offset, size)
        cached = cache.get(entry) if cache else None
        if cached is not None:
            return cached
        data = self._store.read_range(self._name, offset, min(offset + size, self._size))
        if cache:
            cache.put(entry, data)
        return data

    def forget(self, offset: int, size: int) -> None:
        if self._store.cache:
            self._store.cache.drop(self._entry(offset, size))

    def _entry(self, offset: int, size: int) -> str:
        return f"{self._xxh3}-{offset}-{size}"


def _plain_endpoint() -> bool:
    return any(
        os.environ.get(name, "").startswith("http:")
        for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL")
    )
