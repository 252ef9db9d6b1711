"""Every label file is in the catalog once; a second run reads only what changed; nothing in the
tree stops a run.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.label_tree import defective_labels, label_bytes, make_label, write_label_tree
from shardgen.catalog.catalog import Catalog
from shardgen.stages.ingest import ingest_labels


def ingest(root: Path, workers: int = 1) -> dict[str, tuple[str, str, int | None]]:
    """label -> (status, reason, byte_offset), after an ingest into the catalog beside `root`."""
    with Catalog(root.with_suffix(".sqlite")) as catalog:
        ingest_labels(catalog, root, workers=workers)
        return {row.label: (row.status, row.reason, row.byte_offset) for row in catalog.clips()}


def reads(root: Path) -> int:
    """How many label files an ingest opens and parses (by the writes it makes: an unchanged file
    makes none).
    """
    with Catalog(root.with_suffix(".sqlite")) as catalog:
        before = catalog.db.total_changes
        ingest_labels(catalog, root, workers=1)
        return catalog.db.total_changes - before


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "labels"
    write_label_tree(root, 40)
    return root


def test_processes_and_one_process_give_the_same_catalog(tmp_path: Path) -> None:
    write_label_tree(tmp_path / "labels", 6000)
    alone = ingest(tmp_path / "labels", workers=1)
    (tmp_path / "labels.sqlite").unlink()
    assert ingest(tmp_path / "labels", workers=2) == alone
    assert len(alone) == 6000 and {status for status, _, _ in alone.values()} == {"ingested"}


def test_each_unreadable_label_is_listed_with_its_reason(tree: Path) -> None:
    defects = {
        reason: data
        for reason, data in defective_labels("2400101").items()
        if reason.startswith("label_")
    }
    for reason, data in defects.items():
        (tree / f"{reason}.json").write_bytes(data)
    rows = ingest(tree)
    assert {
        label.removesuffix(".json"): row[1] for label, row in rows.items() if row[0] == "unreadable"
    } == {reason: reason for reason in defects}
    assert len(rows) == 40 + len(defects)


def test_odd_things_in_the_tree_stop_nothing(tree: Path) -> None:
    (tree / "link.json").symlink_to(tree / "nowhere")
    os.mkfifo(tree / "pipe.json")
    (tree / "folder.json").mkdir()
    (tree / "loop").symlink_to(tree)
    (tree / "notes.txt").write_text("no label")
    with open(os.fsencode(tree) + b"/\xb0\xa1.json", "wb") as file:
        file.write(label_bytes(make_label("2400101")))
    rows = ingest(tree)
    assert {label: row[1] for label, row in rows.items() if row[0] != "ingested"} == {
        "link.json": "label_unreadable",
        "pipe.json": "label_unreadable",
        "\\xb0\\xa1.json": "label_bad_name",
    }
    assert len(rows) == 43
    assert ingest(tree) == rows


def test_a_second_run_reads_nothing_and_then_only_what_changed(tree: Path) -> None:
    ingest(tree)
    assert reads(tree) == 0
    labels = sorted(tree.rglob("*.json"))
    labels[0].write_bytes(label_bytes(make_label("7000001")))
    os.utime(labels[1], (1, 1))
    labels[2].unlink()
    (tree / "video" / "new.json").write_bytes(b"[")
    rows = ingest(tree)
    with Catalog(tree.with_suffix(".sqlite")) as catalog:
        ids = {row.label: row.clip_id for row in catalog.clips()}
    assert ids[str(labels[0].relative_to(tree))] == "7000001"
    assert rows[str(labels[1].relative_to(tree))][0] == "ingested"
    assert rows[str(labels[2].relative_to(tree))][:2] == ("gone", "label_gone")
    assert rows["video/new.json"][:2] == ("unreadable", "label_not_object")
    assert reads(tree) == 0


def test_a_folder_that_vanished_and_came_back(tree: Path) -> None:
    before = ingest(tree)
    (tree / "video").rename(tree.parent / "away")
    assert {row[0] for label, row in ingest(tree).items() if label.startswith("video/")} == {"gone"}
    (tree.parent / "away").rename(tree / "video")
    assert ingest(tree) == before


def test_no_label_file_is_changed(tree: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tree.rglob("*.json")}
    ingest(tree)
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tree.rglob("*.json")
    } == before


def test_killed_at_any_moment_the_next_run_completes_the_catalog(tmp_path: Path) -> None:
    root = tmp_path / "labels"
    write_label_tree(root, 9000)
    program = (
        "import sys; from pathlib import Path; from shardgen.catalog.catalog import Catalog; "
        "from shardgen.stages.ingest import ingest_labels; root = Path(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    with Catalog(root.with_suffix('.sqlite')) as catalog:\n"
        "        ingest_labels(catalog, root, workers=1)"
    )
    for wait_s in (0.3, 0.5, 0.8):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(root)], start_new_session=True
        )
        time.sleep(wait_s * random.Random(wait_s).uniform(0.8, 1.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    rows = ingest(root)
    assert len(rows) == 9000 and {row[0] for row in rows.values()} == {"ingested"}
    with Catalog(root.with_suffix(".sqlite")) as catalog:
        assert catalog.db.execute("SELECT count(*) FROM bodies").fetchone()[0] == 9000
        assert catalog.labels.read(9000).clip_id.startswith("300")
