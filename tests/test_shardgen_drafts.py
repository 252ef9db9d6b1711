"""What waits between two steps waits on disk, in order, and leaves nothing behind."""

import random
import sqlite3
import tracemalloc
from pathlib import Path

import msgspec

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.drafts import Draft, Urls
from shardgen.rules.shards import window_order
from shardgen.rules.windows import Window


def test_each_url_comes_once_in_the_order_of_its_first_coming_while_the_catalog_is_written(
    tmp_path: Path,
) -> None:
    with Catalog(tmp_path / "catalog.sqlite") as catalog:
        with Urls(catalog.db) as urls:
            for clip in range(6000):
                urls.add(f"https://host/{clip * 7 % 3000:05}", clip)
            got = []
            for url, clips in urls:
                got.append((url, clips))
                catalog.database.remember("last", url)
                if len(got) == 2500:  # raises, or is busy, where a cursor stands open
                    assert tuple(
                        catalog.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                    ) == (0, 0, 0)
        assert got == [
            (f"https://host/{clip * 7 % 3000:05}", [clip, clip + 3000]) for clip in range(3000)
        ]
        assert not catalog.db.execute("SELECT 1 FROM temp.sqlite_master").fetchone()


def test_urls_are_not_held_in_memory(tmp_path: Path) -> None:
    with Catalog(tmp_path / "catalog.sqlite") as catalog, Urls(catalog.db) as urls:
        tracemalloc.start()
        for clip in range(20_000):
            urls.add(f"https://cdn.example.org/{clip:0100}", clip)
        num_clips = sum(len(clips) for _, clips in urls)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert num_clips == 20_000 and peak_bytes < 1_500_000  # a page; all would be 4 MB


def windows(count: int) -> list[Window]:
    return [
        Window(
            key=f"{random.Random(i).getrandbits(128):032x}",
            label=f"{i}.json",
            clip_id=str(i),
            media_type="video",
            category="",
            programme="",
            split="val" if i % 10 == 0 else "train",
            shot=0,
            start_ms=0,
            fps=24.0,
            prompt="",
            bucket="1280x704x49" if i % 3 else "1280x704x17",
            media_xxh3="",
        )
        for i in range(count)
    ]


def test_a_draft_gives_windows_back_in_the_order_of_shards_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    made = [
        msgspec.structs.replace(each, media_xxh3=f"{i % 7:032x}", prompt=f'{i}: "가"\n')
        for i, each in enumerate(windows(200))
    ]
    database = sqlite3.connect(tmp_path / "catalog.sqlite", isolation_level=None)
    with Draft(database) as draft:
        draft.add(made[:90])
        draft.add(made[90:])
        assert list(draft.windows()) == sorted(made, key=window_order)
    assert database.execute("SELECT count(*) FROM sqlite_temp_master").fetchone() == (0,)
    database.close()
    assert (tmp_path / "catalog.sqlite").stat().st_size == 0
