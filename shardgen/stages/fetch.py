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
from shardgen.media.cache import Room
from shardgen.media.download import (
    PERMANENT,
    Fetched,
    FetchError,
    Patience,
    check_url,
    download,
    find_local,
    hash_local,
    in_parallel,
)

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
    patience = Patience(fetch.timeout_s, fetch.retries, fetch.backoff_s, max_bytes)
    room = Room(cache, int(fetch.cache_limit_gib * 2**30))

    def get(request: _Request) -> Fetched:
        if not request.host:
            return hash_local(Path(request.source))
        if room.full:
            raise FetchError(
                "cache_full",
                f"{cache} holds {fetch.cache_limit_gib} GiB that shards still need; build "
                f"again to go on, or raise fetch.cache_limit_gib",
                may_pass=True,
            )
        return download(request.source, cache, schemes, patience, arriving=room.hold)

    with Urls(catalog.db) as urls:
        requests = _requests(catalog, config, urls, advance)
        for request, got in in_parallel(
            requests,
            get,
            lambda request: request.host,
            workers=fetch.workers,
            per_host=fetch.per_host,
        ):
            if isinstance(got, FetchError):
                catalog.record(
                    [Outcome(clip, UNAVAILABLE, got.reason, got.detail) for clip in request.clips]
                )
            else:
                catalog.record_source(request.clips, request.source, *got)
                room.release(got.media_xxh3)
                if request.host and room.take(got.size_bytes):
                    catalog.forget_files(room.evict(catalog.unused_media()))
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
