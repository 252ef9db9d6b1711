"""Fill search.sqlite from a catalog, in the background, a bounded piece at a time.

Each pass copies the filter columns of rows that changed, then the sample keys, then indexes the
texts that are new or changed. Every piece is one transaction that also says how far it came, so a
pass that was killed goes on where it stood. While a build writes, a pass is repeated only when the
time since the last one is many times what it took: the index never costs the build more than a few
per cent of one core.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from shardgen.catalog.database import CatalogError
from shardgen.labels.parse import Label
from tools.dashboard.catalog import CatalogView, NarrowRow
from tools.dashboard.search import (
    CUBE,
    FIELDS,
    INDEXES,
    ROW_BITS,
    SCHEMA,
    SEARCH_FILE,
    VERSION,
    bigrams,
    day_number,
)

log = logging.getLogger(__name__)
ROWS_PER_PIECE, TEXTS_PER_PIECE = 5000, 2000
REST_FACTOR, SHORTEST_REST_S = 20, 5.0
_decode_label = msgspec.msgpack.Decoder(Label).decode


class Progress(NamedTuple):
    """How far the index is. `rows_ready`: filters answer; `texts_ready`: the search does."""

    rows_ready: bool
    texts_ready: bool
    num_rows: int
    num_texts: int
    error: str = ""


class Indexer:
    """Keeps one dataset's search.sqlite up to date from a thread of its own."""

    def __init__(self, catalog: CatalogView, own: Path) -> None:
        self.catalog, self.path = catalog, own / SEARCH_FILE
        self.progress = Progress(False, False, 0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"index {own.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the piece that is being written."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        seen: tuple[int, ...] = ()
        rest_s = SHORTEST_REST_S
        while not self._stop.is_set():
            signature = self.catalog.signature()
            if signature != seen:
                try:
                    rest_s = max(SHORTEST_REST_S, REST_FACTOR * self.update())
                    seen, error = signature, ""
                except (sqlite3.Error, OSError, CatalogError) as problem:
                    # A busy catalog and a full disk both pass: say so and try again.
                    error = str(problem)
                    log.warning("index %s: %s", self.path, problem)
                self.progress = self.progress._replace(error=error)
            self._stop.wait(rest_s)

    def update(self) -> float:
        """One pass over the catalog; returns the seconds that looking through all rows took. Raises
        sqlite3.Error, OSError, CatalogError.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(_open(self.path, str(self.catalog.path))) as db:
            complete = _recall(db, "rows_ready") == "1"
            self.progress = Progress(
                rows_ready=complete,
                texts_ready=_recall(db, "texts_ready") == "1",
                num_rows=_count(db),
                num_texts=int(_recall(db, "num_texts") or 0),
            )
            started = time.monotonic()
            if not (self._copy_rows(db) and self._copy_keys(db)):
                return 0.0
            _finish_rows(db)
            self.progress = self.progress._replace(rows_ready=True, num_rows=_count(db))
            elapsed_s = time.monotonic() - started
            if self._index_texts(db):
                _remember(db, "texts_ready", "1")
                self.progress = self.progress._replace(texts_ready=True)
            return elapsed_s

    def _copy_rows(self, db: sqlite3.Connection) -> bool:
        """Bring `rows` up to date; False if it was stopped on the way."""
        numbers = _Numbers(db)
        after = 0
        while rows := self.catalog.page(after, ROWS_PER_PIECE):
            if self._stop.is_set():
                return False
            known = {
                row[0]: tuple(row)
                for row in db.execute(
                    f"SELECT id, revision, label_hash, day, {', '.join(FIELDS)} FROM rows "
                    "WHERE id BETWEEN ? AND ?",
                    (rows[0].id, rows[-1].id),
                )
            }
            with db:
                db.execute("BEGIN")
                new = [_narrow(row, numbers, known.get(row.id)) for row in rows]
                db.executemany(
                    f"INSERT OR REPLACE INTO rows VALUES ({', '.join('?' * (4 + len(FIELDS)))})",
                    [row for row in new if known.get(row[0]) != row],
                )
            after = rows[-1].id
        return True

    def _copy_keys(self, db: sqlite3.Connection) -> bool:
        after = ""
        while page := self.catalog.window_page(after, ROWS_PER_PIECE):
            if self._stop.is_set():
                return False
            with db:
                db.execute("BEGIN")
                db.executemany(
                    "INSERT OR IGNORE INTO windows VALUES (?, ?)",
                    [(clip, bytes.fromhex(key)) for key, clip in page],
                )
            after = page[-1][0]
        return True

    def _index_texts(self, db: sqlite3.Connection) -> bool:
        """Index every text that has no document of its row's revision; False if stopped."""
        # documents ascend by (revision, row), so new rows and each revision have their own mark
        for (revision,) in db.execute("SELECT DISTINCT revision FROM rows ORDER BY 1").fetchall():
            name = f"texts_until {revision}"
            while True:
                after = int(_recall(db, name) or 0)
                ids = [
                    row[0]
                    for row in db.execute(
                        "SELECT id FROM rows WHERE id > ? AND revision = ? ORDER BY id LIMIT ?",
                        (after, revision, TEXTS_PER_PIECE),
                    )
                ]
                if not ids:
                    break
                if self._stop.is_set():
                    return False
                self._index_piece(db, ids, revision, name)
        return True

    def _index_piece(
        self, db: sqlite3.Connection, ids: Sequence[int], revision: int, name: str
    ) -> None:
        documents = [
            ((revision << ROW_BITS) | number, *texts_of(_decode_label(body)))
            for number, body in self.catalog.bodies(ids)
            if body
        ]
        num_texts = self.progress.num_texts + len(ids)
        with db:
            db.execute("BEGIN")
            db.executemany(
                "INSERT INTO texts (rowid, caption, stt, ocr) VALUES (?, ?, ?, ?)", documents
            )
            _remember(db, name, str(ids[-1]))
            _remember(db, "num_texts", str(num_texts))
        self.progress = self.progress._replace(num_texts=num_texts)


class _Numbers:
    """The number of each (field, name), made when it is first seen."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._known: dict[tuple[str, str], int] = {
            (field, name): number
            for number, field, name in db.execute("SELECT number, field, name FROM names")
        }

    def of(self, field: str, name: str) -> int:
        number = self._known.get((field, name))
        if number is None:
            cursor = self._db.execute(
                "INSERT INTO names (field, name) VALUES (?, ?)", (field, name)
            )
            number = self._known[field, name] = int(cursor.lastrowid or 0)
        return number


def texts_of(label: Label) -> tuple[str, str, str]:
    """Captions, speech and text in the picture, each as the index has it."""
    captions = [each.text for each in label.scenes] + [each.text for each in label.objects]
    captions += [*label.semantic, *label.application, label.keyword]
    # a catalog whose labels were read without the text in the picture has none to search
    ocr = label.ocr or ()
    return bigrams("\n".join(captions)), bigrams(label.stt_script), bigrams("\n".join(ocr))


def _narrow(row: NarrowRow, numbers: _Numbers, known: tuple[int, ...] | None) -> tuple[int, ...]:
    # 63 bits, because SQLite's integers have a sign
    label_hash = xxhash.xxh3_64_intdigest(row.label_xxh3.encode()) >> 1
    revision = 0
    if known:
        revision = known[1] + (known[2] != label_hash)
    return (
        row.id,
        revision,
        label_hash,
        day_number(row.broadcast_date),
        *(numbers.of(field, getattr(row, field)) for field in FIELDS),
    )


def _open(path: Path, catalog: str) -> sqlite3.Connection:
    """Open the index for writing; one of another version or another catalog is thrown away."""
    db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    # rebuildable: what a power cut takes is made again
    db.execute("PRAGMA synchronous = OFF")
    db.execute("PRAGMA cache_size = -65536")
    db.executescript(SCHEMA)
    identity = f"{VERSION} {catalog}"
    if (found := _recall(db, "identity")) != identity:
        if found:
            for (table,) in db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL "
                "AND name NOT LIKE 'texts_%' AND name NOT LIKE 'sqlite_%'"
            ).fetchall():
                db.execute(f"DROP TABLE {table}")
            db.executescript(SCHEMA)
        _remember(db, "identity", identity)
    # fewer, larger pieces on disk: the default merges them 32 times as often
    db.execute("INSERT INTO texts (texts, rank) VALUES ('hashsize', 33554432)")
    return db


def _finish_rows(db: sqlite3.Connection) -> None:
    db.executescript(INDEXES)
    fields = ", ".join(CUBE)
    with db:
        db.execute("BEGIN")
        db.execute("DELETE FROM cube")
        db.execute(f"INSERT INTO cube SELECT {fields}, count(*) FROM rows GROUP BY {fields}")
        _remember(db, "rows_ready", "1")


def _count(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM rows").fetchone()[0])


def _recall(db: sqlite3.Connection, name: str) -> str:
    row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return str(row[0]) if row else ""


def _remember(db: sqlite3.Connection, name: str, value: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))
