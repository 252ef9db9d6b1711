"""Datasets over HTTP and S3: the same bytes as locally, through dying servers, killed readers and
a bounded cache.
"""

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loader.feed import Feed
from loader.manifest import DatasetError
from loader.read import TooManyDamagedError
from loader.remote import RemoteError, RemoteStore
from loader.store import read_dataset
from tools.fake.batch import write_synthetic_dataset
from tools.fake.feed import make_feed


class Handler(BaseHTTPRequestHandler):
    """Files below `server.folder`, with Range; every request is noted in `server.requests`."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests.append(
            (self.path, self.headers.get("Range", ""), self.headers.get("Authorization", ""))
        )
        path = server.folder / self.path.lstrip("/")
        if server.status != 200 or not path.is_file():
            return self._answer(server.status if server.status != 200 else 404, b"")
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or not server.takes_ranges:
            return self._answer(200, data)
        start, end = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            return self._answer(416, b"", f"bytes */{len(data)}")
        self._answer(206, data[start:end], f"bytes {start}-{end - 1}/{len(data)}")

    def _answer(self, status: int, data: bytes, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.requests, self.status, self.takes_ranges = (
            folder,
            list[tuple[str, str, str]](),
            200,
            True,
        )
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "data"
    write_synthetic_dataset(folder, {"64x32x5": 40, "64x32x1": 20}, samples_per_shard=8, text_dim=8)
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that comes and goes. It is bound, so nobody else gets it while nobody listens."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def server(dataset: Path) -> Iterator[Server]:
    server = Server(dataset.parent)
    yield server
    server.stop()


def make(
    location: Path | str, cache_dir: Path | None = None, cache_bytes: int = 10**9, rank: int = 0
) -> Feed:
    return make_feed(
        location,
        global_batch=8,
        micro_batch=4,
        rank=rank,
        world_size=2,
        seed=1,
        num_threads=2,
        cache_dir=str(cache_dir or ""),
        cache_gib=cache_bytes / 2**30,
    )


def take(feed: Feed, num: int) -> list[tuple[list[str], float]]:
    return [
        (batch.keys, batch.latent_BCTHW.float().sum().item() + batch.text_BSD.float().sum().item())
        for batch, _ in (next(feed) for _ in range(num))
    ]


def test_over_http_it_reads_the_same_batches_by_ranges(dataset: Path, server: Server) -> None:
    with make(dataset) as local, make(f"{server.url}/data") as remote:
        assert take(remote, 10) == take(local, 10)
    assert not [path for path, span, _ in server.requests if path.endswith(".tar") and not span]


def test_over_s3_requests_are_signed(
    dataset: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with make(dataset) as local, make("s3://data") as remote:  # path-style: /bucket/key
        assert take(remote, 4) == take(local, 4)
    assert all(
        authorization.startswith("AWS4-HMAC-SHA256") for _, _, authorization in server.requests
    )


def test_a_server_that_dies_and_returns_in_mid_epoch_costs_time_only(
    dataset: Path, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(dataset.parent, port)
    with make(dataset) as local, make(f"{server.url}/data") as remote:
        expected = take(local, 12)
        got = take(remote, 2)
        server.stop()
        back: list[Server] = []
        timer = threading.Timer(0.7, lambda: back.append(Server(dataset.parent, port)))
        timer.start()
        got += take(remote, 10)
        timer.join()
        assert got == expected and remote.damages == []
    back[0].stop()
    assert "trying again" in caplog.text


def test_server_errors_are_retried_and_then_named(server: Server) -> None:
    server.status = 503
    with pytest.raises(RemoteError, match=rf"{server.url}/data/x: no answer for 2 s.*resumes"):
        RemoteStore(f"{server.url}/data", None, retry_for_s=2.0).read_file("x")
    assert len(server.requests) >= 2


def test_closing_does_not_wait_for_a_server_that_does_not_answer(dataset: Path, port: int) -> None:
    server = Server(dataset, port)
    feed = make(server.url)
    next(feed)
    server.stop()
    errors: list[Exception] = []

    def read() -> None:
        try:
            take(feed, 1000)
        except (RemoteError, CancelledError) as error:
            errors.append(error)

    waiting = threading.Thread(target=read)
    waiting.start()
    time.sleep(0.5)  # its reader has found nobody there, and would try for 600 s
    assert waiting.is_alive()
    begin_s = time.monotonic()
    feed.close()
    waiting.join(120)
    assert not waiting.is_alive() and time.monotonic() - begin_s < 120 and len(errors) == 1


def test_what_will_not_get_better_is_not_retried(server: Server) -> None:
    store = RemoteStore(f"{server.url}/data", None)
    with pytest.raises(FileNotFoundError, match="data/nothing"):
        store.read_file("nothing")
    server.status = 403
    with pytest.raises(RemoteError, match=r"refused.*credentials"):
        store.read_file("manifest.json")
    server.status, server.takes_ranges = 200, False
    with pytest.raises(RemoteError, match="Range"):
        store.open("manifest.json", 100, "").read(0, 10)
    assert len(server.requests) == 3
    with pytest.raises(DatasetError, match="no manifest"):
        read_dataset(f"{server.url}/elsewhere")
    with pytest.raises(RemoteError, match="ftp://x"):
        read_dataset("ftp://x/y")


def test_what_was_read_once_comes_from_the_cache(
    server: Server, dataset: Path, tmp_path: Path
) -> None:
    with make(f"{server.url}/data", tmp_path) as first, make(dataset) as local:
        expected = take(local, 14)
        assert take(first, 14) == expected
    server.requests.clear()
    with make(f"{server.url}/data", tmp_path) as again:
        assert take(again, 7) == expected[:7]
    assert {path for path, _, _ in server.requests} == {
        "/data/manifest.json",
        "/data/empty_prompt.text.zst",
    }


def test_a_damaged_cache_entry_is_fetched_anew(
    server: Server, dataset: Path, tmp_path: Path
) -> None:
    with make(f"{server.url}/data", tmp_path) as feed:
        expected = take(feed, 4)
    for path in tmp_path.glob("*/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:-1] if len(data) % 2 else data)
    with make(f"{server.url}/data", tmp_path) as feed:
        assert take(feed, 4) == expected and feed.damages == []


def test_a_damaged_sample_on_the_server_is_found(
    server: Server, dataset: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(dataset, dataset.parent / "damaged"))
    for tar in (copy / "train").glob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[520] ^= 1
        tar.write_bytes(data)
    with make(f"{server.url}/damaged") as feed:
        take(feed, 14)
        assert feed.damages and all(damage.member.endswith(".json") for damage in feed.damages)
    shutil.rmtree(copy)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[520] ^= 1  # in the first json of a tar
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize(
    ("fault", "suffix", "member"),
    [(flip, ".tar", ".json"), (cut, ".tar", ".json"), (cut, ".idx", ".idx")],
    ids=["bit flip", "truncated", "index"],
)
def test_a_damaged_shard_on_the_server_is_as_a_local_one_and_once_restored_it_is_read(
    server: Server,
    dataset: Path,
    tmp_path: Path,
    fault: Callable[[Path], None],
    suffix: str,
    member: str,
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    server.folder = tmp_path
    broken = min((copy / "train").glob(f"train-64x32x5-*{suffix}"))
    fault(broken)
    with make(copy) as local, make(f"{server.url}/copy", tmp_path / "cache") as remote:
        assert take(remote, 14) == take(local, 14)
        assert {damage[:3] for damage in remote.damages} == {damage[:3] for damage in local.damages}
        assert remote.damages[0].member.endswith(member)
    shutil.copy(dataset / "train" / broken.name, broken)
    with make(dataset) as local, make(f"{server.url}/copy", tmp_path / "cache") as remote:
        assert take(remote, 14) == take(local, 14) and remote.damages == []


@pytest.mark.parametrize("suffix", [".tar", ".idx", ".xxh3"])
def test_a_shard_that_the_server_lacks_counts_with_all_its_samples(
    server: Server, dataset: Path, tmp_path: Path, suffix: str
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    server.folder = tmp_path
    gone = sorted((copy / "train").glob(f"train-64x32x5-*{suffix}"))
    gone[0].unlink()
    with make(f"{server.url}/copy") as remote:
        take(remote, 14)
        assert remote.num_damaged == 8 and len(remote.damages) == 1
        assert "all 8 samples" in str(remote.damages[0])
    for path in gone[1:3]:
        path.unlink()
    with (
        make(f"{server.url}/copy") as remote,
        pytest.raises(TooManyDamagedError, match="makes 24 samples, and max_damaged allows 16"),
    ):
        take(remote, 14)


def test_a_shard_that_the_server_lacked_is_read_once_it_is_there(
    server: Server, dataset: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    server.folder = tmp_path
    gone = min((copy / "train").glob("train-64x32x5-*.tar"))
    gone.unlink()
    with make(f"{server.url}/copy", tmp_path / "cache") as remote:
        take(remote, 14)
    shutil.copy(dataset / "train" / gone.name, gone)
    with make(dataset) as local, make(f"{server.url}/copy", tmp_path / "cache") as remote:
        assert take(remote, 14) == take(local, 14) and remote.damages == []
