"""The catalog as a build sees it.

A row's identity is the label's relative path; clip_id is an attribute, so two files may claim one
id and both are accounted for. A clip moves through the statuses of tables.py and the build can be
killed between any two transactions: what is written is true, what is not is done again. The
label's text lies in a table of its own (`bodies`), written once, so that the rows which change
stay small. One process writes; WAL lets others read meanwhile.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from shardgen.catalog.database import Database, open_to_read, open_to_write
from shardgen.catalog.label_table import LabelTable
from shardgen.catalog.media_table import MediaTable
from shardgen.catalog.rows import CLIP_COLUMNS, Claim, Clip, StatusCount, clip_of
from shardgen.catalog.shard_table import ShardTable
from shardgen.catalog.tables import REJECTED, REPEATED_ID, Outcome

_PAGE = 2000
_CLIPS = f"SELECT {CLIP_COLUMNS} FROM clips LEFT JOIN media USING (media_xxh3)"
# Of the label files that claim one id, the first row keeps it.
_REPEATED_IDS = """
WITH readable AS (SELECT * FROM clips WHERE status NOT IN ('unreadable', 'gone'))
SELECT id, clip_id, label, status, media_xxh3 FROM readable
WHERE clip_id IN (SELECT clip_id FROM readable GROUP BY 1 HAVING count(*) > 1)
ORDER BY status != 'accepted', generation, label
"""
# Of the clips with the same bytes, the first row is the one to take.
_EQUAL_MEDIA = """
WITH sound AS (SELECT * FROM clips WHERE status IN ('sound', 'accepted'))
SELECT id, clip_id, label, status, media_xxh3 FROM sound
WHERE media_xxh3 IN (SELECT media_xxh3 FROM sound GROUP BY 1 HAVING count(*) > 1)
ORDER BY status != 'accepted', generation, length(clip_id), clip_id, label
"""
_DUPLICATES_OF_NONE = """
SELECT id FROM clips WHERE status = 'duplicate' AND media_xxh3 NOT IN (
    SELECT media_xxh3 FROM clips WHERE status IN ('accepted', 'failed'))
"""
_COUNTS = """
SELECT category, status, reason, count(*) FROM clips GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""
_RECORD = """
UPDATE clips SET status = ?, reason = ?, detail = ?, declared = ?, probed = ? WHERE id = ?
"""
_RECORD_SCORES = """
UPDATE clips SET caption_chars = ?, word_run = ?, char_run = ?, special_share = ?, programme = ?
WHERE id = ?
"""


class LabelScores(NamedTuple):
    """What the caption rules measured of a label, and its programme group."""

    caption_chars: int
    word_run: int
    char_run: int
    special_share: float
    programme: str
    id: int


class Catalog(AbstractContextManager["Catalog"]):
    """An open catalog. One thread of one process writes; every method commits whole or leaves
    nothing behind. Raises CatalogError if the file can't be opened.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.database: Database = open_to_read(path) if read_only else open_to_write(path)
        self.db = self.database.connection
        self.labels = LabelTable(self.database)
        self.media = MediaTable(self.database)
        self.shards = ShardTable(self.database)

    @classmethod
    def open_read_only(cls, path: Path) -> "Catalog":
        """A catalog to look at while a build may write it: short read transactions, no change of
        tables, and every write raises sqlite3.OperationalError. Raises CatalogError.
        """
        return cls(path, read_only=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.db.close()

    def count(self, *statuses: str) -> int:
        """Rows in these statuses; all rows if none is named."""
        where = f"WHERE status IN ({_marks(statuses)})" if statuses else ""
        (number,) = self.db.execute(f"SELECT count(*) FROM clips {where}", statuses).fetchone()
        return int(number)

    def status_counts(self) -> list[StatusCount]:
        """All rows by category, status and reason: the counts add up to the number of label
        files.
        """
        return [StatusCount(*row) for row in self.db.execute(_COUNTS)]

    def clips(self, *statuses: str) -> Iterator[Clip]:
        """Clips in these statuses (all if none is named), in path order."""
        for page in self.pages(*statuses):
            yield from page

    def pages(self, *statuses: str) -> Iterator[list[Clip]]:
        """`clips`, up to 2,000 at a time: callers write between two pages, and no read
        transaction stays open meanwhile.
        """
        # The plus keeps SQLite on the index of labels: on that of statuses it would sort all that
        # is left for each page.
        where = f"+status IN ({_marks(statuses)}) AND" if statuses else ""
        query = f"{_CLIPS} WHERE {where} label > ? ORDER BY label LIMIT {_PAGE}"
        last = ""
        while rows := self.db.execute(query, (*statuses, last)).fetchall():
            page = [clip_of(row) for row in rows]
            yield page
            last = page[-1].label

    def claims(self, clip_id: str) -> list[Clip]:
        """Every readable label that claims this id, in path order."""
        rows = self.db.execute(f"{_CLIPS} WHERE clip_id = ? ORDER BY label", (clip_id,))
        return [clip_of(row) for row in rows]

    def first_labels(self, limit: int) -> list[int]:
        """The rows of the first `limit` label files in path order."""
        rows = self.db.execute(
            "SELECT id FROM clips WHERE status != 'gone' ORDER BY label LIMIT ?", (limit,)
        )
        return [clip for (clip,) in rows]

    def repeated_ids(self) -> list[list[Claim]]:
        """The label files that claim one clip_id, per id; the one that keeps it first."""
        claims: dict[str, list[Claim]] = {}
        for claim in map(Claim._make, self.db.execute(_REPEATED_IDS)):
            claims.setdefault(claim.clip_id, []).append(claim)
        return list(claims.values())

    def rejected_for_their_id(self) -> dict[int, str]:
        """Row -> detail of each label file that was rejected because another claims its id."""
        rows = self.db.execute(
            "SELECT id, detail FROM clips WHERE status = ? AND reason = ?", (REJECTED, REPEATED_ID)
        )
        return dict(rows.fetchall())

    def duplicates_of_none(self) -> list[int]:
        """The rows of duplicates whose bytes no planned clip has (any more)."""
        return [clip for (clip,) in self.db.execute(_DUPLICATES_OF_NONE)]

    def equal_media(self) -> list[list[Claim]]:
        """Clips whose media are equal byte for byte, per medium; the one to take first."""
        groups: dict[str, list[Claim]] = {}
        for claim in map(Claim._make, self.db.execute(_EQUAL_MEDIA)):
            groups.setdefault(claim.media_xxh3, []).append(claim)
        return list(groups.values())

    def record(self, outcomes: Iterable[Outcome]) -> None:
        """Write what a stage decided."""
        rows = [
            (each.status, each.reason, each.detail, each.declared, each.probed, each.id)
            for each in outcomes
        ]
        with self.database.transaction() as db:
            db.executemany(_RECORD, rows)

    def set_flag(self, flag: str, clips: Iterable[int]) -> None:
        """Flag these rows; a row has a flag once."""
        with self.database.transaction():
            self.database.flag(flag, clips)

    def clear_flag(self, flag: str, clips: Iterable[int]) -> None:
        """Take a flag off these rows."""
        with self.database.transaction():
            self.database.unflag(flag, clips)

    def record_scores(self, scores: Iterable[LabelScores]) -> None:
        """Write what the label rules measured."""
        with self.database.transaction() as db:
            db.executemany(_RECORD_SCORES, scores)


def _marks(values: tuple[str, ...]) -> str:
    return ", ".join("?" * len(values))
