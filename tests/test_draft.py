"""What waits between two steps waits on disk, in order, and leaves nothing behind. (Draft:
test_plan.py.)
"""

import tracemalloc
from pathlib import Path

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.drafts import Urls


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
                catalog.remember("last", url)
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
