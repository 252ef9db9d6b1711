"""What waits between two steps of a stage: windows on their way into shards, URLs until all local
files are hashed. It waits on disk, because that of a whole archive is more than memory should
hold, and SQLite sorts it there; its temporary files end with the process, so a build that is
killed leaves nothing behind.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import msgspec

from shardgen.rules.shards import window_order
from shardgen.rules.windows import Window

_TABLE = """
DROP TABLE IF EXISTS temp.draft;
CREATE TEMP TABLE draft (
    id INTEGER PRIMARY KEY, split TEXT NOT NULL, bucket TEXT NOT NULL, media_xxh3 TEXT NOT NULL,
    key TEXT NOT NULL, body BLOB NOT NULL);
"""
_URLS = """
DROP TABLE IF EXISTS temp.urls;
CREATE TEMP TABLE urls (id INTEGER PRIMARY KEY, url TEXT NOT NULL, clip INTEGER NOT NULL);
CREATE INDEX temp.urls_by_url ON urls (url);
"""
_FIRST = """
SELECT id, url FROM temp.urls AS each
WHERE id > ? AND id = (SELECT min(id) FROM temp.urls WHERE url = each.url)
ORDER BY id LIMIT 2000
"""
_unpack_window = msgspec.json.Decoder(Window).decode


class Draft(AbstractContextManager["Draft"]):
    """A temporary table of windows beside the tables of an open catalog; gone at the end of the
    `with`.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.db.executescript(_TABLE)

    def __exit__(self, *_: object) -> None:
        self.db.execute("DROP TABLE temp.draft")

    def add(self, windows: Iterable[Window]) -> None:
        """Insert windows, in any order."""
        self.db.execute("BEGIN")
        with self.db:
            self.db.executemany(
                "INSERT INTO temp.draft VALUES (NULL, ?, ?, ?, ?, ?)",
                ((*window_order(window), msgspec.json.encode(window)) for window in windows),
            )

    def windows(self) -> Iterator[Window]:
        """All windows in `window_order`, one at a time; only their ids are sorted, not what
        they hold.
        """
        ordered = self.db.execute(
            "SELECT id FROM temp.draft ORDER BY split, bucket, media_xxh3, key"
        )
        for row in ordered:
            (body,) = self.db.execute("SELECT body FROM temp.draft WHERE id = ?", row).fetchone()
            yield _unpack_window(body)


class Urls(AbstractContextManager["Urls"]):
    """A temporary table of URLs and the clips that want each; gone at the end of the `with`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.db.executescript(_URLS)

    def __exit__(self, *_: object) -> None:
        self.db.execute("DROP TABLE temp.urls")

    def add(self, url: str, clip: int) -> None:
        """Insert a URL that a clip wants."""
        self.db.execute("INSERT INTO temp.urls VALUES (NULL, ?, ?)", (url, clip))

    def __iter__(self) -> Iterator[tuple[str, list[int]]]:
        """(URL, clips) of each different URL, in the order of their first coming. The catalog may
        be written meanwhile: no cursor stays open, which would keep its log from being
        emptied.
        """
        last_id = 0
        while page := self.db.execute(_FIRST, (last_id,)).fetchall():
            for _, url in page:
                rows = self.db.execute(
                    "SELECT clip FROM temp.urls WHERE url = ? ORDER BY id", (url,)
                ).fetchall()
                yield url, [clip for (clip,) in rows]
            last_id, _ = page[-1]
