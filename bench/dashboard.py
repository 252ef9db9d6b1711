"""How fast the dashboard is on a large catalog: `python -m bench.dashboard WHAT DIR`.

`make` writes a dataset folder with a made-up catalog of `--labels` rows, of the users' size (their
captions have 432 characters on average) and of a made-up vocabulary whose words are as unevenly
frequent as real ones. `index` builds the search index on one core, and `pages` asks for pages
under every kind of filter. bench.dashboard_load has the rest.
"""

import argparse
import itertools
import json
import random
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from shardgen.catalog.tables import FINAL, INDEXES, SCHEMA
from shardgen.labels.parse import Label, Timed
from tools.dashboard.catalog import CatalogView
from tools.dashboard.indexing import Indexer
from tools.dashboard.search import SEARCH_FILE, Filter, find, open_search

CATALOG = "catalog.sqlite"
CAPTION_WORDS, SPEECH_WORDS, VOCABULARY = 100, 20, 60_000
CATEGORIES = ["생활/문화", "자연/풍경", "인물", "스포츠", "정치", "경제", "사건/사고", "날씨"]
STATIONS = ["충북", "대전", "부산", "광주", "대구", "전주", "강원", "제주"]
REASONS = {"rejected": "caption_short", "unavailable": "http_404", "failed": "media_undecodable"}
_COLUMNS = (
    "id label size_bytes mtime_ns label_xxh3 generation status reason detail clip_id media_type "
    "category station broadcast_date url declared_width_px declared_height_px declared_duration_s "
    "declared_fps num_shots caption_chars programme split media_xxh3 num_windows"
).split()


def make(folder: Path, num_labels: int) -> None:
    """A catalog of `num_labels` rows, three in four accepted, each with one window."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CATALOG
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA)
        insert = (
            f"INSERT INTO clips ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
        )
        for piece in _pieces(_rows(num_labels), 20_000):
            with db:
                db.execute("BEGIN")
                db.executemany(insert, [row for row, _ in piece])
                db.executemany(
                    "INSERT INTO bodies VALUES (?, ?)", [(row[0], body) for row, body in piece]
                )
        db.executescript(INDEXES)
    (folder / "quality_report.json").write_text(json.dumps(_report(num_labels)), encoding="utf-8")


def _rows(num_labels: int) -> Iterator[tuple[tuple[Any, ...], bytes]]:
    rng = random.Random(0)
    words = _vocabulary(rng)
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(VOCABULARY)))
    encoder = msgspec.msgpack.Encoder()
    for number in range(num_labels):
        text = rng.choices(words, cum_weights=weights, k=CAPTION_WORDS + SPEECH_WORDS)
        status = "accepted" if number % 4 else FINAL[number // 4 % len(FINAL)]
        clip_id = str(3_000_000 + number)
        kind = "image" if number % 2 else "video"
        category, station = rng.choice(CATEGORIES), STATIONS[number // 100 % len(STATIONS)]
        day = f"{2000 + number // 3000 % 20}-05-{1 + number // 100 % 28:02}"
        label = Label(
            clip_id,
            kind,
            category,
            station,
            day,
            "",
            [],
            "",
            " ".join(text[CAPTION_WORDS:]),
            [Timed(" ".join(text[: CAPTION_WORDS // 2]), "00:00:00;00", "00:00:11;29")],
            [Timed(" ".join(text[CAPTION_WORDS // 2 : CAPTION_WORDS]))],
            [],
            [],
            1920,
            1080,
            11.97,
            29.97,
        )
        row = (
            1 + number,
            f"{kind}/batch_{number // 5000:04}/{clip_id}.json",
            2200,
            number,
            f"{number:032x}",
            0,
            status,
            REASONS.get(status, ""),
            "",
            clip_id,
            kind,
            category,
            station,
            day,
            f"https://cdn.example.org/proxy/{clip_id}.mp4",
            1920,
            1080,
            11.97,
            29.97,
            1,
            432,
            f"{station}/{day}/{int(clip_id) // 100}",
            "train",
            "",
            1,
        )
        yield row, encoder.encode(label)


def _vocabulary(rng: random.Random) -> list[str]:
    """Made-up words of two to four syllables, the most frequent first."""
    syllables = [chr(0xAC00 + rng.randrange(11172)) for _ in range(900)]
    return ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(VOCABULARY)]


def _report(num_labels: int) -> dict[str, Any]:
    """The totals of `_rows`, as a report has them."""
    rest = [number // 4 % len(FINAL) for number in range(0, num_labels, 4)]
    statuses = {name: rest.count(place) for place, name in enumerate(FINAL)}
    statuses["accepted"] += num_labels - len(rest)
    return {"label_files": num_labels, "statuses": statuses}


def _pieces(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while piece := list(itertools.islice(rows, size)):
        yield piece


def index(folder: Path) -> None:
    """Seconds and bytes of the search index, from nothing."""
    indexer = Indexer(CatalogView(folder / CATALOG), folder / "own")
    indexer.path.unlink(missing_ok=True)
    started, started_cpu = time.perf_counter(), time.process_time()
    rows_s = indexer.update()
    print(
        f"{indexer.progress.num_texts} labels indexed in {time.perf_counter() - started:.1f} s "
        f"(CPU {time.process_time() - started_cpu:.1f} s), filters ready after {rows_s:.1f} s, "
        f"{indexer.path.stat().st_size / 1e6:.0f} MB"
    )


def pages(folder: Path) -> None:
    """Milliseconds of a page of 50 rows under each kind of filter, from the middle of the list."""
    words = _vocabulary(random.Random(0))
    common, rare = words[0], words[-1]
    filters = {
        "no filter": Filter(),
        "one reason": Filter(reason="http_404"),
        "four fields": Filter("accepted", "", "인물", "제주", "video"),
        "nothing matches": Filter("rejected", "http_404", "인물", "제주", "video"),
        "a week": Filter(first_day="2004-05-01", last_day="2004-05-07"),
        "rare word": Filter(text=rare),
        "common word": Filter(text=common),
        "common word, rare status": Filter("gone", text=common),
        "common word and filters that nothing matches": Filter("gone", "http_404", text=common),
        "common word and three filters": Filter("gone", "", "인물", "제주", text=common),
        "common word and a programme": Filter(programme="충북/2000-05-01/30000", text=common),
        "two syllables": Filter(text=words[9][:2]),
    }
    with open_search(folder / "own" / SEARCH_FILE) as db:
        for name, wanted in filters.items():
            page = find(db, wanted, 0, None, 50)
            middle = page.ids[-1] if page.ids else 0
            again = partial(find, db, wanted, middle, None, 50)
            times = [milliseconds(again) for _ in range(7)]
            print(f"{name}: median {statistics.median(times):.1f} ms, {page.total} hits")


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.dashboard")
    parser.add_argument("what", choices=["make", "index", "pages"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", type=int, default=455_648)
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder, options.labels)
    else:
        {"index": index, "pages": pages}[options.what](options.folder)


if __name__ == "__main__":
    main()
