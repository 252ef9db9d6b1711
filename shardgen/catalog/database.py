"""One open catalog file: how it is opened, its transactions, and the values that are remembered
from run to run.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shardgen.catalog.tables import INDEXES, SCHEMA

# Flags are words with a space between two: with one at both ends each can be found whole.
_SET_FLAG = """
UPDATE clips SET flags = trim(flags || ' ' || :flag)
WHERE id = :clip AND instr(' ' || flags || ' ', ' ' || :flag || ' ') = 0
"""
_CLEAR_FLAG = """
UPDATE clips SET flags = trim(replace(' ' || flags || ' ', ' ' || :flag || ' ', ' '))
WHERE id = :clip
"""


class CatalogError(ValueError):
    """The catalog can't be used or would contradict itself; the message says with what."""


class Database:
    """A connection. Rows come as plain tuples; the modules of this package give them names."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self.connection = path, connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything inside is committed together, or nothing."""
        self.connection.execute("BEGIN IMMEDIATE")
        with self.connection:
            yield self.connection

    def recall(self, name: str, default: str = "") -> str:
        """What `remember` was given under this name."""
        row = self.connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else default

    def remember(self, name: str, value: str) -> None:
        """Store a value from run to run; it must not be empty."""
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def flag(self, flag: str, clips: Iterable[int]) -> None:
        """Flag these rows, inside a transaction; a row has a flag once."""
        self.connection.executemany(_SET_FLAG, [{"clip": clip, "flag": flag} for clip in clips])

    def unflag(self, flag: str, clips: Iterable[int]) -> None:
        """Take a flag off these rows, inside a transaction."""
        self.connection.executemany(_CLEAR_FLAG, [{"clip": clip, "flag": flag} for clip in clips])

    def build_indexes(self) -> None:
        """Build the indexes that the later stages need; cheap when they exist."""
        self.connection.executescript(INDEXES)

    @property
    def generation(self) -> int:
        """How many plans were made before now: what "catalogued first" counts by, whatever was
        interrupted when.
        """
        return int(self.recall("generation", "0"))


def open_to_write(path: Path) -> Database:
    """Open or create a catalog, for the one process that writes it. Raises CatalogError."""
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        # pages: each checkpoint waits for the disk
        connection.execute("PRAGMA wal_autocheckpoint = 16384")
        # KiB: a transaction of labels is written once, not spilled
        connection.execute("PRAGMA cache_size = -65536")
        connection.executescript(SCHEMA)
        database = Database(path, connection)
        if connection.execute("SELECT 1 FROM clips LIMIT 1").fetchone():
            database.build_indexes()
    except sqlite3.Error as error:
        raise CatalogError(
            f"{path}: can't open the catalog: {error}; is the folder read-only, or the disk full?"
        ) from error
    return database


def open_to_read(path: Path) -> Database:
    """Open a catalog that another process may be writing; nothing of it is changed, its tables
    included. Raises CatalogError.
    """
    uri = path.resolve().as_uri()
    try:
        if not path.is_file():
            raise sqlite3.OperationalError("no such file")
        try:
            connection = sqlite3.connect(f"{uri}?mode=ro", uri=True, isolation_level=None)
            connection.execute("SELECT 1 FROM meta LIMIT 1").fetchone()
        except sqlite3.OperationalError:
            # On a read-only disk SQLite can't make the file through which readers and a writer
            # agree. Without a log beside it the catalog was closed well and nobody writes it, so
            # there is nothing to agree on.
            if path.with_name(f"{path.name}-wal").exists():
                raise
            connection = sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)
            connection.execute("SELECT 1 FROM meta LIMIT 1").fetchone()
    except sqlite3.Error as error:
        raise CatalogError(f"{path}: can't read the catalog: {error}") from error
    return Database(path, connection)
