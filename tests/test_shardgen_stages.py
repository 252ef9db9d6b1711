"""Each label file ends in one status with one reason, and what is decided once stays decided."""

import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from stage_runs import (
    add_image,
    config_of,
    finish_all,
    judge_and_fetch,
    mp4,
    open_catalog,
    png,
    row,
    run,
    shards,
)

from bench.label_tree import defective_labels, label_bytes, label_files, make_label
from loader.config import load_toml
from loader.manifest import recipe_id
from loader.shape import WAN22
from shardgen.catalog.adopt import adopt_recipe
from shardgen.catalog.database import CatalogError
from shardgen.config import ShardgenConfig, recipe_of, rules_of
from shardgen.report.estimate import estimate
from shardgen.rules.config import FiltersConfig, SplitConfig, WindowsConfig
from shardgen.stages.config import LabelsConfig
from shardgen.stages.ingest import ingest_labels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "labels"


def test_every_item_of_the_sample_corpus_ends_as_it_should(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    def tree() -> dict[Path, tuple[bytes, int]]:
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in tiny_corpus.rglob("*")
            if path.is_file()
        }

    before = tree()
    expected = json.loads(tiny_corpus.with_name(tiny_corpus.name + ".expected.json").read_text())
    demo = load_toml(Path(__file__).parents[1] / "configs/shardgen/demo.toml", ShardgenConfig)
    config = config_of(
        tiny_corpus, output=str(tmp_path), windows=demo.windows, filters=demo.filters
    )
    ends = run(config)
    assert {
        label: "kept" if status == "accepted" else reason
        for label, (status, reason) in ends.items()
    } == expected
    planned = shards(config)
    assert run(config) == ends and shards(config) == planned
    assert tree() == before


def test_totals_add_up_over_every_kind_of_defect(root: Path) -> None:
    check_totals(root, 2000)


@pytest.mark.soak
def test_totals_add_up_over_a_hundred_thousand_labels(root: Path) -> None:
    check_totals(root, 100_000)


def check_totals(root: Path, num_labels: int) -> None:
    """Every tenth label is defective; none has media, so the sound ones end as media_missing."""
    root.mkdir()
    expected: Counter[str] = Counter()
    kinds = list(defective_labels("1"))
    for number, (_, data) in enumerate(label_files(num_labels)):
        reason = kinds[number // 10 % len(kinds)] if number % 10 == 0 else "url_refused"
        if reason != "url_refused":
            data = defective_labels(str(3_000_000 + number))[reason]
        elif number % 10 == 1:
            data, reason = data.replace(b"https://cdn", b"file:///etc"), "url_refused"
        else:
            data = data.replace(b"https://cdn.example.org/proxy", b"gopher:/")
        folder = root / f"batch_{number // 5000}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.json").write_bytes(data)
        expected[reason] += 1
    ends = run(config_of(root))
    assert Counter(reason for _, reason in ends.values()) == expected
    assert len(ends) == num_labels


def test_of_equal_media_the_smallest_id_is_kept_and_later_the_one_catalogued_first(
    root: Path,
) -> None:
    add_image(root, "2000003", png(1))
    add_image(root, "2000002", png(1))
    assert run(config_of(root)) == {
        "2000002.json": ("accepted", ""),
        "2000003.json": ("duplicate", "duplicate_media"),
    }
    add_image(root, "2000001", png(1))
    assert run(config_of(root))["2000001.json"] == ("duplicate", "duplicate_media")
    assert row(config_of(root), "2000001.json")["detail"] == "the same bytes as 2000002.json"


def test_an_id_in_two_label_files_is_a_reason_but_not_if_one_cannot_be_read(root: Path) -> None:
    add_image(root, "2000001", png(1))
    (root / "a.json").write_bytes((root / "2000001.json").read_bytes())
    (root / "b.json").write_bytes((root / "2000001.json").read_bytes()[:300])
    assert run(config_of(root)) == {
        "2000001.json": ("accepted", ""),
        "a.json": ("rejected", "clip_id_repeated"),
        "b.json": ("unreadable", "label_not_json"),
    }
    assert "2000001.json" in row(config_of(root), "a.json")["detail"]


def test_a_label_that_no_longer_claims_the_id_stands_in_nobodys_way(root: Path) -> None:
    first = add_image(root, "2000001", None)
    add_image(root, "2000002", png(2))
    second = root / "b.json"
    second.write_bytes((root / first).read_bytes())
    (root / "b.png").write_bytes(png(1))
    assert run(config_of(root)) == {
        first: ("unavailable", "media_missing"),
        "2000002.json": ("accepted", ""),
        "b.json": ("rejected", "clip_id_repeated"),
    }
    (root / first).unlink()
    assert run(config_of(root))["b.json"] == ("accepted", "")


def test_a_label_that_comes_after_an_interruption_does_not_double_an_id(root: Path) -> None:
    add_image(root, "2000002", png(1))
    config = config_of(root)
    with open_catalog(config) as catalog:
        adopt_recipe(catalog.database, recipe_id(recipe_of(config)), "0/1.0")
        ingest_labels(catalog, root, workers=1)
        judge_and_fetch(catalog, config)
    (root / "1.json").write_bytes((root / "2000002.json").read_bytes())
    (root / "1.png").write_bytes(png(2))
    ends = run(config)
    assert ends["1.json"] == ("accepted", "")
    assert ends["2000002.json"] == ("rejected", "clip_id_repeated")


def test_a_label_that_gives_no_window_takes_no_other_ones_place(root: Path) -> None:
    root.mkdir()
    footage = mp4(24 * 4)
    for clip_id, last in (("2000001", "00:00:09;00"), ("2000002", "00:00:03;00")):
        label = make_label(clip_id, shots=(("00:00:00;00", last),))
        (root / f"{clip_id}.json").write_bytes(label_bytes(label))
        (root / f"{clip_id}.mp4").write_bytes(footage)
    config = config_of(root)
    ends = {
        "2000001.json": ("rejected", "timecode_past_end"),
        "2000002.json": ("accepted", ""),
    }
    assert run(config) == ends
    # builds of before made a duplicate of the second, and are put right
    with open_catalog(config) as catalog:
        catalog.db.execute("DELETE FROM windows")
        catalog.db.execute("DELETE FROM shards")
        catalog.db.execute(
            "UPDATE clips SET status = 'duplicate', num_windows = 0 WHERE status = 'accepted'"
        )
    assert run(config) == ends


def test_what_comes_later_goes_to_new_shards_and_moves_nothing(root: Path) -> None:
    config = config_of(root, split=SplitConfig(val_share=0.5))
    for i in range(9):
        add_image(root, str(2000000 + 100 * i), png(i))
    run(config)
    before = shards(config)
    for i in range(9, 15):
        add_image(root, str(2000000 + 100 * i), png(i))
    run(config)
    after = shards(config)
    assert {name: labels for name, labels in after.items() if name in before} == before
    assert sum(map(len, after.values())) == 15 and len({name.split("-")[0] for name in after}) == 2


def test_a_planned_clip_stays_when_its_label_changes_or_goes(root: Path) -> None:
    config = config_of(root)
    for i in range(3):
        add_image(root, str(2000000 + i), png(i))
    run(config)
    planned = shards(config)
    add_image(root, "2000000", png(0), resolution="unknown")
    (root / "2000001.json").unlink()
    assert set(run(config).values()) == {("accepted", "")} and shards(config) == planned
    assert [row(config, f"200000{i}.json")["flags"] for i in range(3)] == [
        "label_changed",
        "label_changed",
        "",
    ]


def test_media_can_reject_what_the_label_passed_and_both_values_are_recorded(root: Path) -> None:
    root.mkdir()
    (root / "2000001.json").write_bytes(label_bytes(make_label("2000001", length="00:00:11.97")))
    (root / "2000001.mp4").write_bytes(mp4(24))
    config = config_of(root)
    assert run(config) == {"2000001.json": ("rejected", "duration_short")}
    assert {
        name: row(config, "2000001.json")[name]
        for name in ("declared", "probed", "declared_width_px")
    } == {"declared": "11.97 s", "probed": "1.00 s", "declared_width_px": 1920}


def test_a_shot_too_short_for_a_window_and_a_timecode_past_the_end_are_reasons(root: Path) -> None:
    root.mkdir()
    config = config_of(root, filters=FiltersConfig(min_duration_s=0))
    for clip_id, tc_out in (
        ("2000001", "00:00:00;02"),
        ("2000002", "00:00:02;00"),
        ("2000003", "00:00:01;00"),
    ):
        label = make_label(clip_id, shots=(("00:00:00;00", tc_out),))
        (root / f"{clip_id}.json").write_bytes(label_bytes(label))
        (root / f"{clip_id}.mp4").write_bytes(mp4(24, int(clip_id) % 10))
    assert run(config) == {
        "2000001.json": ("rejected", "shot_short"),
        "2000003.json": ("accepted", ""),
        "2000002.json": ("rejected", "timecode_past_end"),
    }
    assert row(config, "2000002.json")["probed"] == "1.00 s"


def test_score_only_computes_everything_and_rejects_nothing_that_can_be_encoded(root: Path) -> None:
    add_image(root, "2000001", png(1), resolution="unknown")
    add_image(root, "2000002", b"no picture")
    config = config_of(root, filters=FiltersConfig(score_only=True, max_upscale=0.1))
    assert run(config) == {
        "2000001.json": ("accepted", "resolution_unknown"),
        "2000002.json": ("unavailable", "media_undecodable"),
    }
    assert row(config, "2000001.json")["caption_chars"] > 30


def test_score_only_has_no_shape_for_an_image_where_all_are_for_video(root: Path) -> None:
    label = add_image(root, "2000001", png(1))
    config = config_of(
        root, filters=FiltersConfig(score_only=True), windows=WindowsConfig(buckets=("64x32x5",))
    )
    assert run(config) == {label: ("rejected", "media_type_unwanted")}
    with open_catalog(config) as catalog:
        catalog.db.execute("UPDATE clips SET status = 'wanted'")
        assert "samples:     0 at most" in estimate(catalog, rules_of(config), WAN22)


def test_limit_and_fraction_select_and_widening_them_adds(root: Path) -> None:
    for i in range(20):
        add_image(root, str(2000000 + i), png(i))
    config = config_of(root)
    three = msgspec.structs.replace(config, labels=LabelsConfig(root=str(root), limit=3))
    assert [label for label, end in run(three).items() if end == ("accepted", "")] == [
        "2000000.json",
        "2000001.json",
        "2000002.json",
    ]
    half = msgspec.structs.replace(config, labels=LabelsConfig(root=str(root), sample_fraction=0.5))
    chosen = {label for label, (status, _) in run(half).items() if status == "accepted"}
    assert 5 < len(chosen) < 18
    assert {status for status, _ in run(config).values()} == {"accepted"}


def test_a_changed_recipe_judges_anew_until_shards_are_written(root: Path) -> None:
    label = add_image(root, "2000001", png(1), resolution="unknown")
    strict, lenient = (
        config_of(root, filters=FiltersConfig(require_resolution=strict))
        for strict in (True, False)
    )
    assert run(strict)[label] == ("rejected", "resolution_unknown")
    assert run(lenient)[label] == ("accepted", "")
    # a plan alone pins nothing: a first try with a wrong setting can be put right
    assert run(strict)[label] == ("rejected", "resolution_unknown")
    assert run(lenient)[label] == ("accepted", "")
    finish_all(lenient)
    with pytest.raises(CatalogError, match="choose another output folder"):
        run(strict)
