"""The catalog: who only looks changes nothing, a changed recipe forgets plans but never shards, and
what another build knows can be taken over.
"""

import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from loader.manifest import ShardInfo
from shardgen.catalog.adopt import adopt_media, adopt_recipe
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.database import CatalogError
from shardgen.catalog.rows import MediaFile
from shardgen.catalog.tables import IngestRow
from shardgen.media.errors import MediaError
from shardgen.rules.shards import ShardPlan
from shardgen.rules.windows import Window

KEY = "0" * 32
NAME = "train-160x96x9-000000"
INFO = ShardInfo(
    name=NAME, bucket="160x96x9", num_samples=1, bytes=1, tar_xxh3="", idx_xxh3="", xxh3_xxh3=""
)


def add_label(catalog: Catalog, label: str = "a.json") -> None:
    row = IngestRow(
        label=label,
        size_bytes=1,
        mtime_ns=1,
        label_xxh3="",
        status="ingested",
        reason="",
        detail="",
        byte_offset=None,
        clip_id="1",
        media_type="video",
        category="",
        station="",
        broadcast_date="",
        url="",
        declared_width_px=None,
        declared_height_px=None,
        declared_duration_s=None,
        declared_fps=None,
        num_shots=0,
        body=b"",
    )
    catalog.labels.write([tuple(row)], [], [], [])
    catalog.database.build_indexes()


def plan(catalog: Catalog) -> None:
    window = Window(
        key=KEY,
        label="a.json",
        clip_id="1",
        media_type="video",
        category="",
        programme="",
        split="train",
        shot=0,
        start_ms=0,
        fps=24.0,
        prompt="p",
        bucket="160x96x9",
        media_xxh3="ff",
    )
    shard = ShardPlan(name=NAME, split="train", bucket="160x96x9", windows=[window])
    assert catalog.shards.record_plan([shard]) == 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


def test_a_catalog_is_read_while_it_is_written_and_nobody_waits(path: Path) -> None:
    with Catalog(path) as catalog:
        add_label(catalog)
        with Catalog.open_read_only(path) as reader:
            pages = reader.pages()
            assert [clip.label for clip in next(pages)] == ["a.json"]
            catalog.set_flag("label_changed", [1])
            (clip,) = reader.clips()
            assert clip.flags == "label_changed"
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                reader.set_flag("other", [1])


def test_looking_creates_nothing_and_changes_no_byte(path: Path) -> None:
    with pytest.raises(CatalogError, match="no such file"):
        Catalog.open_read_only(path)
    assert not path.exists()
    with Catalog(path) as catalog:
        add_label(catalog)
    before = path.read_bytes()
    with Catalog.open_read_only(path) as reader:
        assert reader.count() == 1
    assert path.read_bytes() == before


# As somebody whom the folder's mode holds back: root may write anywhere.
COUNT_AS_NOBODY = """
import os, sys
from pathlib import Path
from shardgen.catalog.catalog import Catalog
if os.getuid() == 0:
    os.setuid(65534)
with Catalog.open_read_only(Path(sys.argv[1])) as catalog:
    print(catalog.count())
"""


def test_a_catalog_in_a_folder_that_may_not_be_written_is_read() -> None:
    # not tmp_path: pytest's folders may be entered by their owner alone
    folder = Path(tempfile.mkdtemp())
    try:
        with Catalog(folder / "catalog.sqlite") as catalog:
            add_label(catalog)
        folder.chmod(0o555)
        command = [sys.executable, "-c", COUNT_AS_NOBODY, str(folder / "catalog.sqlite")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_flag_stands_once_and_is_taken_off_whole(path: Path) -> None:
    with Catalog(path) as catalog:
        add_label(catalog)
        for flag in ("media_changed", "black", "media_changed", "dark"):
            catalog.set_flag(flag, [1])
        assert next(catalog.clips()).flags == "media_changed black dark"
        catalog.clear_flag("black", [1])
        catalog.clear_flag("media", [1])
        assert next(catalog.clips()).flags == "media_changed dark"


def test_a_changed_recipe_forgets_what_was_planned_and_never_what_was_written(path: Path) -> None:
    with Catalog(path) as catalog:
        add_label(catalog)
        adopt_recipe(catalog.database, "old", "")
        plan(catalog)
        adopt_recipe(catalog.database, "new", "")
        (clip,) = catalog.clips()
        assert (clip.status, clip.num_windows, catalog.shards.num_planned()) == ("ingested", 0, 0)
        plan(catalog)
        catalog.shards.finish(NAME, INFO)
        with pytest.raises(CatalogError, match=r"fetch\.reuse"):
            adopt_recipe(catalog.database, "old", "")
        assert [info.name for _, info in catalog.shards.finished()] == [NAME]


def test_files_and_probes_of_another_build_are_taken_over_but_not_its_failures(
    path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.sqlite"
    file = MediaFile(tmp_path / "file", size_bytes=3, mtime_ns=4, media_xxh3="ff")
    with Catalog(other) as catalog:
        catalog.media.record_source([], "https://host/1", file)
        catalog.media.record_probe("ee", MediaError("media_truncated", "cut"))
        catalog.db.execute("INSERT INTO media VALUES ('ff', '', '', ?)", (b"{}",))
    with Catalog(path) as catalog:
        adopt_media(catalog.database, other)
        assert catalog.media.source("https://host/1") == file
        media = catalog.db.execute("SELECT media_xxh3 FROM media").fetchall()
        assert media == [("ff",)]
        with pytest.raises(CatalogError, match="can't read"):
            adopt_media(catalog.database, tmp_path / "nowhere.sqlite")
