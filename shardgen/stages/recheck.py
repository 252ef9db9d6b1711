"""A look at the footage of clips that have their samples already: where the file beside a label no
longer holds the bytes that the samples were made from, the clip is flagged media_changed. The
shard stays as it is, because a shard never changes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.rows import Clip, MediaFile
from shardgen.catalog.tables import ACCEPTED, MEDIA_CHANGED
from shardgen.media.errors import FetchError
from shardgen.media.local import find_local, hash_local
from shardgen.media.parallel import in_parallel


class _Found(NamedTuple):
    """A clip's file as it lies there now."""

    path: Path
    size_bytes: int
    mtime_ns: int


def flag_changed_media(
    catalog: Catalog, root: Path, workers: int, advance: Callable[[int], None]
) -> None:
    """Flag the accepted clips whose local file was replaced since, and take the flag off where the
    old bytes are back. `root` is the label tree. A file is hashed only if its size or mtime is
    another than when it was hashed last; what is gone or can't be read says nothing.
    """
    for page in catalog.pages(ACCEPTED):
        to_hash: dict[str, Clip] = {}
        for clip, found in in_parallel(page, partial(_look, root), workers=workers):
            if found is None:
                continue
            known = catalog.media.source(str(found.path))
            if known is None or found != (known.path, known.size_bytes, known.mtime_ns):
                to_hash[str(found.path)] = clip
        changed, unchanged = [], []
        for path, now in in_parallel(to_hash, _hash, workers=workers):
            clip = to_hash[path]
            if now is None:
                continue
            if now.media_xxh3 == clip.media_xxh3:
                unchanged.append(clip.id)
                catalog.media.record_source([], path, now)
            else:
                # Not recorded: the catalog goes on knowing this path by the bytes that its
                # samples were made from, and says so if they are ever needed again.
                changed.append(clip.id)
        catalog.set_flag(MEDIA_CHANGED, changed)
        catalog.clear_flag(MEDIA_CHANGED, unchanged)
        advance(len(page))


def _look(root: Path, clip: Clip) -> _Found | None:
    path = find_local(root / clip.label, clip.clip_id, clip.media_type)
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return _Found(path, status.st_size, status.st_mtime_ns) if path and status else None


def _hash(path: str) -> MediaFile | None:
    try:
        return MediaFile(*hash_local(Path(path)))
    except FetchError:
        return None
