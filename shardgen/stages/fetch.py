"""The stage that finds and hashes the media of every wanted clip: wanted -> fetched, or
unavailable with the reason.

Local files come first and are read in place; what is behind URLs goes through the cache. What was
hashed before and has not changed since is not read again, and a server is asked again only for
what may have changed.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.drafts import Urls
from shardgen.catalog.tables import UNAVAILABLE, WANTED, Outcome
from shardgen.config import ShardgenConfig, cache_folder
from shardgen.media.cache import CacheBudget
from shardgen.media.download import PERMANENT, RetryPolicy, download
from shardgen.media.errors import FetchError
from shardgen.media.local import Fetched, find_local, hash_local
from shardgen.media.parallel import in_parallel
from shardgen.media.urls import check_url

Advance = Callable[[int], None]


class _Request(NamedTuple):
    """Media to hash: a local file, or a URL (then `host` is not empty), and the clips that want
    it.
    """

    source: str
    host: str
    clips: list[int]


def fetch_media(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> None:
    """wanted, or unavailable if asking again may help -> fetched (media_xxh3 known), or
    unavailable.

    Raises OSError if the cache can't be written.
    """
    fetch, cache = config.fetch, cache_folder(config)
    schemes, max_bytes = tuple(fetch.schemes), int(fetch.max_file_gib * 2**30)
    retry = RetryPolicy(fetch.timeout_s, fetch.retries, fetch.backoff_s, max_bytes)
    budget = CacheBudget(cache, int(fetch.cache_limit_gib * 2**30))

    def fetch_or_hash(request: _Request) -> Fetched:
        if not request.host:
            return hash_local(Path(request.source))
        if budget.full:
            raise FetchError(
                "cache_full",
                f"{cache} holds {fetch.cache_limit_gib} GiB that shards still need; build "
                f"again to go on, or raise fetch.cache_limit_gib",
                may_pass=True,
            )
        return download(request.source, cache, schemes, retry, arriving=budget.hold)

    def get(request: _Request) -> Fetched | FetchError:
        try:
            return fetch_or_hash(request)
        except FetchError as error:
            return error

    with Urls(catalog.db) as urls:
        requests = _requests(catalog, config, urls, advance)
        for request, got in in_parallel(
            requests,
            get,
            workers=fetch.workers,
            host_of=lambda request: request.host,
            per_host=fetch.per_host,
        ):
            if isinstance(got, FetchError):
                catalog.record(
                    [Outcome(clip, UNAVAILABLE, got.reason, got.detail) for clip in request.clips]
                )
            else:
                catalog.record_source(request.clips, request.source, *got)
                budget.release(got.media_xxh3)
                if request.host and budget.add(got.size_bytes):
                    catalog.forget_files(budget.evict(catalog.unused_media()))
            advance(len(request.clips))


def _requests(
    catalog: Catalog, config: ShardgenConfig, urls: Urls, advance: Advance
) -> Iterator[_Request]:
    """What must be hashed, local files first, then `urls`, which it fills. Clips that need no
    work are recorded on the way.
    """
    root = Path(config.labels.root)
    for row in catalog.clips(WANTED, UNAVAILABLE):
        local = find_local(root / row["label"], row["clip_id"], row["media_type"])
        if local is not None:
            if not _reuse(catalog, [row["id"]], str(local)):
                yield _Request(str(local), "", [row["id"]])
                continue
        elif not row["url"]:
            catalog.record(
                [
                    Outcome(
                        row["id"],
                        UNAVAILABLE,
                        "media_missing",
                        "no file beside the label, no URL in it",
                    )
                ]
            )
        elif row["reason"] in PERMANENT and not config.fetch.ask_again:
            catalog.record([Outcome(row["id"], UNAVAILABLE, row["reason"], row["detail"])])
        else:
            urls.add(row["url"], row["id"])
            continue
        advance(1)
    for url, clips in urls:
        if _reuse(catalog, clips, url):
            advance(len(clips))
            continue
        try:
            yield _Request(url, check_url(url, config.fetch.schemes), clips)
        except FetchError as error:
            catalog.record(
                [Outcome(clip, UNAVAILABLE, error.reason, error.detail) for clip in clips]
            )
            advance(len(clips))


def _reuse(catalog: Catalog, clips: Sequence[int], source: str) -> bool:
    """True if the source was hashed before and its file has the size and mtime of then."""
    known = catalog.source(source)
    if known is None or not unchanged(known):
        return False
    catalog.record_source(clips, source, Path(known["path"]), *known[2:])
    return True


def unchanged(file: sqlite3.Row) -> bool:
    """Whether a hashed file still has the size and mtime of then; one that can't be looked at has
    not, and hashing it again will say why.
    """
    try:
        now = Path(file["path"]).stat()
    except OSError:
        return False
    return (now.st_size, now.st_mtime_ns) == (file["size_bytes"], file["mtime_ns"])
