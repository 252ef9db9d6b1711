"""Media by range: of files, of members of shards, of proxies; and what is shown of each clip."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from starlette.testclient import TestClient

from tools.dashboard import proxy
from tools.dashboard.app import create_app
from tools.dashboard.catalog import Clip
from tools.dashboard.media import byte_range, sample_members, shown
from tools.dashboard.sources import find_sources, inside
from tools.dashboard.state import State


@pytest.fixture(scope="module")
def client(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("media")
    shutil.copytree(tiny_dataset, folder / "tiny")
    app = create_app(find_sources([str(folder / "tiny")], None, folder / "own"), with_index=False)
    app.state.dashboard.indexers["tiny"].update()
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def state(client: TestClient) -> State:
    state: State = client.app.state.dashboard  # type: ignore[attr-defined]
    return state


def clip(state: State, clip_id: str) -> Clip:
    return state.catalogs["tiny"].claims(clip_id)[0]


def test_a_clip_is_served_by_range(client: TestClient, state: State) -> None:
    row = clip(state, "2400101")
    url = f"/data/tiny/media/clip/{row.id}"
    whole = client.get(url)
    assert whole.status_code == 200 and whole.headers["content-type"] == "video/mp4"
    part = client.get(url, headers={"range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == whole.content[100:200]
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole.content)}"


def test_a_member_of_a_shard_is_served_by_range(client: TestClient, state: State) -> None:
    dataset = state.sources.datasets["tiny"]
    key = state.catalogs["tiny"].window_page("", 1)[0][0]
    window, shard, _ = state.catalogs["tiny"].window(key) or pytest.fail("no window")
    keys = [each[0] for each in state.catalogs["tiny"].window_page("", 1000)]
    key = next(each for each in keys if "jpg" in _members(state, each))
    url = f"/data/tiny/media/sample/{key}.jpg"
    whole = client.get(url)
    assert whole.status_code == 200 and whole.content[:3] == b"\xff\xd8\xff"
    assert (dataset.folder / window.split / f"{shard}.tar").is_file()
    for header, expected in (
        ("bytes=0-9", whole.content[:10]),
        ("bytes=10-", whole.content[10:]),
        ("bytes=-7", whole.content[-7:]),
        ("bytes=5-99999999", whole.content[5:]),
    ):
        part = client.get(url, headers={"range": header})
        assert (part.status_code, part.content) == (206, expected)
        assert int(part.headers["content-length"]) == len(expected)
    for header in ("bytes=99999999-", "bytes=9-2", "bytes=x-y", "lines=1-2", "bytes=-0"):
        assert client.get(url, headers={"range": header}).status_code == 416
    etag = whole.headers["etag"]
    assert client.get(url, headers={"if-none-match": etag}).status_code == 304
    assert client.get(url, headers={"range": "bytes=0-9", "if-range": '"old"'}).status_code == 200


def _members(state: State, key: str) -> list[str]:
    return list(sample_members(state, state.sources.datasets["tiny"], key))


def test_ranges_are_read_as_the_standard_has_them() -> None:
    assert byte_range("bytes=0-0", 5) == (0, 1)
    assert byte_range("bytes=1-2,4-5", 9) == (1, 3)
    assert byte_range("bytes=-9", 5) == (0, 5)
    assert byte_range("bytes=0-1", 0) is None


def test_what_is_shown_is_named(client: TestClient, state: State) -> None:
    dataset = state.sources.datasets["tiny"]
    catalog = state.catalogs["tiny"]

    def kind(clip_id: str) -> str:
        row = clip(state, clip_id)
        probe = catalog.probe(row.media_xxh3) if row.media_xxh3 else None
        return shown(state, dataset, row, probe).kind

    assert kind("2400101") == "original"
    assert kind("2500101") == "picture"
    assert kind("2400903") == "none"  # missing
    assert kind("2400902") == "none"  # empty
    assert kind("2400413") in ("making", "proxy")  # ten bits
    page = client.get(f"/data/tiny/case/{clip(state, '2400903').id}?lang=en").text
    assert "Shown: nothing" in page


def test_a_proxy_plays_in_browsers(state: State, tmp_path: Path) -> None:
    row = clip(state, "2400413")
    source = state.catalogs["tiny"].media_paths(row.media_xxh3)[0]
    target = tmp_path / "proxy.mp4"
    proxy.make_proxy(source, target)
    with av.open(str(source)) as old, av.open(str(target)) as new:
        frames = list(new.decode(video=0))
        assert new.streams.video[0].codec_context.name == "h264"
        assert frames[0].format.name == "yuv420p" and frames[0].height <= proxy.HEIGHT_PX
        assert len(frames) == sum(1 for _ in old.decode(video=0))
    assert list(tmp_path.iterdir()) == [target]
    assert (proxy.still(source) or b"")[:3] == b"\xff\xd8\xff"


def test_a_proxy_of_no_video_fails_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"no video at all")
    with pytest.raises((OSError, ValueError)):
        proxy.make_proxy(source, tmp_path / "out" / "proxy.mp4")
    assert proxy.still(source) is None
    assert list(tmp_path.iterdir()) == [source]


def test_a_proxy_is_bounded_in_length(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "MAX_LENGTH_S", 1.0)
    row = clip(state, "2400101")
    source = state.catalogs["tiny"].media_paths(row.media_xxh3)[0]
    proxy.make_proxy(source, tmp_path / "proxy.mp4")
    with av.open(str(tmp_path / "proxy.mp4")) as made:
        assert 25 <= sum(1 for _ in made.decode(video=0)) <= 32


def test_the_folder_of_proxies_keeps_what_was_wanted_last(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(b"x" * 100)
        os.utime(path, (number, number))
    proxy.evict(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.mp4", "3.mp4"]


def test_only_real_files_below_a_root_are_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "clip.mp4").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "secret")
    roots = [root.resolve()]
    assert inside(root / "clip.mp4", roots) == (root / "clip.mp4").resolve()
    for path in (root / "link", root / "../secret", root, root / "missing", Path("/etc/passwd")):
        assert inside(path, roots) is None
