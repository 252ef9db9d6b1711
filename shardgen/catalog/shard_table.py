"""Shards and their windows: planned once, written once, never changed. A window that can't be made
is struck off its clip, and a clip that has lost all of them has failed.
"""

import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from loader.manifest import ShardInfo
from shardgen.catalog.database import CatalogError, Database
from shardgen.catalog.rows import LostWindow, WindowFlag
from shardgen.rules.shards import ShardPlan
from shardgen.rules.windows import Window

_ADD_WINDOW = "INSERT INTO windows SELECT ?, id, ?, ? FROM clips WHERE label = ?"
_ACCEPT = """
UPDATE clips SET status = 'accepted', split = ?, num_windows = num_windows + 1, flags = ?
WHERE label = ?
"""
_FLAG_CLIP_OF = """
UPDATE clips SET flags = trim(flags || ' ' || :flag)
WHERE id = (SELECT clip FROM windows WHERE key = :key)
    AND instr(' ' || flags || ' ', ' ' || :flag || ' ') = 0
"""
_STRIKE_WINDOW = """
UPDATE clips SET num_windows = num_windows - 1, flags = trim(flags || ' window_lost'), detail = ?
WHERE id = ?
"""
_FAIL = "UPDATE clips SET status = 'failed', reason = ? WHERE id = ? AND num_windows = 0"
_decode_window = msgspec.json.Decoder(Window).decode
_decode_info = msgspec.json.Decoder(ShardInfo).decode


class ShardTable:
    """The shards of an open catalog."""

    def __init__(self, database: Database) -> None:
        self._database, self._db = database, database.connection

    def next_numbers(self) -> dict[tuple[str, str], int]:
        """(split, bucket) -> the first free shard number."""
        rows = self._db.execute("SELECT split, bucket, count(*) FROM shards GROUP BY 1, 2")
        return {(split, bucket): number for split, bucket, number in rows}

    def record_plan(self, plans: Iterable[ShardPlan]) -> int:
        """Fix new shards for ever, accept their clips, and begin the next generation; returns
        their number.

        Raises CatalogError for a key that another sample has, with both sources named.
        """
        number = 0
        with self._database.transaction() as db:
            # Shards, windows and clips in one transaction: a killed build has all of the plan or
            # none of it.
            for plan in plans:
                number += 1
                db.execute(
                    "INSERT INTO shards VALUES (?, ?, ?, 0, NULL)",
                    (plan.name, plan.split, plan.bucket),
                )
                for window in plan.windows:
                    _refuse_repeated(db, window)
                    body = msgspec.json.encode(window)
                    db.execute(_ADD_WINDOW, (window.key, plan.name, body, window.label))
                    db.execute(_ACCEPT, (plan.split, " ".join(window.flags), window.label))
            if number:
                self._database.remember("generation", str(self._database.generation + 1))
        return number

    def num_planned(self) -> int:
        """Shards that are planned, written or not."""
        (number,) = self._db.execute("SELECT count(*) FROM shards").fetchone()
        return int(number)

    def unfinished(self) -> list[str]:
        """Names of the planned shards that are still to be written, in order."""
        rows = self._db.execute("SELECT name FROM shards WHERE NOT done ORDER BY name")
        return [name for (name,) in rows]

    def plan(self, name: str) -> ShardPlan:
        """The plan of one shard, windows by ascending key."""
        split, bucket = self._db.execute(
            "SELECT split, bucket FROM shards WHERE name = ?", (name,)
        ).fetchone()
        bodies = self._db.execute("SELECT body FROM windows WHERE shard = ? ORDER BY key", (name,))
        windows = [_decode_window(body) for (body,) in bodies]
        return ShardPlan(name=name, split=split, bucket=bucket, windows=windows)

    def windows_of(self, clip: int) -> list[Window]:
        """The planned windows of one row, in time order."""
        bodies = self._db.execute("SELECT body FROM windows WHERE clip = ?", (clip,))
        windows = [_decode_window(body) for (body,) in bodies]
        return sorted(windows, key=lambda window: (window.shot, window.start_ms))

    def finish(
        self,
        name: str,
        info: ShardInfo | None,
        lost: Sequence[LostWindow] = (),
        flags: Sequence[WindowFlag] = (),
    ) -> None:
        """A shard is on disk (None: no sample of it could be made).

        A clip that has lost all its windows becomes `failed` with that reason; one that keeps
        some is flagged.
        """
        with self._database.transaction() as db:
            db.executemany(_FLAG_CLIP_OF, [flag._asdict() for flag in flags])
            for key, reason, detail in lost:
                (clip,) = db.execute("SELECT clip FROM windows WHERE key = ?", (key,)).fetchone()
                db.execute(_STRIKE_WINDOW, (detail, clip))
                db.execute(_FAIL, (reason, clip))
            db.execute(
                "UPDATE shards SET done = 1, info = ? WHERE name = ?",
                (msgspec.json.encode(info) if info else None, name),
            )

    def finished(self) -> list[tuple[str, ShardInfo]]:
        """(split, ShardInfo) of every shard on disk, in order."""
        rows = self._db.execute(
            "SELECT split, info FROM shards WHERE info IS NOT NULL ORDER BY name"
        )
        return [(split, _decode_info(info)) for split, info in rows]


def _refuse_repeated(db: sqlite3.Connection, window: Window) -> None:
    other = db.execute(
        "SELECT label FROM windows JOIN clips ON clips.id = clip WHERE key = ?", (window.key,)
    ).fetchone()
    if other:
        raise CatalogError(
            f"key {window.key} is claimed twice: by {other[0]} and by {window.label} (shot "
            f"{window.shot}, start {window.start_ms} ms); remove one of the two label files"
        )
