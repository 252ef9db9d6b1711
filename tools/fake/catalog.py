"""A made-up catalog without files behind it: rows with captions, as shardgen would store them."""

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import xxhash

from shardgen.catalog.tables import INDEXES, SCHEMA
from shardgen.labels.parse import Label, Timed


def write_catalog(
    folder: Path, captions: list[str], speech: str = "", ocr: list[str] | None = None
) -> None:
    """A catalog with a row per caption; every third one is rejected."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as db, db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA + INDEXES)
        for number, caption in enumerate(captions, start=1):
            add_row(db, number, caption, speech, ocr)


def add_row(
    db: sqlite3.Connection,
    number: int,
    caption: str,
    speech: str = "",
    ocr: list[str] | None = None,
) -> None:
    rejected = number % 3 == 0
    db.execute(
        "INSERT INTO clips (id, label, size_bytes, mtime_ns, label_xxh3, generation, status, "
        "reason, detail, clip_id, media_type, category, station, broadcast_date, url, num_shots, "
        "programme) VALUES (?, ?, 1, 1, ?, 0, ?, ?, '', ?, 'video', ?, '충북', ?, '', 1, 'a/b/1')",
        (
            number,
            f"video/{number:07}.json",
            xxhash.xxh3_128_hexdigest(caption.encode()),
            "rejected" if rejected else "accepted",
            "caption_short" if rejected else "",
            str(2400000 + number),
            "인물" if number % 2 else "생활/문화",
            f"2019-05-{1 + number % 28:02}",
        ),
    )
    label = Label(
        clip_id=str(2400000 + number),
        media_type="video",
        category="",
        station="",
        broadcast_date="",
        url="",
        thumbnail_urls=[],
        keyword="",
        stt_script=speech,
        scenes=[Timed(caption)],
        objects=[],
        semantic=[],
        application=[],
        width_px=None,
        height_px=None,
        duration_s=None,
        fps=None,
        ocr=ocr,
    )
    db.execute("INSERT INTO bodies VALUES (?, ?)", (number, msgspec.msgpack.encode(label)))
