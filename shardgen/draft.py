"""Windows on their way into shards. They wait on disk, because those of a whole archive are more than memory holds, and
SQLite sorts them there; its temporary files end with the process, so a build that is killed leaves no draft behind.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import msgspec

from shardgen.plan import Window

_TABLE = """
DROP TABLE IF EXISTS temp.draft;
CREATE TEMP TABLE draft (id INTEGER PRIMARY KEY, split TEXT NOT NULL, bucket TEXT NOT NULL, media_xxh3 TEXT NOT NULL,
    key TEXT NOT NULL, body BLOB NOT NULL);
"""
_unpack_window = msgspec.json.Decoder(Window).decode


class Draft(AbstractContextManager["Draft"]):
    """A temporary table of windows beside the tables of an open catalog; gone at the end of the `with`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.db.executescript(_TABLE)

    def __exit__(self, *_: object) -> None:
        self.db.execute("DROP TABLE temp.draft")

    def add(self, windows: Iterable[Window]) -> None:
        """Lay windows by, in any order."""
        self.db.execute("BEGIN")
        with self.db:
            self.db.executemany("INSERT INTO temp.draft VALUES (NULL, ?, ?, ?, ?, ?)", (
                (window.split, window.bucket, window.media_xxh3, window.key, msgspec.json.encode(window))
                for window in windows))

    def windows(self) -> Iterator[Window]:
        """All windows in plan.window_order, one at a time; only their ids are sorted, not what they hold."""
        for (id_,) in self.db.execute("SELECT id FROM temp.draft ORDER BY split, bucket, media_xxh3, key"):
            yield _unpack_window(self.db.execute("SELECT body FROM temp.draft WHERE id = ?", (id_,)).fetchone()[0])
