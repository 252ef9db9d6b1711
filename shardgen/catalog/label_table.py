"""What the catalog knows and writes of label files, for the stage that reads them."""

from collections.abc import Sequence
from typing import Any

import msgspec

from shardgen.catalog.database import Database
from shardgen.catalog.tables import ACCEPTED, FAILED, GONE, IngestRow, Seen
from shardgen.labels.parse import Label

# The columns that come from the label file, in the order of IngestRow, whose last field, the packed
# label, goes into a table of its own.
_INSERT = """
INSERT INTO clips (
    id, generation,
    label, size_bytes, mtime_ns, label_xxh3, status, reason, detail, byte_offset,
    clip_id, media_type, category, station, broadcast_date, url,
    declared_width_px, declared_height_px, declared_duration_s, declared_fps, num_shots)
VALUES (?, ?,  ?, ?, ?, ?, ?, ?, ?, ?,  ?, ?, ?, ?, ?, ?,  ?, ?, ?, ?, ?)
"""
_REPLACE = """
UPDATE clips SET
    label = ?, size_bytes = ?, mtime_ns = ?, label_xxh3 = ?, status = ?, reason = ?, detail = ?,
    byte_offset = ?,
    clip_id = ?, media_type = ?, category = ?, station = ?, broadcast_date = ?, url = ?,
    declared_width_px = ?, declared_height_px = ?, declared_duration_s = ?, declared_fps = ?,
    num_shots = ?
WHERE id = ?
"""
_FLAG_CHANGED = """
UPDATE clips SET flags = trim(replace(flags, 'label_changed', '') || ' label_changed') WHERE id = ?
"""
_unpack_label = msgspec.msgpack.Decoder(Label).decode


class LabelTable:
    """The label files of an open catalog."""

    def __init__(self, database: Database) -> None:
        self._database, self._db = database, database.connection

    def known(self, folder: str) -> dict[str, Seen]:
        """File name -> what was seen, of the label files directly in `folder` (relative, "" for
        the root).
        """
        prefix = f"{folder}/" if folder else ""
        end = f"{folder}0" if folder else "\U0010ffff"  # "0" follows "/"
        rows = self._db.execute(
            "SELECT label, id, size_bytes, mtime_ns, label_xxh3, status FROM clips "
            "WHERE label >= ? AND label < ?",
            (prefix, end),
        )
        return {
            name: Seen(*seen) for label, *seen in rows if "/" not in (name := label[len(prefix) :])
        }

    def folders(self) -> set[str]:
        """The folders of all label files that are not known to be gone."""
        rows = self._db.execute("SELECT label FROM clips WHERE status != ?", (GONE,))
        return {label.rpartition("/")[0] for (label,) in rows}

    def write(
        self,
        new: Sequence[tuple[Any, ...]],
        changed: Sequence[tuple[Seen, IngestRow]],
        touched: Sequence[tuple[Seen, int]],
        gone: Sequence[Seen],
    ) -> None:
        """Record what ingest found: new rows (IngestRow), changed files, files with a new mtime
        only, files gone.

        A clip whose windows are planned keeps its row: only the flag says that its label has
        changed since or is gone.
        """
        generation = self._database.generation
        (first_id,) = self._db.execute("SELECT coalesce(max(id), 0) + 1 FROM clips").fetchone()
        # Planned clips keep their rows: what a shard was made from must stay on record.
        planned = (ACCEPTED, FAILED)
        flagged = [seen.id for seen, _ in changed if seen.status in planned]
        flagged += [seen.id for seen in gone if seen.status in planned]
        replaced = [(seen.id, row) for seen, row in changed if seen.status not in planned]
        with self._database.transaction() as db:
            db.executemany(
                _INSERT,
                [(id_, generation, *columns) for id_, (*columns, _) in enumerate(new, first_id)],
            )
            db.executemany(
                "INSERT INTO bodies VALUES (?, ?)",
                [(id_, body) for id_, (*_, body) in enumerate(new, first_id)],
            )
            db.executemany(_REPLACE, [(*columns, id_) for id_, (*columns, _) in replaced])
            db.executemany(
                "UPDATE bodies SET body = ? WHERE id = ?",
                [(row.body, id_) for id_, row in replaced],
            )
            db.executemany(
                "UPDATE clips SET mtime_ns = ? WHERE id = ?",
                [(mtime_ns, seen.id) for seen, mtime_ns in touched],
            )
            db.executemany(
                "UPDATE clips SET status = ?, reason = 'label_gone', detail = '' WHERE id = ?",
                [(GONE, seen.id) for seen in gone if seen.status not in planned],
            )
            db.executemany(_FLAG_CHANGED, [(id_,) for id_ in flagged])

    def read(self, clip: int) -> Label:
        """The Label of row `clip`, as it was when it was read."""
        (body,) = self._db.execute("SELECT body FROM bodies WHERE id = ?", (clip,)).fetchone()
        return _unpack_label(body)
