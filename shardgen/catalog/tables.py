"""What the catalog holds: its tables, the statuses of a clip, and the rows that the stages hand
over.
"""

from typing import NamedTuple

# on their way: what the next stage takes up
INGESTED, WANTED, FETCHED, SOUND = "ingested", "wanted", "fetched", "sound"
# at their end: every label file is in one of these when a build is over
UNREADABLE, SKIPPED, REJECTED, UNAVAILABLE, DUPLICATE = (
    "unreadable",
    "skipped",
    "rejected",
    "unavailable",
    "duplicate",
)
FAILED, GONE, ACCEPTED = "failed", "gone", "accepted"
# reasons and flags that more than one module names
EXCLUDED, MEDIA_CHANGED = "excluded_by_review", "media_changed"
REPEATED_ID = "clip_id_repeated"
FINAL = (ACCEPTED, REJECTED, DUPLICATE, UNAVAILABLE, UNREADABLE, FAILED, SKIPPED, GONE)

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS clips (
    id INTEGER PRIMARY KEY, label TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, label_xxh3 TEXT NOT NULL, generation INTEGER NOT NULL,
    status TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, byte_offset INTEGER,
    clip_id TEXT NOT NULL, media_type TEXT NOT NULL, category TEXT NOT NULL,
    station TEXT NOT NULL, broadcast_date TEXT NOT NULL, url TEXT NOT NULL,
    declared_width_px INTEGER, declared_height_px INTEGER, declared_duration_s REAL,
    declared_fps REAL, num_shots INTEGER NOT NULL,
    caption_chars INTEGER, word_run INTEGER, char_run INTEGER, special_share REAL,
    declared TEXT NOT NULL DEFAULT '', probed TEXT NOT NULL DEFAULT '',
    programme TEXT NOT NULL DEFAULT '', split TEXT NOT NULL DEFAULT '',
    media_xxh3 TEXT NOT NULL DEFAULT '', num_windows INTEGER NOT NULL DEFAULT 0,
    flags TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS bodies (id INTEGER PRIMARY KEY, body BLOB NOT NULL);

CREATE TABLE IF NOT EXISTS sources (
    source TEXT PRIMARY KEY, path TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, media_xxh3 TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sources_by_media ON sources (media_xxh3);
CREATE TABLE IF NOT EXISTS media (
    media_xxh3 TEXT PRIMARY KEY, error_reason TEXT NOT NULL, error_detail TEXT NOT NULL,
    probe BLOB) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS shards (
    name TEXT PRIMARY KEY, split TEXT NOT NULL, bucket TEXT NOT NULL, done INTEGER NOT NULL,
    info BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS windows (
    key TEXT PRIMARY KEY, clip INTEGER NOT NULL, shard TEXT NOT NULL,
    body BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS windows_by_shard ON windows (shard);
"""
# Built after the first bulk load: filling an index in random order would cost more than the load
# itself.
INDEXES = """
CREATE UNIQUE INDEX IF NOT EXISTS clips_by_label ON clips (label);
CREATE INDEX IF NOT EXISTS clips_by_id ON clips (clip_id);
CREATE INDEX IF NOT EXISTS clips_by_status ON clips (status);
CREATE INDEX IF NOT EXISTS clips_by_media ON clips (media_xxh3) WHERE media_xxh3 != '';
"""


class Seen(NamedTuple):
    """What the catalog remembers of a label file, so that an unchanged one is not read again."""

    id: int
    size_bytes: int
    mtime_ns: int
    label_xxh3: str
    status: str


class IngestRow(NamedTuple):
    """One label file as ingest hands it over: the columns of `clips` that come from it, and last
    the packed Label, which goes into a table of its own.
    """

    label: str
    size_bytes: int
    mtime_ns: int
    label_xxh3: str
    status: str
    reason: str
    detail: str
    byte_offset: int | None
    clip_id: str
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
    body: bytes


class Outcome(NamedTuple):
    """What a stage decided on one clip. `declared` and `probed` are the two values where they
    differ.
    """

    id: int
    status: str
    reason: str = ""
    detail: str = ""
    declared: str = ""
    probed: str = ""
