"""The stage that finds and hashes the media of every wanted clip: wanted -> fetched, or
unavailable with the reason. Clips that an interrupted build had got further are looked at again,
because their media may have changed since; once they are planned, nothing does.

Local files come first and are read in place; what is behind URLs goes through the cache. What was
hashed before and has not changed since is not read again, and a server is asked again only for
what may have changed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.drafts import Urls
from shardgen.catalog.rows import Clip, MediaFile
from shardgen.catalog.tables import FETCHED, SOUND, UNAVAILABLE, WANTED, Outcome
from shardgen.media.cache import CacheBudget
from shardgen.media.download import PERMANENT, RetryPolicy, download
from shardgen.media.errors import FetchError
from shardgen.media.local import Fetched, find_local, hash_local, list_media, others_beside
from shardgen.media.parallel import in_parallel
from shardgen.media.urls import check_url
from shardgen.stages.config import FetchConfig

# ids count from 1: what is recorded of this one changes no row
_NO_CLIP = 0
TO_FETCH = (WANTED, UNAVAILABLE, FETCHED, SOUND)


class _Request(NamedTuple):
    """Media to hash: a local file, or a URL (then `host` is not empty), and the clips that want
    it.
    """

    source: str
    host: str
    clips: list[int]


def fetch_media(
    catalog: Catalog, root: Path, cache: Path, fetch: FetchConfig, advance: Callable[[int], None]
) -> None:
    """wanted, fetched or sound, or unavailable if asking again may help -> fetched (media_xxh3
    known), or unavailable. `root` is the label tree, `cache` the folder for downloads.

    Raises OSError if the cache can't be written.
    """
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
        done = in_parallel(
            _requests(catalog, root, fetch, urls, advance),
            get,
            workers=fetch.workers,
            host_of=lambda request: request.host,
            per_host=fetch.per_host,
        )
        for request, got in done:
            if isinstance(got, FetchError):
                _record_failure(catalog, request.clips, got)
            else:
                catalog.media.record_source(request.clips, request.source, MediaFile(*got))
                budget.release(got.media_xxh3)
                if request.host and budget.add(got.size_bytes):
                    catalog.media.forget_files(budget.evict(catalog.media.unused()))
            advance(len(request.clips))


def _requests(
    catalog: Catalog, root: Path, fetch: FetchConfig, urls: Urls, advance: Callable[[int], None]
) -> Iterator[_Request]:
    """What must be hashed, local files first, then `urls`, which it fills. Clips that need no
    work are recorded on the way.
    """
    # Labels come in path order, so a few folders are enough to list each one once.
    list_folder = lru_cache(maxsize=16)(list_media)
    for clip in catalog.clips(*TO_FETCH):
        local = find_local(root / clip.label, clip.clip_id, clip.media_type, list_folder)
        if _holds_still(catalog, clip, str(local) if local else clip.url):
            advance(1)
            continue
        if local is not None:
            if not _reuse(catalog, [clip.id], str(local)):
                yield _Request(str(local), "", [clip.id])
                continue
        elif not clip.url:
            detail = "no file beside the label, no URL in it"
            if others := others_beside(root / clip.label, clip.clip_id, list_folder):
                detail += f"; not taken as {clip.media_type}: {', '.join(others)[:200]}"
            catalog.record([Outcome(clip.id, UNAVAILABLE, "media_missing", detail)])
        elif clip.reason in PERMANENT and not fetch.ask_again:
            catalog.record([Outcome(clip.id, UNAVAILABLE, clip.reason, clip.detail)])
        else:
            # After all local files: each URL is asked for once, whatever number of clips want it.
            urls.add(clip.url, clip.id)
            continue
        advance(1)
    # What is planned keeps its plan, but the cache may have been deleted since. If the bytes are
    # others now, encoding will say so.
    for url in catalog.media.lost_urls():
        urls.add(url, _NO_CLIP)
    # All local files are hashed by now or wait in a queue.
    for url, clips in urls:
        if _reuse(catalog, clips, url):
            advance(len(clips))
            continue
        try:
            yield _Request(url, check_url(url, fetch.schemes), clips)
        except FetchError as error:
            _record_failure(catalog, clips, error)
            advance(len(clips))


def _holds_still(catalog: Catalog, clip: Clip, source: str) -> bool:
    """Whether a clip that has its media already has them from this source, which is as it was."""
    if clip.status not in (FETCHED, SOUND):
        return False
    known = catalog.media.source(source)
    return known is not None and known.media_xxh3 == clip.media_xxh3 and known.is_unchanged()


def _record_failure(catalog: Catalog, clips: Sequence[int], error: FetchError) -> None:
    catalog.record([Outcome(clip, UNAVAILABLE, error.reason, error.detail) for clip in clips])


def _reuse(catalog: Catalog, clips: Sequence[int], source: str) -> bool:
    """True if the source was hashed before and its file has the size and mtime of then."""
    known = catalog.media.source(source)
    if known is None or not known.is_unchanged():
        return False
    catalog.media.record_source(clips, source, known)
    return True
