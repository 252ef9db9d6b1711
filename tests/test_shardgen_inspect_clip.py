"""What became of a clip can be asked for by its id: verdict, prompts, and the very frames that
the encoder gets.
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from shardgen.build import build
from shardgen.catalog.catalog import Catalog
from shardgen.cli import main
from shardgen.config import ShardgenConfig, take_apart
from shardgen.encode.config import EncodeConfig
from shardgen.rules.config import WindowsConfig
from shardgen.stages.config import LabelsConfig


@pytest.fixture(scope="module")
def planned(
    tiny_corpus: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The sample corpus up to the plan: nothing is encoded."""
    output = tmp_path_factory.mktemp("planned") / "dataset"
    build(
        take_apart(
            ShardgenConfig(
                output=str(output),
                labels=LabelsConfig(root=str(tiny_corpus)),
                windows=WindowsConfig(buckets=("160x96x9", "96x160x9", "160x96x1"), per_shot=2),
                encode=EncodeConfig(model=str(tiny_checkpoint)),
            )
        ),
        "plan",
    )
    return output


def test_a_clip_shows_its_windows_with_their_prompts_and_frames(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", "2400101", "--dataset", str(planned), "--sheet", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "video/batch_0001/2400101.json: accepted"
    assert (
        sum("160x96x9  shot 0" in line for line in lines)
        == sum("160x96x9  shot 1" in line for line in lines)
        == 2
    )
    assert any("기지개를 켜며" in line for line in lines)
    with Image.open(sheet) as image:
        assert image.size == (8 * 160, 4 * (96 + 16))
        assert image.getcolors(100) is None  # more than a hundred: pictures, not a blank sheet


def test_a_rejected_clip_shows_why_and_what_it_would_have_been(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", "2400913", "--dataset", str(planned), "--sheet", str(sheet)]) == 0
    assert (
        "duplicate (duplicate_media: the same bytes as video/batch_0001/2400101.json)"
        in capsys.readouterr().out
    )
    assert sheet.is_file()
    assert main(["inspect", "2400916", "--dataset", str(planned)]) == 0
    out = capsys.readouterr().out
    assert "no windows: timecode_past_end" in out and "declared 5.21 s, probed 3.20 s" in out


def test_a_clip_rejected_by_its_label_is_shown_too(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", "2400911", "--dataset", str(planned), "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "rejected (timecode_reversed" in out and "whole_clip" in out and "초록색 울타리" in out
    with Image.open(sheet) as image:
        assert image.size == (8 * 160, 2 * (96 + 16))


def test_the_prompts_are_shown_without_footage(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(planned, dataset)
    with Catalog(dataset / "catalog.sqlite") as catalog:
        catalog.db.execute("UPDATE sources SET path = path || '.evicted'")
    assert main(["inspect", "2400101", "--dataset", str(dataset)]) == 0
    assert "기지개를 켜며" in capsys.readouterr().out
    assert (
        main(
            [
                "inspect",
                "2400101",
                "--dataset",
                str(dataset),
                "--sheet",
                str(tmp_path / "sheet.png"),
            ]
        )
        == 2
    )
    captured = capsys.readouterr()
    assert "기지개를 켜며" in captured.out and "the cache has let it go" in captured.out
    assert "no footage" in captured.err
    assert main(["inspect", "2400903", "--dataset", str(planned)]) == 0  # it never had any
    lines = capsys.readouterr().out.splitlines()
    assert (
        "media_missing" in lines[1]
        and lines[2].startswith("  all its sentences: ")
        and len(lines[2]) > 50
    )


def test_what_cannot_be_shown_is_said_in_one_line(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    for arguments, message in (
        (["2400903", "--sheet", str(sheet)], "no footage"),
        (["7777777"], "no readable label"),
        (["../../etc"], "no readable label"),
    ):
        assert main(["inspect", *arguments, "--dataset", str(planned)]) == 2
        assert message in capsys.readouterr().err
    assert main(["inspect", "2400101", "--dataset", str(tmp_path)]) == 2
    assert not sheet.exists() and not (tmp_path / "catalog.sqlite").exists()


def test_windows_are_listed_in_time_order_whatever_the_order_in_the_label(
    planned: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = json.loads((tiny_corpus / "video/batch_0001/2400102.json").read_text())
    main(["inspect", "2400102", "--dataset", str(planned)])
    out = capsys.readouterr().out
    texts = [each["text"] for each in label["labeling_data_info"]["caption_info"]["object_level"]]
    assert out.index(texts[-1]) < out.index(texts[0])  # in the label they are out of order
