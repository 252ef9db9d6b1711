"""Korean full-text search and fast filters, in a file of the dashboard's own (search.sqlite).

Hangul is indexed as overlapping pairs of syllables: a query is cut the same way and has to match as
a phrase, so "어시" finds 어시장. SQLite's own `trigram` tokenizer finds nothing, without an error,
for the two-syllable words that most Korean queries are. Latin letters and digits are whole words.

`rows` copies of each label file what pages filter by, as small numbers, so that even a filter that
matches nothing is one scan of a few megabytes and never touches the catalog's wide rows. `cube`
counts every combination of them. What is shown of a page of ids is then read from the catalog.

The file is rebuildable: indexing.py fills it, and deleting it costs only time.
"""

import re
import sqlite3
import time
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

SEARCH_FILE = "search.sqlite"
VERSION = "1"  # of the tables: a file of another version is built anew
# the columns of `rows` that hold numbers of `names`
FIELDS = ("status", "reason", "category", "station", "media_type", "programme")
CUBE = FIELDS[:5]
MAX_QUERY_CHARS, MAX_QUERY_WORDS = 200, 12
COUNT_LIMIT = 1000  # hits of a search are counted up to here
COUNT_S = 0.03  # and for no longer than this
FEW = 400  # rows that a filter lets through: up to here each is asked for its text
# A changed label is indexed again under a new document number: an index without contents can't
# forget a text that it doesn't have any more. The low bits are the row, the high ones its revision.
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS names (
    number INTEGER PRIMARY KEY, field TEXT NOT NULL, name TEXT NOT NULL, UNIQUE (field, name));
CREATE TABLE IF NOT EXISTS rows (
    id INTEGER PRIMARY KEY, revision INTEGER NOT NULL, label_hash INTEGER NOT NULL,
    day INTEGER NOT NULL, {", ".join(f"{field} INTEGER NOT NULL" for field in FIELDS)});
CREATE TABLE IF NOT EXISTS cube (
    {", ".join(f"{field} INTEGER NOT NULL" for field in CUBE)}, label_files INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS windows (
    clip INTEGER NOT NULL, key BLOB NOT NULL, PRIMARY KEY (clip, key)) WITHOUT ROWID;
CREATE VIRTUAL TABLE IF NOT EXISTS texts USING fts5(
    caption, stt, ocr, content='', tokenize='unicode61 remove_diacritics 0');
"""
# made when all rows are there: filling them in the order of ids would touch every page again
INDEXES = """
CREATE INDEX IF NOT EXISTS rows_by_reason ON rows (reason, id);
CREATE INDEX IF NOT EXISTS rows_by_status ON rows (status, id);
CREATE INDEX IF NOT EXISTS rows_by_programme ON rows (programme, id);
"""

Column = Literal["all", "caption", "stt", "ocr"]
_RUN = re.compile(r"[가-힣]+|[^\W_가-힣]+")


class Filter(NamedTuple):
    """What a page asks for; "" stands for anything. Dates are YYYY-MM-DD and inclusive."""

    status: str = ""
    reason: str = ""
    category: str = ""
    station: str = ""
    media_type: str = ""
    programme: str = ""
    first_day: str = ""
    last_day: str = ""
    text: str = ""
    column: Column = "all"


class Page(NamedTuple):
    """Row ids in ascending order, and where to go on (None: nowhere). `total` is exact, or
    COUNT_LIMIT where there are more, or None where counting would have taken too long.
    """

    ids: list[int]
    previous: int | None
    following: int | None
    total: int | None


def runs_of(text: str) -> list[str]:
    """The stretches of letters that are searched for as a whole: Hangul apart from the rest."""
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return _RUN.findall(text)


def bigrams(text: str) -> str:
    """The text as the index has it: "어시장 CCTV" -> "어시 시장 CCTV"."""
    tokens: list[str] = []
    for run in runs_of(text):
        if run[0] < "가" or run[0] > "힣" or len(run) < 3:
            tokens.append(run)
        else:
            tokens += [run[i : i + 2] for i in range(len(run) - 1)]
    return " ".join(tokens)


def match_of(text: str, column: Column = "all") -> str:
    """The query as FTS5 has it: every run a phrase, all of them wanted. Only letters and digits of
    the text are left in it, so nothing of it is read as syntax. "" if there are none.
    """
    phrases = [f'"{bigrams(run)}"' for run in runs_of(text[:MAX_QUERY_CHARS])[:MAX_QUERY_WORDS]]
    query = " AND ".join(phrases)
    return f"{column} : ({query})" if query and column != "all" else query


def needs_scan(text: str) -> bool:
    """A single syllable is in no pair of its own: only reading the texts finds it everywhere."""
    return any(len(run) == 1 and "가" <= run <= "힣" for run in runs_of(text[:MAX_QUERY_CHARS]))


def day_number(date: str) -> int:
    """ "2019-05-14" -> 20190514; 0 for anything else."""
    digits = date.replace("-", "")
    return int(digits) if len(digits) == 8 and digits.isascii() and digits.isdigit() else 0


@contextmanager
def open_search(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for reading; the file must be there."""
    with closing(
        sqlite3.connect(
            f"file:{path}?mode=ro",
            uri=True,
            timeout=5,
            isolation_level=None,
            check_same_thread=False,
        )
    ) as db:
        yield db


def find(
    db: sqlite3.Connection, wanted: Filter, after: int, before: int | None, limit: int
) -> Page:
    """The page of rows that follows document `after`, or that comes before `before`."""
    conditions, values = _conditions(db, wanted)
    match = match_of(wanted.text, wanted.column)
    if conditions is None or (wanted.text and not match):
        return Page([], None, None, 0)
    if match and conditions:
        documents = _few_documents(db, conditions, values)
        if documents is not None:
            return _probed(db, match, documents, after, before, limit)
    if match:
        source = (
            f"texts CROSS JOIN rows ON rows.id = texts.rowid & {ROW_MASK} "
            f"AND rows.revision = texts.rowid >> {ROW_BITS}"
        )
        place, conditions, values = "texts.rowid", ["texts MATCH ?", *conditions], [match, *values]
    else:
        source, place = "rows", "rows.id"
    where = "".join(f" AND {condition}" for condition in conditions)
    backwards = before is not None
    found = [
        row[0]
        for row in db.execute(
            f"SELECT {place} FROM {source} WHERE {place} {'<' if backwards else '>'} ?{where} "
            f"ORDER BY {place} {'DESC' if backwards else 'ASC'} LIMIT ?",
            (before if backwards else after, *values, limit + 1),
        )
    ]
    return _page(found, after, before, limit, _total(db, wanted, source, where, values))


def _few_documents(
    db: sqlite3.Connection, conditions: Sequence[str], values: Sequence[object]
) -> list[int] | None:
    """All documents that the filters let through, if they are few: each is then looked up in the
    index. Going through the hits of a common word to find the few would take a second.
    """
    rows = db.execute(
        f"SELECT revision << {ROW_BITS} | id FROM rows WHERE {' AND '.join(conditions)} LIMIT ?",
        (*values, FEW + 1),
    ).fetchall()
    return sorted(row[0] for row in rows) if len(rows) <= FEW else None


def _probed(
    db: sqlite3.Connection,
    match: str,
    documents: list[int],
    after: int,
    before: int | None,
    limit: int,
) -> Page:
    """The page among few documents; the others are looked up for the total, for COUNT_S."""
    first = 0 if before is not None else bisect_right(documents, after)
    last = bisect_left(documents, before) if before is not None else len(documents)
    wanted = documents[first:last]
    if before is not None:
        wanted.reverse()
    probe = "SELECT 1 FROM texts WHERE texts MATCH ? AND rowid = ?"
    deadline = time.monotonic() + COUNT_S
    found: list[int] = []
    total = 0
    for place, each in enumerate([*wanted, *documents[:first], *documents[last:]]):
        page_is_full = len(found) > limit or place >= len(wanted)
        if page_is_full and time.monotonic() > deadline:
            return _page(found, after, before, limit, None)
        if db.execute(probe, (match, each)).fetchone():
            total += 1
            if not page_is_full:
                found.append(each)
    return _page(found, after, before, limit, total)


def _page(found: list[int], after: int, before: int | None, limit: int, total: int | None) -> Page:
    """Of `limit` + 1 documents in the order in which they were looked for."""
    more = len(found) > limit
    found = sorted(found[:limit])
    has_previous = more if before is not None else after > 0
    has_following = before is not None or more
    return Page(
        ids=[number & ROW_MASK for number in found],
        previous=found[0] if found and has_previous else None,
        following=found[-1] if found and has_following else None,
        total=total,
    )


def _total(
    db: sqlite3.Connection, wanted: Filter, source: str, where: str, values: Sequence[object]
) -> int | None:
    if not (wanted.text or wanted.first_day or wanted.last_day or wanted.programme):
        condition = where.replace("rows.", "cube.")
        counted = f"SELECT coalesce(sum(label_files), 0) FROM cube WHERE 1{condition}"
        return int(db.execute(counted, tuple(values)).fetchone()[0])
    deadline = time.monotonic() + COUNT_S
    db.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    try:
        hits = f"SELECT 1 FROM {source} WHERE 1{where} LIMIT {COUNT_LIMIT}"
        return int(db.execute(f"SELECT count(*) FROM ({hits})", tuple(values)).fetchone()[0])
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        return None
    finally:
        db.set_progress_handler(None, 0)


def _conditions(db: sqlite3.Connection, wanted: Filter) -> tuple[list[str] | None, list[object]]:
    """SQL conditions and their values; None for a name that no row has."""
    conditions: list[str] = []
    values: list[object] = []
    for field in FIELDS:
        if name := getattr(wanted, field):
            row = db.execute(
                "SELECT number FROM names WHERE field = ? AND name = ?", (field, name)
            ).fetchone()
            if row is None:
                return None, []
            conditions.append(f"rows.{field} = ?")
            values.append(row[0])
    for name, comparison in (("first_day", ">="), ("last_day", "<=")):
        if day := day_number(getattr(wanted, name)):
            conditions.append(f"rows.day {comparison} ?")
            values.append(day)
    return conditions, values


def choices(db: sqlite3.Connection, field: str, wanted: Filter) -> list[tuple[str, int]]:
    """(name, label files) of a field under all the other filters of the cube, most first."""
    plain = {name: getattr(wanted, name) for name in CUBE if name != field}
    conditions, values = _conditions(db, Filter(**plain))
    if conditions is None:
        return []
    where = "".join(f" AND {each.replace('rows.', 'cube.')}" for each in conditions)
    return db.execute(
        f"SELECT name, sum(label_files) FROM cube JOIN names ON number = {field} WHERE 1{where} "
        f"GROUP BY 1 ORDER BY 2 DESC, 1",
        tuple(values),
    ).fetchall()


def keys_of(db: sqlite3.Connection, clip: int) -> list[str]:
    """Sample keys of a row."""
    rows = db.execute("SELECT key FROM windows WHERE clip = ?", (clip,)).fetchall()
    return [bytes(row[0]).hex() for row in rows]


def neighbours(db: sqlite3.Connection, clip: int, limit: int) -> list[int]:
    """Rows of the same programme, around this one."""
    row = db.execute(
        "SELECT programme, name FROM rows JOIN names ON number = programme WHERE id = ?", (clip,)
    ).fetchone()
    if row is None or not row[1]:
        return []
    before = "SELECT id FROM rows WHERE programme = ? AND id < ? ORDER BY id DESC LIMIT ?"
    behind = "SELECT id FROM rows WHERE programme = ? AND id > ? ORDER BY id LIMIT ?"
    ids = [each[0] for each in db.execute(before, (row[0], clip, limit))]
    ids += [each[0] for each in db.execute(behind, (row[0], clip, limit))]
    return sorted(ids)
