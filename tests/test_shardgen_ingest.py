"""Every label file is in the catalog once; a second run reads only what changed; nothing in the
tree stops a run.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    (tree / "circle").symlink_to("circle")
    (tree / "circle.json").symlink_to("circle.json")
    (tree / "notes.txt").write_text("no label")
    with open(os.fsencode(tree) + b"/\xb0\xa1.json", "wb") as file:
        file.write(label_bytes(make_label("2400101")))
    rows = ingest(tree)
    assert {label: row[1] for label, row in rows.items() if row[0] != "ingested"} == {
        "link.json": "label_unreadable",
        "circle.json": "label_unreadable",
        "pipe.json": "label_unreadable",
        "\\xb0\\xa1.json": "label_bad_name",
    }
    assert len(rows) == 44
    assert ingest(tree) == rows


def test_a_suffix_in_capitals_and_a_linked_folder_are_labels_too(tree: Path) -> None:
    upper = tree / "video" / "7000001.JSON"
    upper.write_bytes(label_bytes(make_label("7000001")))
    elsewhere = tree.parent / "elsewhere"
    write_label_tree(elsewhere, 3)
    (elsewhere / "round").symlink_to(tree)
    (tree / "batch_9999").symlink_to(elsewhere)
    (tree / "again").symlink_to(tree / "video")  # known by its own path
    rows = ingest(tree)
    assert {row[0] for row in rows.values()} == {"ingested"}
    linked = {label for label in rows if label.startswith("batch_9999/")}
    assert len(linked) == 3 and len(rows) == 40 + 1 + 3
    assert "video/7000001.JSON" in rows and ingest(tree) == rows


def test_a_folder_that_vanishes_while_the_tree_is_read_ends_nothing(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = sorted({label.parent for label in tree.rglob("*.json")})
    before = ingest(tree)
    scandir = os.scandir

    def late(path: Any) -> Any:
        if path == folders[-1] and folders[-1].exists():
            shutil.rmtree(folders[-1])
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    rows = ingest(tree)
    inside = f"{folders[-1].relative_to(tree)}/"
    gone = {label for label, row in rows.items() if row[0] == "gone"}
    assert gone == {label for label in before if label.startswith(inside)} != set()
    assert len(rows) == 40

    # one that vanishes between the walk and the reading
    monkeypatch.undo()
    listed = [(str(folders[0].relative_to(tree)), ["x.json"])]
    shutil.rmtree(folders[0])
    monkeypatch.setattr("shardgen.stages.ingest._folders", lambda root: iter(listed))
    assert ingest(tree)[f"{listed[0][0]}/x.json"][:2] == ("unreadable", "label_unreadable")


def test_a_root_that_vanishes_is_an_error_not_a_tree_of_gone_labels(tree: Path) -> None:
    before = ingest(tree)
    tree.rename(tree.parent / "away")
    with pytest.raises(FileNotFoundError, match="labels"):
        ingest(tree)
    (tree.parent / "away").rename(tree)
    assert ingest(tree) == before


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
