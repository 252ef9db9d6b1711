"""What a build tells: every label file stands in one place, the totals add up, and the report is
one page.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest

from loader.manifest import read_manifest
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.tables import FINAL
from shardgen.cli import main as shardgen


def test_every_label_file_of_the_corpus_ends_where_it_should(
    tiny_dataset: Path, tiny_corpus: Path
) -> None:
    expected = json.loads((tiny_corpus.parent / "corpus.expected.json").read_text())
    with Catalog(tiny_dataset / "catalog.sqlite") as catalog:
        rows = list(catalog.clips())
    found = {row.label: "kept" if row.status == "accepted" else row.reason for row in rows}
    assert found == expected
    assert len({reason for reason in found.values() if reason != "kept"}) >= 12
    assert len(found) == len(list(tiny_corpus.rglob("*.json")))


def test_the_totals_add_up(tiny_dataset: Path, tiny_corpus: Path) -> None:
    report = json.loads((tiny_dataset / "quality_report.json").read_text())
    num_labels = len(list(tiny_corpus.rglob("*.json")))
    assert report["label_files"] == num_labels == sum(report["statuses"].values())
    assert num_labels == sum(counts["total"] for counts in report["categories"].values())
    for counts in report["categories"].values():
        assert counts["total"] == sum(counts[status] for status in FINAL)
        assert counts["accepted"] == counts["accepted_train"] + counts["accepted_val"]
    shards = [info for infos in read_manifest(tiny_dataset).splits.values() for info in infos]
    assert sum(info.num_samples for info in shards) == sum(
        sum(of.values()) for of in report["samples"].values()
    )
    with (
        (tiny_dataset / "clean_dataset.csv").open(newline="", encoding="utf-8-sig") as clean,
        (tiny_dataset / "defective_samples.csv").open(
            newline="", encoding="utf-8-sig"
        ) as defective,
    ):
        kept, dropped = list(csv.DictReader(clean)), list(csv.DictReader(defective))
    assert (len(kept), len(dropped)) == (
        report["statuses"]["accepted"],
        num_labels - report["statuses"]["accepted"],
    )
    assert all(Path(row["media"]).is_absolute() and Path(row["media"]).is_file() for row in kept)
    assert any('"' in row["prompt"] for row in kept)
    metadata = [
        json.loads(line) for line in (tiny_dataset / "metadata.jsonl").read_text().splitlines()
    ]
    assert len(metadata) == len(kept)
    assert list(metadata[0]) == [
        "clip_id",
        "video_url",
        "thumbnail_urls",
        "prompt",
        "stt_script",
        "duration",
        "fps",
    ]
    assert report["programmes"]["on_both_sides"] == []
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["size_agreement"]["value"] == 0.0 and checks["size_agreement"][
        "sample_size"
    ] >= len(kept)


def test_the_report_is_printed_and_is_one_page_of_its_own(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, copy)
    assert shardgen(["report", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "duplicate_media 1" in printed and "file_validity" in printed
    page = (copy / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 30
    assert "src='http" not in page and "<script" not in page and "<link" not in page
    for text in (
        "within 0.1 s of the declared one",
        "디코딩한 길이와",
        "the same bytes as another clip",
        "다른 클립과 똑같은 파일",
        "양쪽에 모두 있는 것</span>: none",
    ):
        assert text in page
    report = json.loads((copy / "quality_report.json").read_text())
    for reasons in report["reasons"].values():
        assert all(f"<code>{reason}</code>" in page for reason in reasons)
