"""Each label file ends in one status with one reason, and what is decided once stays decided."""

import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from PIL import Image

from bench.label_tree import defective_labels, label_bytes, label_files, make_label
from loader.config import load_toml
from loader.manifest import recipe_id
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.database import CatalogError
from shardgen.catalog.tables import FINAL
from shardgen.config import ShardgenConfig, recipe_of, rules_of
from shardgen.encode.config import EncodeConfig
from shardgen.media.cache import cached_files
from shardgen.media.pictures import encode_mp4
from shardgen.report.estimate import estimate
from shardgen.rules.config import FiltersConfig, SplitConfig, WindowsConfig
from shardgen.stages.config import FetchConfig, LabelsConfig
from shardgen.stages.fetch import fetch_media
from shardgen.stages.filter import filter_labels
from shardgen.stages.ingest import ingest_labels
from shardgen.stages.plan import plan_shards, settle_duplicates
from shardgen.stages.probe import probe_media

Ends = dict[str, tuple[str, str]]


def config_of(root: Path, **changes: Any) -> ShardgenConfig:
    return msgspec.structs.replace(
        ShardgenConfig(
            output=str(root.parent),
            labels=LabelsConfig(root=str(root), workers=1),
            encode=EncodeConfig(model=""),
            windows=WindowsConfig(buckets=("64x32x5", "64x32x1"), samples_per_shard=4),
            fetch=FetchConfig(retries=0, timeout_s=2.0),
        ),
        **changes,
    )


def open_catalog(config: ShardgenConfig) -> Catalog:
    return Catalog(Path(config.output) / "catalog.sqlite")


def advance(_: int) -> None: ...


def judge_and_fetch(catalog: Catalog, config: ShardgenConfig) -> None:
    filter_labels(catalog, config.labels, rules_of(config), advance)
    cache = Path(config.output) / "cache"
    fetch_media(catalog, Path(config.labels.root), cache, config.fetch, advance)


def run(config: ShardgenConfig) -> Ends:
    """All stages up to the plan; label -> (status, reason)."""
    with open_catalog(config) as catalog:
        catalog.adopt_recipe(
            recipe_id(recipe_of(config)), f"{config.labels.limit}/{config.labels.sample_fraction}"
        )
        ingest_labels(
            catalog, Path(config.labels.root), max_bytes=config.labels.max_bytes, workers=1
        )
        judge_and_fetch(catalog, config)
        probe_media(catalog, rules_of(config), 1, advance)
        settle_duplicates(catalog)
        plan_shards(catalog, rules_of(config), advance)
        ends = {row.label: (row.status, row.reason) for row in catalog.clips()}
        assert (
            sum(count.num_labels for count in catalog.status_counts())
            == len(ends)
            == catalog.count(*FINAL)
        )
        return ends


def shards(config: ShardgenConfig) -> dict[str, list[str]]:
    """Shard name -> its labels."""
    with open_catalog(config) as catalog:
        return {
            name: [window.label for window in catalog.shards.plan(name).windows]
            for name in catalog.shards.unfinished()
        }


def row(config: ShardgenConfig, label: str) -> dict[str, Any]:
    with open_catalog(config) as catalog:
        return next(each._asdict() for each in catalog.clips() if each.label == label)


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), (shade % 256, shade // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(num_frames: int, shade: int = 0) -> bytes:
    return encode_mp4(np.full((num_frames, 32, 64, 3), shade, np.uint8), 24.0)


def add_image(root: Path, clip_id: str, media: bytes | None, **label: Any) -> str:
    """Write an image's label and, unless None, its file; returns the label's path."""
    root.mkdir(exist_ok=True)
    made = make_label(clip_id, shots=(("", ""),), media_type="image", **label)
    if media is None:
        made["source_data_info"]["clip_proxy_url"] = ""
    else:
        (root / f"{clip_id}.png").write_bytes(media)
    (root / f"{clip_id}.json").write_bytes(label_bytes(made))
    return f"{clip_id}.json"


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
        assert "samples:     0 at most" in estimate(catalog, rules_of(config))


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


def test_a_changed_recipe_judges_anew_until_shards_are_planned(root: Path) -> None:
    label = add_image(root, "2000001", png(1), resolution="unknown")
    assert run(config_of(root))[label] == ("rejected", "resolution_unknown")
    lenient = config_of(root, filters=FiltersConfig(require_resolution=False))
    assert run(lenient)[label] == ("accepted", "")
    with pytest.raises(CatalogError, match="choose another output folder"):
        run(config_of(root))


def test_missing_or_broken_media_are_looked_at_again_when_they_change(root: Path) -> None:
    config = config_of(root)
    for clip_id, media in (("2000001", None), ("2000002", b""), ("2000003", png(3)[:60])):
        add_image(root, clip_id, media)
    assert [reason for _, reason in run(config).values()] == [
        "media_missing",
        "media_empty",
        "media_truncated",
    ]
    assert [reason for _, reason in run(config).values()] == [
        "media_missing",
        "media_empty",
        "media_truncated",
    ]
    for i in range(1, 4):
        (root / f"200000{i}.png").write_bytes(png(i))
    assert set(run(config).values()) == {("accepted", "")}


def test_a_file_rewritten_between_hashing_and_probing_is_never_taken_for_what_was_hashed(
    root: Path,
) -> None:
    config = config_of(root)
    label = add_image(root, "2000001", png(1))
    with open_catalog(config) as catalog:
        catalog.adopt_recipe(recipe_id(recipe_of(config)), "0/1.0")
        ingest_labels(catalog, root, workers=1)
        judge_and_fetch(catalog, config)
        (root / "2000001.png").write_bytes(png(2) + b"more")
        probe_media(catalog, rules_of(config), 1, advance)
        (clip,) = catalog.clips()
        assert (clip.status, clip.reason, clip.probe) == (
            "unavailable",
            "media_changing",
            None,
        )
    assert run(config)[label] == ("accepted", "")
    assert row(config, label)["media_xxh3"] == xxhash.xxh3_128_hexdigest(png(2) + b"more")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL under which a plain file server shows it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_media_behind_urls_are_fetched_once_and_asked_for_again_only_if_that_may_help(
    root: Path, served: tuple[Path, str]
) -> None:
    folder, url = served
    root.mkdir()
    for clip_id, media in (
        ("2000001", png(1)),
        ("2000002", b"<html>Sorry</html>"),
        ("2000003", None),
    ):
        label = make_label(clip_id, shots=(("", ""),), media_type="image")
        label["source_data_info"]["clip_proxy_url"] = f"{url}/{clip_id}.png?sig=1"
        (root / f"{clip_id}.json").write_bytes(label_bytes(label))
        if media:
            (folder / f"{clip_id}.png").write_bytes(media)
    config = config_of(root)
    first = {
        "2000001.json": ("accepted", ""),
        "2000002.json": ("unavailable", "media_undecodable"),
        "2000003.json": ("unavailable", "http_404"),
    }
    assert run(config) == first
    (folder / "2000001.png").unlink()
    (folder / "2000002.png").write_bytes(png(2))
    (folder / "2000003.png").write_bytes(png(3))
    assert run(config) == {**first, "2000002.json": ("accepted", "")}
    assert run(config_of(root, fetch=FetchConfig(ask_again=True)))["2000003.json"] == (
        "accepted",
        "",
    )


def test_a_full_cache_keeps_what_shards_need_and_the_next_build_goes_on(
    root: Path, served: tuple[Path, str]
) -> None:
    folder, url = served
    root.mkdir()
    for i in range(6):
        label = make_label(f"200000{i}", shots=(("", ""),), media_type="image")
        label["source_data_info"]["clip_proxy_url"] = f"{url}/{i}.png"
        (root / f"200000{i}.json").write_bytes(label_bytes(label))
        (folder / f"{i}.png").write_bytes(png(i))
    size = len(png(0))
    config = config_of(root, fetch=FetchConfig(cache_limit_gib=2.5 * size / 2**30, workers=1))
    cache = Path(config.output) / "cache"
    fetched: list[int] = []
    while not fetched or fetched[-1] < 6:
        ends = Counter(run(config).values())
        fetched.append(ends["accepted", ""])
        assert ends["accepted", ""] + ends["unavailable", "cache_full"] == 6
        assert sum(size for _, size, _ in cached_files(cache)) <= 5 * size
        with open_catalog(config) as catalog:
            for name in catalog.shards.unfinished():
                for window in catalog.shards.plan(name).windows:
                    assert catalog.media.path(window.media_xxh3).is_file()
                catalog.shards.finish(name, None)
    assert 3 <= fetched[0] < 6 and fetched == sorted(set(fetched))
