"""What people decided and voted: review.sqlite, the one file here that can't be rebuilt.

Nothing is overwritten: a new decision on the same label file is a new row, the newest one holds,
and who claims to have decided what stays readable. The name is what the person typed; it is a
claim, not an identity.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, get_args

REVIEW_FILE = "review.sqlite"
Verdict = Literal["accept", "exclude", "undecided"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
# what is wrong with an item, as the users' documents sort it; "" for none
DEFECT_TYPES = (
    "",
    "caption_wrong",
    "caption_language",
    "shot_wrong",
    "picture_damaged",
    "picture_quality",
    "text_overlay",
    "sound_only",
    "duplicate",
    "rights",
    "other",
)
ANSWERS = ("left", "right", "same", "unusable")
MAX_NOTE_CHARS, MAX_PERSON_CHARS = 2000, 60

_SCHEMA = """
CREATE TABLE IF NOT EXISTS decisions (
    number INTEGER PRIMARY KEY, dataset TEXT NOT NULL, label TEXT NOT NULL, clip_id TEXT NOT NULL,
    verdict TEXT NOT NULL, type TEXT NOT NULL, note TEXT NOT NULL, person TEXT NOT NULL,
    time TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS decisions_by_label ON decisions (dataset, label, number);
CREATE TABLE IF NOT EXISTS votes (
    number INTEGER PRIMARY KEY, evaluation TEXT NOT NULL, result_xxh3 TEXT NOT NULL,
    pair TEXT NOT NULL, question TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL,
    left_variant TEXT NOT NULL, right_variant TEXT NOT NULL, answer TEXT NOT NULL,
    repeated INTEGER NOT NULL, rater TEXT NOT NULL, time TEXT NOT NULL,
    UNIQUE (result_xxh3, pair, question, repeated, rater));
"""


class ReviewError(ValueError):
    """A decision or vote that can't be taken; the message says what is wrong with it."""


class Decision(NamedTuple):
    """What one person decided about one label file."""

    dataset: str
    label: str
    clip_id: str
    verdict: str
    type: str
    note: str
    person: str
    time: str  # UTC, ISO 8601, whole seconds


class Vote(NamedTuple):
    """One answer about one blind pair, with the sides as they were shown."""

    evaluation: str
    result_xxh3: str
    pair: str
    question: str
    prompt: str
    seed: int
    left_variant: str
    right_variant: str
    answer: str
    repeated: int
    rater: str
    time: str


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clean_line(text: str, limit: int) -> str:
    """A name as tables can hold it: one line, printable, not longer than `limit`."""
    return "".join(filter(str.isprintable, " ".join(text.split())))[:limit]


class Review:
    """The decisions and votes at `folder`. Every write is one transaction."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / REVIEW_FILE
        with self._open() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)

    def decide(self, decision: Decision) -> None:
        """Add a decision. Raises ReviewError."""
        if decision.verdict not in VERDICTS:
            raise ReviewError(f"verdict {decision.verdict!r}: one of {', '.join(VERDICTS)}")
        if decision.type not in DEFECT_TYPES:
            raise ReviewError(f"defect type {decision.type!r}: one of {', '.join(DEFECT_TYPES)}")
        if not decision.person:
            raise ReviewError("who decides? a name is needed")
        if len(decision.note) > MAX_NOTE_CHARS:
            raise ReviewError(f"the note has more than {MAX_NOTE_CHARS} characters")
        self._insert("decisions", decision)

    def history(self, dataset: str, label: str) -> list[Decision]:
        """All decisions about a label file, the newest first."""
        return self._decisions(
            "WHERE dataset = ? AND label = ? ORDER BY number DESC", (dataset, label)
        )

    def newest(self, dataset: str) -> list[Decision]:
        """The newest decision about each label file that has one, by path."""
        newest = "SELECT max(number) FROM decisions WHERE dataset = ? GROUP BY label"
        return self._decisions(f"WHERE number IN ({newest}) ORDER BY label", (dataset,))

    def standing(self, dataset: str, labels: Sequence[str]) -> dict[str, Decision]:
        """Label -> the newest decision, of those among `labels` that have one."""
        marks = ", ".join("?" * len(labels))
        newest = (
            "SELECT max(number) FROM decisions "
            f"WHERE dataset = ? AND label IN ({marks}) GROUP BY label"
        )
        found = self._decisions(f"WHERE number IN ({newest})", (dataset, *labels))
        return {each.label: each for each in found if each.verdict != "undecided"}

    def latest(self, dataset: str, limit: int) -> list[Decision]:
        """The newest decisions of a dataset, overruled ones included."""
        return self._decisions("WHERE dataset = ? ORDER BY number DESC LIMIT ?", (dataset, limit))

    def num_decisions(self, dataset: str) -> int:
        with self._open() as db:
            row = db.execute("SELECT count(*) FROM decisions WHERE dataset = ?", (dataset,))
            return int(row.fetchone()[0])

    def vote(self, vote: Vote) -> None:
        """Add a vote; a second answer of the same rater to the same question replaces nothing and
        raises ReviewError.
        """
        if vote.answer not in ANSWERS:
            raise ReviewError(f"answer {vote.answer!r}: one of {', '.join(ANSWERS)}")
        try:
            self._insert("votes", vote)
        except sqlite3.IntegrityError as error:
            raise ReviewError(f"{vote.rater} has answered this pair already") from error

    def votes(self, result_xxh3: str, rater: str = "") -> list[Vote]:
        """Votes about one result, in the order in which they were given; of one rater if named."""
        fields = ", ".join(Vote._fields)
        where, values = "WHERE result_xxh3 = ?", [result_xxh3]
        if rater:
            where, values = f"{where} AND rater = ?", [*values, rater]
        with self._open() as db:
            rows = db.execute(f"SELECT {fields} FROM votes {where} ORDER BY number", values)
            return [Vote(*row) for row in rows.fetchall()]

    def vote_counts(self) -> dict[str, int]:
        """Evaluation -> number of votes about it."""
        with self._open() as db:
            return dict(db.execute("SELECT evaluation, count(*) FROM votes GROUP BY 1 ORDER BY 1"))

    def _decisions(self, where: str, values: tuple[object, ...]) -> list[Decision]:
        with self._open() as db:
            fields = ", ".join(Decision._fields)
            rows = db.execute(f"SELECT {fields} FROM decisions {where}", values).fetchall()
        return [Decision(*row) for row in rows]

    def _insert(self, table: str, row: Decision | Vote) -> None:
        marks = ", ".join("?" * len(row))
        with self._open() as db, db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(f"INSERT INTO {table} ({', '.join(row._fields)}) VALUES ({marks})", row)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as db:
            # precious: a decision that was confirmed survives a power cut
            db.execute("PRAGMA synchronous = FULL")
            yield db
