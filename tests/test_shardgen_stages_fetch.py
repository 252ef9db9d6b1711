"""Media are fetched and hashed once, looked at again when they change, and never taken for what
they are not.
"""

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import xxhash
from stage_runs import (
    add_image,
    advance,
    config_of,
    finish_all,
    judge_and_fetch,
    open_catalog,
    png,
    row,
    run,
)

from bench.label_tree import label_bytes, make_label
from loader.manifest import recipe_id
from shardgen.catalog.adopt import adopt_media, adopt_recipe
from shardgen.catalog.database import CatalogError
from shardgen.config import recipe_of, rules_of
from shardgen.media.cache import cached_files
from shardgen.stages.config import FetchConfig, LabelsConfig
from shardgen.stages.ingest import ingest_labels
from shardgen.stages.probe import probe_media


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "labels"


def test_broken_footage_stays_where_it_is_whatever_the_label_root_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("http_archive")
    add_image(root, "2000001", png(3)[:60])
    assert set(run(config_of(root)).values()) == {("unavailable", "media_truncated")}
    assert (root / "2000001.png").exists()


def test_a_file_of_another_suffix_is_named_where_none_is_found(root: Path) -> None:
    config = config_of(root)
    label = add_image(root, "2000001", None)
    run(config)
    assert row(config, label)["detail"] == "no file beside the label, no URL in it"
    (root / "2000001.TIF").touch()
    run(config)
    assert row(config, label)["detail"].endswith("URL in it; not taken as image: 2000001.TIF")


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
        adopt_recipe(catalog.database, recipe_id(recipe_of(config)), "0/1.0")
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


def test_what_changes_after_an_interrupted_build_counts_as_if_it_had_never_run(root: Path) -> None:
    config = config_of(root)
    for number in (1, 2, 3):
        add_image(root, f"200000{number}", png(number))
    with open_catalog(config) as catalog:
        adopt_recipe(catalog.database, recipe_id(recipe_of(config)), "0/1.0")
        ingest_labels(catalog, root, workers=1)
        judge_and_fetch(catalog, config)
        probe_media(catalog, rules_of(config), 1, advance)
        assert catalog.count("sound") == 3  # and killed here
    (root / "2000001.png").write_bytes(png(9) + b"more")
    two = config_of(root, labels=LabelsConfig(root=str(root), workers=1, limit=2))
    assert list(run(two).values()) == [
        ("accepted", ""),
        ("accepted", ""),
        ("skipped", "not_selected"),
    ]
    assert row(two, "2000001.json")["media_xxh3"] == xxhash.xxh3_128_hexdigest(png(9) + b"more")


def test_of_equal_files_one_that_still_holds_the_bytes_is_encoded(root: Path) -> None:
    config = config_of(root)
    add_image(root, "2000001", png(1))
    add_image(root, "2000002", png(1))
    assert set(run(config).values()) == {("accepted", ""), ("duplicate", "duplicate_media")}
    planned = row(config, "2000001.json")["media_xxh3"]
    (root / "2000001.png").write_bytes(png(2) + b"more")
    with open_catalog(config) as catalog:
        assert catalog.media.path(planned) == root / "2000002.png"


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


def test_what_a_planned_shard_needs_is_fetched_again_if_the_cache_was_deleted(
    root: Path, served: tuple[Path, str]
) -> None:
    folder, url = served
    root.mkdir()
    for clip_id in ("2000001", "2000002"):
        label = make_label(clip_id, shots=(("", ""),), media_type="image")
        label["source_data_info"]["clip_proxy_url"] = f"{url}/{clip_id}.png"
        (root / f"{clip_id}.json").write_bytes(label_bytes(label))
        (folder / f"{clip_id}.png").write_bytes(png(int(clip_id) % 2))
    config = config_of(root)
    ends = run(config)
    assert set(ends.values()) == {("accepted", "")}
    shutil.rmtree(root.parent / "cache")
    (folder / "2000002.png").write_bytes(png(5))  # and this one is another picture now
    assert run(config) == ends
    with open_catalog(config) as catalog:
        first, second = (clip.media_xxh3 for clip in catalog.clips())
        assert xxhash.xxh3_128_hexdigest(catalog.media.path(first).read_bytes()) == first
        with pytest.raises(CatalogError, match="start a new output folder"):
            catalog.media.path(second)
    # once the shard is written nothing needs it
    finish_all(config)
    shutil.rmtree(root.parent / "cache")
    assert run(config) == ends
    assert not list((root.parent / "cache").glob("*/*"))


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


def test_footage_replaced_after_its_shard_was_written_is_flagged_and_the_shard_stays(
    root: Path,
) -> None:
    config = config_of(root)
    labels = [add_image(root, f"200000{i}", png(i)) for i in range(3)]
    run(config)
    finish_all(config)
    planned = row(config, labels[0])["media_xxh3"]

    def flags() -> list[str]:
        assert set(run(config).values()) == {("accepted", "")}
        return [row(config, label)["flags"] for label in labels]

    assert flags() == ["", "", ""]
    (root / "2000000.png").write_bytes(png(7))
    os.utime(root / "2000001.png", (1, 1))  # touched, with the same bytes
    (root / "2000002.png").unlink()  # gone is not replaced
    assert flags() == flags() == ["media_changed", "", ""]
    assert row(config, labels[0])["media_xxh3"] == planned
    (root / "2000000.png").write_bytes(png(0))
    assert flags() == ["", "", ""]


def test_what_another_build_has_fetched_is_neither_downloaded_nor_probed_again(
    root: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    root.mkdir()
    label = make_label("2000001", shots=(("", ""),), media_type="image")
    label["source_data_info"]["clip_proxy_url"] = f"{url}/1.png"
    (root / "2000001.json").write_bytes(label_bytes(label))
    (folder / "1.png").write_bytes(png(1))
    first = config_of(root)
    assert run(first)["2000001.json"] == ("accepted", "")

    (folder / "1.png").unlink()
    monkeypatch.setattr("shardgen.stages.probe.probe", None)
    second = config_of(root, output=str(root.parent / "second"))
    Path(second.output).mkdir()
    with open_catalog(second) as catalog:
        adopt_media(catalog.database, Path(first.output) / "catalog.sqlite")
    assert run(second)["2000001.json"] == ("accepted", "")
