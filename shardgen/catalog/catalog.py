"""The catalog: SQLite, a row per label file, one status, one reason. All SQL is here, in
tables.py and in draft.py.

The row's identity is the label's relative path; clip_id is an attribute, so two files may claim
one id and both are accounted for. A clip moves through the statuses below and the build can be
killed between any two transactions: what is written is true, what is not is done again. The
label's text lies in a table of its own (`bodies`), written once, so that the rows which change
stay small. One process writes; WAL lets others read meanwhile.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from loader.manifest import ShardInfo
from shardgen.catalog.tables import (
    ACCEPTED,
    DUPLICATE,
    EQUAL_MEDIA,
    FAILED,
    FETCHED,
    GONE,
    INDEXES,
    INGESTED,
    REJECTED,
    REPEATED_IDS,
    SCHEMA,
    SKIPPED,
    SOUND,
    UNAVAILABLE,
    WANTED,
    IngestRow,
    Outcome,
    Seen,
)
from shardgen.labels.parse import Label
from shardgen.rules.shards import ShardPlan, Window


class CatalogError(ValueError):
    """The catalog can't be used or would contradict itself; the message says with what."""


_BODY = len(IngestRow._fields) - 1
_INSERT = (
    f"INSERT INTO clips (id, generation, {', '.join(IngestRow._fields[:_BODY])}) "
    f"VALUES (?, ?{', ?' * _BODY})"
)
_REPLACE = f"UPDATE clips SET {' = ?, '.join(IngestRow._fields[:_BODY])} = ? WHERE id = ?"
_CLIPS = "SELECT clips.*, probe, error_reason, error_detail FROM clips LEFT JOIN media USING (media_xxh3)"
_unpack_label = msgspec.msgpack.Decoder(Label).decode
_unpack_window = msgspec.json.Decoder(Window).decode


class Catalog(AbstractContextManager["Catalog"]):
    """An open catalog. One thread of one process writes; every method commits whole or leaves
    nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.db = sqlite3.connect(path, isolation_level=None)
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = NORMAL")
            # pages: each checkpoint waits for the disk
            self.db.execute("PRAGMA wal_autocheckpoint = 16384")
            # KiB: a transaction of labels is written once, not spilled
            self.db.execute("PRAGMA cache_size = -65536")
            self.db.executescript(SCHEMA)
            if self.db.execute("SELECT 1 FROM clips LIMIT 1").fetchone():
                self.index()
        except sqlite3.Error as error:
            raise CatalogError(
                f"{path}: can't open the catalog: {error}; is the folder read-only, or the disk "
                f"full?"
            ) from error

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything inside is committed together, or nothing."""
        self.db.execute("BEGIN IMMEDIATE")
        with self.db:
            yield self.db

    # -- the recipe
    # ---------------------------------------------------------------------------------------------------

    def recall(self, name: str, default: str = "") -> str:
        """What `remember` was given under this name."""
        row = self.db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else default

    def remember(self, name: str, value: str) -> None:
        """Keep a value from run to run; it must not be empty."""
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def adopt_recipe(self, recipe_id: str, selection: str) -> None:
        """Start a build: what the recipe or the selection (limit, fraction) changed is judged anew.

        Raises CatalogError if shards were planned under another recipe, because they never change.
        """
        again = []
        if (old := self.recall("recipe_id", recipe_id)) != recipe_id:
            if self.db.execute("SELECT 1 FROM shards LIMIT 1").fetchone():
                raise CatalogError(
                    f"{self.path}: its shards were planned under recipe {old}, the configuration gives "
                    f"{recipe_id}, and a shard never changes: choose another output folder, or take the "
                    f"configuration back to the one echoed beside the catalog"
                )
            again = [WANTED, FETCHED, SOUND, REJECTED, DUPLICATE, UNAVAILABLE, SKIPPED]
        elif self.recall("selection", selection) != selection:
            again = [SKIPPED, WANTED]
        with self.transaction() as db:
            self.remember("recipe_id", recipe_id)
            self.remember("selection", selection)
            db.executemany(
                "UPDATE clips SET status = ?, reason = '', detail = '' WHERE status = ?",
                [(INGESTED, status) for status in again],
            )

    # -- ingest
    # -------------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """How many plans were made before now: what "catalogued first" counts by, whatever was
        interrupted when.
        """
        return int(self.recall("generation", "0"))

    def known_labels(self, folder: str) -> dict[str, Seen]:
        """File name -> what was seen, of the label files directly in `folder` (relative, "" for
        the root).
        """
        prefix = f"{folder}/" if folder else ""
        end = f"{folder}0" if folder else "\U0010ffff"  # "0" follows "/"
        rows = self.db.execute(
            "SELECT label, id, size_bytes, mtime_ns, label_xxh3, status FROM clips "
            "WHERE label >= ? AND label < ?",
            (prefix, end),
        )
        return {
            name: Seen(*seen) for label, *seen in rows if "/" not in (name := label[len(prefix) :])
        }

    def label_folders(self) -> set[str]:
        """The folders of all label files that are not known to be gone."""
        rows = self.db.execute("SELECT label FROM clips WHERE status != ?", (GONE,))
        return {row[0].rpartition("/")[0] for row in rows}

    def write_labels(
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
        generation = self.generation
        first = self.db.execute("SELECT coalesce(max(id), 0) + 1 FROM clips").fetchone()[0]
        fixed = [seen for seen, _ in changed if seen.status in (ACCEPTED, FAILED)]
        fixed += [seen for seen in gone if seen.status in (ACCEPTED, FAILED)]
        free = [(seen, row) for seen, row in changed if seen.status not in (ACCEPTED, FAILED)]
        with self.transaction() as db:
            db.executemany(
                _INSERT, [(first + i, generation, *row[:_BODY]) for i, row in enumerate(new)]
            )
            db.executemany(
                "INSERT INTO bodies VALUES (?, ?)",
                [(first + i, row[_BODY]) for i, row in enumerate(new)],
            )
            db.executemany(_REPLACE, [(*row[:_BODY], seen.id) for seen, row in free])
            db.executemany(
                "UPDATE bodies SET body = ? WHERE id = ?",
                [(row.body, seen.id) for seen, row in free],
            )
            db.executemany(
                "UPDATE clips SET mtime_ns = ? WHERE id = ?",
                [(mtime, seen.id) for seen, mtime in touched],
            )
            db.executemany(
                "UPDATE clips SET status = ?, reason = 'label_gone', detail = '' WHERE id = ?",
                [(GONE, seen.id) for seen in gone if seen.status not in (ACCEPTED, FAILED)],
            )
            db.executemany(
                "UPDATE clips SET flags = trim(replace(flags, 'label_changed', '') || ' label_changed') "
                "WHERE id = ?",
                [(seen.id,) for seen in fixed],
            )

    def index(self) -> None:
        """Build the indexes that the later stages need; cheap when they exist."""
        self.db.executescript(INDEXES)

    # -- judging
    # ------------------------------------------------------------------------------------------------------

    def count(self, *statuses: str) -> int:
        """Rows in these statuses; all rows if none is named."""
        where = f"WHERE status IN ({', '.join('?' * len(statuses))})" if statuses else ""
        return int(self.db.execute(f"SELECT count(*) FROM clips {where}", statuses).fetchone()[0])

    def buckets(self) -> list[tuple[str, str, str, int]]:
        """(category, status, reason, count) of all rows: the counts add up to the number of label
        files.
        """
        return [
            tuple(row)
            for row in self.db.execute(
                "SELECT category, status, reason, count(*) FROM clips GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
            )
        ]

    def clips(self, *statuses: str) -> Iterator[sqlite3.Row]:
        """Rows of `clips` in these statuses (all if none is named), in path order, with their
        media's probe (JSON).
        """
        # the plus keeps sqlite on the index of labels: on that of statuses it would sort all that
        # is left for each page
        where, last = f"+status IN ({', '.join('?' * len(statuses))}) AND" if statuses else "", ""
        while page := self.db.execute(  # page by page: callers write between two rows
            f"{_CLIPS} WHERE {where} label > ? ORDER BY label LIMIT 2000", (*statuses, last)
        ).fetchall():
            yield from page
            last = page[-1]["label"]

    def claims(self, clip_id: str) -> list[sqlite3.Row]:
        """Rows, as `clips` gives them, of every readable label that claims this id, in path
        order.
        """
        return self.db.execute(f"{_CLIPS} WHERE clip_id = ? ORDER BY label", (clip_id,)).fetchall()

    def label(self, clip: int) -> Label:
        """The Label of row `clip`, as it was when it was read."""
        return _unpack_label(
            self.db.execute("SELECT body FROM bodies WHERE id = ?", (clip,)).fetchone()[0]
        )

    def repeated_ids(self) -> dict[str, list[sqlite3.Row]]:
        """Rows of every clip_id that more than one readable label claims; the one that keeps it
        first.
        """
        claims: dict[str, list[sqlite3.Row]] = {}
        for row in self.db.execute(REPEATED_IDS):
            claims.setdefault(row["clip_id"], []).append(row)
        return claims

    def equal_media(self) -> list[list[sqlite3.Row]]:
        """Rows whose media are equal byte for byte, per medium; the one to keep first."""
        groups: dict[str, list[sqlite3.Row]] = {}
        for row in self.db.execute(EQUAL_MEDIA):
            groups.setdefault(row["media_xxh3"], []).append(row)
        return list(groups.values())

    def record(self, outcomes: Iterable[Outcome]) -> None:
        """Write what a stage decided."""
        with self.transaction() as db:
            db.executemany(
                "UPDATE clips SET status = ?, reason = ?, detail = ?, declared = ?, probed = ? WHERE id = ?",
                [(*outcome[1:], outcome.id) for outcome in outcomes],
            )

    def record_scores(self, scores: Iterable[tuple[int, int, int, float, str, int]]) -> None:
        """Write (caption_chars, word_run, char_run, special_share, programme, id) of label
        judgements.
        """
        with self.transaction() as db:
            db.executemany(
                "UPDATE clips SET caption_chars = ?, word_run = ?, char_run = ?, special_share = ?, "
                "programme = ? WHERE id = ?",
                scores,
            )

    def first_labels(self, limit: int) -> list[int]:
        """The rows of the first `limit` label files in path order."""
        return [
            row[0]
            for row in self.db.execute(
                "SELECT id FROM clips WHERE status != 'gone' ORDER BY label LIMIT ?", (limit,)
            )
        ]

    # -- media
    # --------------------------------------------------------------------------------------------------------

    def unused_media(self) -> set[str]:
        """Hashed media that no shard needs which is still to come or to be written."""
        return {
            row[0]
            for row in self.db.execute(
                "SELECT media_xxh3 FROM sources EXCEPT SELECT media_xxh3 FROM clips WHERE status IN ('fetched', 'sound') "
                "EXCEPT SELECT media_xxh3 FROM clips JOIN windows ON clip = clips.id JOIN shards ON shard = name "
                "WHERE NOT done"
            )
        }

    def forget_files(self, paths: Iterable[Path]) -> None:
        """These cached files are deleted."""
        with self.transaction() as db:
            db.executemany("DELETE FROM sources WHERE path = ?", [(str(path),) for path in paths])

    def bad_downloads(self) -> list[Path]:
        """Cached files of URLs whose answer was no media: the next build is to ask them again."""
        return [
            Path(row[0])
            for row in self.db.execute(
                "SELECT path FROM sources JOIN media USING (media_xxh3) WHERE error_reason != '' AND source LIKE 'http%'"
            )
        ]

    def source(self, source: str) -> sqlite3.Row | None:
        """(path, size_bytes, mtime_ns, media_xxh3) of a local path or URL that was hashed
        before.
        """
        return self.db.execute("SELECT * FROM sources WHERE source = ?", (source,)).fetchone()

    def record_source(
        self,
        clips: Sequence[int],
        source: str,
        path: Path,
        size_bytes: int,
        mtime_ns: int,
        media_xxh3: str,
    ) -> None:
        """The media of `clips` were found at `path`."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?, ?)",
                (source, str(path), size_bytes, mtime_ns, media_xxh3),
            )
            db.executemany(
                "UPDATE clips SET reason = '', detail = '' WHERE id = ? AND status = 'unavailable'",
                [(clip,) for clip in clips],
            )
            db.executemany(
                "UPDATE clips SET status = 'fetched', media_xxh3 = ? WHERE id = ?",
                [(media_xxh3, clip) for clip in clips],
            )

    def media_files(self, media_xxh3: str) -> list[sqlite3.Row]:
        """(path, size_bytes, mtime_ns) of every file that held these bytes when it was hashed."""
        return self.db.execute(
            "SELECT path, size_bytes, mtime_ns FROM sources WHERE media_xxh3 = ? ORDER BY source",
            (media_xxh3,),
        ).fetchall()

    def media_path(self, media_xxh3: str) -> Path:
        """A file that held these bytes when it was hashed. Raises CatalogError if every one is
        gone since.
        """
        paths = [Path(row["path"]) for row in self.media_files(media_xxh3)]
        for path in paths:
            if path.is_file():
                return path
        raise CatalogError(
            f"media {media_xxh3}: none of {list(map(str, paths))} is there any more; put it back, or "
            f"start a new output folder"
        )

    def record_probe(
        self, media_xxh3: str, probe: bytes | None, error_reason: str = "", error_detail: str = ""
    ) -> None:
        """What probing said: the Probe as JSON, or the reason why there is none."""
        self.db.execute(
            "INSERT OR REPLACE INTO media VALUES (?, ?, ?, ?)",
            (media_xxh3, error_reason, error_detail, probe),
        )

    # -- the plan
    # -----------------------------------------------------------------------------------------------------

    def next_shard_numbers(self) -> dict[tuple[str, str], int]:
        """(split, bucket) -> the first free shard number."""
        rows = self.db.execute("SELECT split, bucket, count(*) FROM shards GROUP BY 1, 2")
        return {(split, bucket): number for split, bucket, number in rows}

    def record_plan(self, plans: Iterable[ShardPlan]) -> int:
        """Fix new shards for ever, accept their clips, and begin the next generation; returns
        their number.

        Raises CatalogError for a key that another sample has, with both sources named.
        """
        number = 0
        with self.transaction() as db:
            for number, plan in enumerate(plans, 1):  # noqa: B007 (the last one is what is returned)
                db.execute(
                    "INSERT INTO shards VALUES (?, ?, ?, 0, NULL)",
                    (plan.name, plan.split, plan.bucket),
                )
                for window in plan.windows:
                    self._refuse_repeated(db, window)
                    db.execute(
                        "INSERT INTO windows SELECT ?, id, ?, ? FROM clips WHERE label = ?",
                        (window.key, plan.name, msgspec.json.encode(window), window.label),
                    )
                    db.execute(
                        "UPDATE clips SET status = 'accepted', split = ?, num_windows = num_windows + 1, "
                        "flags = ? WHERE label = ?",
                        (plan.split, " ".join(window.flags), window.label),
                    )
            if number:
                self.remember("generation", str(self.generation + 1))
        return number

    def _refuse_repeated(self, db: sqlite3.Connection, window: Window) -> None:
        other = db.execute(
            "SELECT label FROM windows JOIN clips ON clips.id = clip WHERE key = ?", (window.key,)
        ).fetchone()
        if other:
            raise CatalogError(
                f"key {window.key} is claimed twice: by {other['label']} and by {window.label} (shot "
                f"{window.shot}, start {window.start_ms} ms); remove one of the two label files"
            )

    def unfinished_shards(self) -> list[str]:
        """Names of the planned shards that are still to be written, in order."""
        return [
            row[0]
            for row in self.db.execute("SELECT name FROM shards WHERE NOT done ORDER BY name")
        ]

    def shard_plan(self, name: str) -> ShardPlan:
        """The plan of one shard, windows by ascending key."""
        shard = self.db.execute(
            "SELECT split, bucket FROM shards WHERE name = ?", (name,)
        ).fetchone()
        bodies = self.db.execute("SELECT body FROM windows WHERE shard = ? ORDER BY key", (name,))
        return ShardPlan(
            name=name,
            split=shard["split"],
            bucket=shard["bucket"],
            windows=[_unpack_window(row[0]) for row in bodies],
        )

    def clip_windows(self, clip: int) -> list[Window]:
        """The planned windows of one row, in time order."""
        bodies = self.db.execute("SELECT body FROM windows WHERE clip = ?", (clip,))
        return sorted(
            (_unpack_window(row[0]) for row in bodies),
            key=lambda window: (window.shot, window.start_ms),
        )

    def finish_shard(
        self,
        name: str,
        info: ShardInfo | None,
        failed: Sequence[tuple[str, str, str]] = (),
        notes: Sequence[tuple[str, str]] = (),
    ) -> None:
        """A shard is on disk (None: no sample of it could be made); `failed` is (key, reason,
        detail) of lost windows.

        A clip that has lost all its windows becomes `failed` with that reason; one that keeps
        some is flagged. `notes` are (key, flag): the clip of that window gets the flag.
        """
        with self.transaction() as db:
            db.executemany(
                "UPDATE clips SET flags = trim(flags || ' ' || ?2) WHERE id = (SELECT clip FROM windows "
                "WHERE key = ?1) AND instr(' ' || flags || ' ', ' ' || ?2 || ' ') = 0",
                notes,
            )
            for key, reason, detail in failed:
                clip = db.execute("SELECT clip FROM windows WHERE key = ?", (key,)).fetchone()[
                    "clip"
                ]
                db.execute(
                    "UPDATE clips SET num_windows = num_windows - 1, flags = trim(flags || ' window_lost'), "
                    "detail = ? WHERE id = ?",
                    (detail, clip),
                )
                db.execute(
                    "UPDATE clips SET status = 'failed', reason = ? WHERE id = ? AND num_windows = 0",
                    (reason, clip),
                )
            db.execute(
                "UPDATE shards SET done = 1, info = ? WHERE name = ?",
                (msgspec.json.encode(info) if info else None, name),
            )

    def finished_shards(self) -> list[tuple[str, ShardInfo]]:
        """(split, ShardInfo) of every shard on disk, in order."""
        rows = self.db.execute(
            "SELECT split, info FROM shards WHERE info IS NOT NULL ORDER BY name"
        )
        return [(row["split"], msgspec.json.decode(row["info"], type=ShardInfo)) for row in rows]
