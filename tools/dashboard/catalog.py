"""Read-only access to a dataset's catalog while a build may be writing it.

Every method opens the file, reads a bounded amount in one short transaction and closes it, because
a reader that stays in the database keeps the build's checkpoints from shrinking the WAL. Rows come
out as typed tuples.

Left out: anything that looks at all rows. Those answers come from quality_report.json or from the
dashboard's own narrow copy (search.py).
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from loader.manifest import ShardInfo
from shardgen.catalog.database import open_to_read
from shardgen.labels.parse import Label
from shardgen.media.probe import Probe
from shardgen.rules.windows import Window

SCAN_LIMIT_S = 2.0  # how long a search without an index may take

_decode_label = msgspec.msgpack.Decoder(Label).decode
_decode_probe = msgspec.json.Decoder(Probe).decode
_decode_window = msgspec.json.Decoder(Window).decode
_decode_shard = msgspec.json.Decoder(ShardInfo).decode


class Clip(NamedTuple):
    """A row of `clips`, as far as pages show it."""

    id: int
    label: str
    clip_id: str
    status: str
    reason: str
    detail: str
    media_type: str
    category: str
    station: str
    broadcast_date: str
    url: str
    declared_width_px: int | None
    declared_height_px: int | None
    declared_duration_s: float | None
    declared_fps: float | None
    num_shots: int
    caption_chars: int | None
    word_run: int | None
    char_run: int | None
    special_share: float | None
    declared: str
    probed: str
    programme: str
    split: str
    media_xxh3: str
    num_windows: int
    flags: str


class NarrowRow(NamedTuple):
    """What the search index copies of a row: the columns that pages filter by."""

    id: int
    label_xxh3: str
    status: str
    reason: str
    category: str
    station: str
    media_type: str
    broadcast_date: str
    programme: str


class ShardRow(NamedTuple):
    """A planned shard; `info` is None until it is written, or where no sample of it could be."""

    name: str
    split: str
    bucket: str
    done: bool
    info: ShardInfo | None


class Found(NamedTuple):
    """Row ids found by looking through label texts, and whether all of them were looked at."""

    ids: list[int]
    complete: bool


_CLIP = f"SELECT {', '.join(Clip._fields)} FROM clips"
_NARROW = f"SELECT {', '.join(NarrowRow._fields)} FROM clips"


class CatalogView:
    """The catalog at `path`. Its methods raise CatalogError where it can't be read, and let
    sqlite3.OperationalError through where it is busy: the page then says so and tries again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def signature(self) -> tuple[int, ...]:
        """Changes whenever something is written."""
        numbers: list[int] = []
        for path in (self.path, Path(f"{self.path}-wal")):
            try:
                stat = path.stat()
            except OSError:
                continue
            numbers += [stat.st_mtime_ns, stat.st_size]
        return tuple(numbers)

    def status_counts(self) -> dict[str, int]:
        """Label files per status, from the index alone."""
        with self._open() as db:
            return dict(db.execute("SELECT status, count(*) FROM clips GROUP BY 1 ORDER BY 1"))

    def clip(self, clip: int) -> Clip | None:
        """None for a number that no row has, SQLite's largest or above."""
        if clip >= 2**63:
            return None
        with self._open() as db:
            row = db.execute(f"{_CLIP} WHERE id = ?", (clip,)).fetchone()
        return Clip(*row) if row else None

    def clips(self, ids: Sequence[int]) -> list[Clip]:
        """These rows, in the order of `ids`; what is gone is left out."""
        with self._open() as db:
            marks = ", ".join("?" * len(ids))
            rows = [Clip(*row) for row in db.execute(f"{_CLIP} WHERE id IN ({marks})", tuple(ids))]
        by_id = {row.id: row for row in rows}
        return [by_id[each] for each in ids if each in by_id]

    def labelled(self, label: str) -> Clip | None:
        """The row of a label file, by its relative path."""
        with self._open() as db:
            row = db.execute(f"{_CLIP} WHERE label = ?", (label,)).fetchone()
        return Clip(*row) if row else None

    def claims(self, clip_id: str) -> list[Clip]:
        """The rows of every label file that claims this id."""
        with self._open() as db:
            rows = db.execute(f"{_CLIP} WHERE clip_id = ? ORDER BY label LIMIT 20", (clip_id,))
            return [Clip(*row) for row in rows.fetchall()]

    def label(self, clip: int) -> Label | None:
        """The label as it was read; None where it could not be."""
        with self._open() as db:
            row = db.execute("SELECT body FROM bodies WHERE id = ?", (clip,)).fetchone()
        return _decode_label(row[0]) if row and row[0] else None

    def probe(self, media_xxh3: str) -> Probe | None:
        with self._open() as db:
            row = db.execute("SELECT probe FROM media WHERE media_xxh3 = ?", (media_xxh3,))
            found = row.fetchone()
        return _decode_probe(found[0]) if found and found[0] else None

    def media_paths(self, media_xxh3: str) -> list[Path]:
        """Files that held these bytes when they were hashed. They are data: check where they lie
        before opening one.
        """
        with self._open() as db:
            rows = db.execute(
                "SELECT path FROM sources WHERE media_xxh3 = ? ORDER BY source LIMIT 20",
                (media_xxh3,),
            ).fetchall()
        return [Path(row[0]) for row in rows]

    def window(self, key: str) -> tuple[Window, str, int] | None:
        """(window, shard, row of its clip) of a sample key."""
        with self._open() as db:
            row = db.execute(
                "SELECT body, shard, clip FROM windows WHERE key = ?", (key,)
            ).fetchone()
        return (_decode_window(row[0]), row[1], row[2]) if row else None

    def windows(self, keys: Sequence[str]) -> list[Window]:
        """The windows of these keys, in time order."""
        with self._open() as db:
            marks = ", ".join("?" * len(keys))
            rows = db.execute(f"SELECT body FROM windows WHERE key IN ({marks})", tuple(keys))
            found = [_decode_window(row[0]) for row in rows]
        return sorted(found, key=lambda window: (window.shot, window.start_ms))

    def shards(self) -> list[ShardRow]:
        with self._open() as db:
            rows = db.execute("SELECT name, split, bucket, done, info FROM shards ORDER BY name")
            return [
                ShardRow(name, split, bucket, bool(done), _decode_shard(info) if info else None)
                for name, split, bucket, done, info in rows.fetchall()
            ]

    def page(self, after: int, limit: int) -> list[NarrowRow]:
        """The next `limit` rows with an id above `after`."""
        with self._open() as db:
            rows = db.execute(f"{_NARROW} WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
            return [NarrowRow(*row) for row in rows.fetchall()]

    def bodies(self, ids: Sequence[int]) -> list[tuple[int, bytes]]:
        """(id, packed Label) of these rows, those that have one."""
        with self._open() as db:
            marks = ", ".join("?" * len(ids))
            found = db.execute(f"SELECT id, body FROM bodies WHERE id IN ({marks})", tuple(ids))
            return found.fetchall()

    def window_page(self, after: str, limit: int) -> list[tuple[str, int]]:
        """(key, row of its clip) of the next `limit` windows with a key above `after`."""
        with self._open() as db:
            return db.execute(
                "SELECT key, clip FROM windows WHERE key > ? ORDER BY key LIMIT ?", (after, limit)
            ).fetchall()

    def scan(self, texts: Sequence[str], after: int, limit: int) -> Found:
        """Rows whose label holds all these texts, letter by letter, looked for one by one: only for
        as long as there is no index, and for SCAN_LIMIT_S.
        """
        where = " AND ".join(["instr(body, ?) > 0"] * len(texts))
        values = [text.encode() for text in texts]
        ids: list[int] = []
        deadline = time.monotonic() + SCAN_LIMIT_S
        with self._open() as db:
            db.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            try:
                for row in db.execute(
                    f"SELECT id FROM bodies WHERE id > ? AND {where} ORDER BY id LIMIT ?",
                    (after, *values, limit),
                ):
                    ids.append(row[0])
            except sqlite3.OperationalError as error:
                if "interrupted" not in str(error):
                    raise
                return Found(ids, complete=False)
        return Found(ids, complete=True)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(open_to_read(self.path).connection) as db:
            yield db
