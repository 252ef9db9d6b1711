"""Which files held which bytes, and what probing those bytes said. A medium is known by the
xxh3_128 of its bytes, whatever file or URL it came from.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from shardgen.catalog.database import CatalogError, Database
from shardgen.catalog.rows import MediaFile
from shardgen.media.errors import MediaError
from shardgen.media.probe import Probe

_UNUSED = """
SELECT media_xxh3 FROM sources
EXCEPT SELECT media_xxh3 FROM clips WHERE status IN ('fetched', 'sound')
EXCEPT SELECT media_xxh3 FROM clips JOIN windows ON clip = clips.id JOIN shards ON shard = name
       WHERE NOT done
"""
# What follows from this is deleted. No local path holds two slashes in a row.
_BAD_DOWNLOADS = """
SELECT path FROM sources JOIN media USING (media_xxh3)
WHERE error_reason != '' AND (source LIKE 'http://%' OR source LIKE 'https://%')
"""
_NEEDED_URLS = """
SELECT DISTINCT url, media_xxh3
FROM clips JOIN windows ON clip = clips.id JOIN shards ON shard = name
WHERE NOT done AND url != ''
"""


class MediaTable:
    """The media of an open catalog. A `source` is a local path or a URL."""

    def __init__(self, database: Database) -> None:
        self._database, self._db = database, database.connection

    def source(self, source: str) -> MediaFile | None:
        """The file that a source was hashed as, if it was hashed before."""
        row = self._db.execute(
            "SELECT path, size_bytes, mtime_ns, media_xxh3 FROM sources WHERE source = ?",
            (source,),
        ).fetchone()
        if row is None:
            return None
        path, size_bytes, mtime_ns, media_xxh3 = row
        return MediaFile(Path(path), size_bytes, mtime_ns, media_xxh3)

    def record_source(self, clips: Sequence[int], source: str, file: MediaFile) -> None:
        """The media of `clips` were found: they are fetched."""
        with self._database.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?, ?)",
                (source, str(file.path), file.size_bytes, file.mtime_ns, file.media_xxh3),
            )
            db.executemany(
                "UPDATE clips SET reason = '', detail = '' WHERE id = ? AND status = 'unavailable'",
                [(clip,) for clip in clips],
            )
            db.executemany(
                "UPDATE clips SET status = 'fetched', media_xxh3 = ? WHERE id = ?",
                [(file.media_xxh3, clip) for clip in clips],
            )

    def files(self, media_xxh3: str) -> list[MediaFile]:
        """Every file that held these bytes when it was hashed."""
        rows = self._db.execute(
            "SELECT path, size_bytes, mtime_ns FROM sources WHERE media_xxh3 = ? ORDER BY source",
            (media_xxh3,),
        )
        return [
            MediaFile(Path(path), size_bytes, mtime_ns, media_xxh3)
            for path, size_bytes, mtime_ns in rows
        ]

    def path(self, media_xxh3: str) -> Path:
        """A file that held these bytes when it was hashed, one that has not changed since if there
        is any. Raises CatalogError if every one is gone.
        """
        files = self.files(media_xxh3)
        paths = [file.path for file in sorted(files, key=lambda file: not file.is_unchanged())]
        for path in paths:
            if path.is_file():
                return path
        raise CatalogError(
            f"media {media_xxh3}: none of {list(map(str, paths))} is there any more; put it back, "
            f"or start a new output folder"
        )

    def lost_urls(self) -> list[str]:
        """URLs of media that planned shards need and of which no file is left."""
        return [
            url
            for url, media_xxh3 in self._db.execute(_NEEDED_URLS).fetchall()
            if not any(file.path.is_file() for file in self.files(media_xxh3))
        ]

    def unused(self) -> set[str]:
        """Hashed media that no shard needs which is still to come or to be written."""
        return {media_xxh3 for (media_xxh3,) in self._db.execute(_UNUSED)}

    def forget_files(self, paths: Iterable[Path]) -> None:
        """These cached files are deleted."""
        with self._database.transaction() as db:
            db.executemany("DELETE FROM sources WHERE path = ?", [(str(path),) for path in paths])

    def bad_downloads(self) -> list[Path]:
        """Cached files of URLs whose answer was no media: the next build is to ask them again."""
        return [Path(path) for (path,) in self._db.execute(_BAD_DOWNLOADS)]

    def record_probe(self, media_xxh3: str, found: Probe | MediaError) -> None:
        """What probing said: the probe, or the reason why there is none."""
        reason, detail, packed = "", "", None
        if isinstance(found, Probe):
            packed = msgspec.json.encode(found)
        else:
            reason, detail = found.reason, found.detail
        self._db.execute(
            "INSERT OR REPLACE INTO media VALUES (?, ?, ?, ?)",
            (media_xxh3, reason, detail, packed),
        )
