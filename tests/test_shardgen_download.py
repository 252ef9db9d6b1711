"""What can be had is had, whatever the server does; the rest is named; and nothing is fetched
that may not be.
"""

import errno
import os
import threading
from collections.abc import Iterator
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import OpenerDirector

import pytest
import xxhash

from shardgen.media.cache import CacheBudget
from shardgen.media.download import PERMANENT, RetryPolicy, download
from shardgen.media.errors import FetchError

BODY = bytes(range(256)) * 8192  # 2 MiB
DIGEST = xxhash.xxh3_128_hexdigest(BODY)
FAST = RetryPolicy(retries=3, backoff_s=0.01)
# for servers that are silent or slow until the test is over: no others may be taken for such
HASTY = FAST._replace(timeout_s=1.0, retries=1)


class Flaky(BaseHTTPRequestHandler):
    """/NAME misbehaves by its name; /NAME/2 misbehaves twice and is then sound."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, FaultServer)
        with server.lock:
            server.requests.append((self.path, self.headers.get("Range")))
            number = sum(path == self.path for path, _ in server.requests)
        _, fault, *times = self.path.partition("?")[0].split("/")
        try:
            if times and number > int(times[0]):
                self.sound()
            else:
                getattr(self, fault.partition(".")[0])()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def head(self, status: int, **headers: str | int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def wait(self, seconds: float) -> bool:
        """Whether the test is over."""
        assert isinstance(self.server, FaultServer)
        return self.server.is_over.wait(seconds)

    def sound(self) -> None:
        start = 0
        if (wanted := self.headers.get("Range")) and self.headers.get("If-Range") == '"v1"':
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.head(
                206,
                Content_Length=len(BODY) - start,
                ETag='"v1"',
                Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}",
            )
        else:
            self.head(200, Content_Length=len(BODY), ETag='"v1"')
        self.wfile.write(BODY[start:])

    def error500(self) -> None:
        self.head(500, Content_Length=0)

    def busy(self) -> None:
        self.head(503, Content_Length=0, Retry_After=1)

    def missing(self) -> None:
        self.head(404, Content_Length=0)

    def forbidden(self) -> None:
        self.head(403, Content_Length=0)

    def reset(self) -> None:
        self.connection.close()

    def stall(self) -> None:
        self.head(200, Content_Length=len(BODY))
        self.wfile.write(BODY[:100])
        self.wait(60)

    def drip(self) -> None:
        self.head(200, Content_Length=len(BODY))
        while not self.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def truncated(self) -> None:
        self.head(200, Content_Length=len(BODY), ETag='"v1"')
        self.wfile.write(BODY[:1_500_000])
        self.close_connection = True

    def piecemeal(self) -> None:
        wanted = self.headers.get("Range")
        if not wanted:
            return self.truncated()
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        piece = f"bytes {start}-{start + 999}/{len(BODY)}"
        self.head(206, Content_Length=1000, ETag='"v1"', Content_Range=piece)
        self.wfile.write(BODY[start : start + 1000])

    def unversioned(self) -> None:
        self.head(200, Content_Length=len(BODY))
        self.wfile.write(BODY[:1_500_000])
        self.close_connection = True

    def lying(self) -> None:
        self.head(206, Content_Length=10, ETag='"v1"', Content_Range="bytes 5-14/15")
        self.wfile.write(BODY[5:15])

    def huge(self) -> None:
        self.head(200, Content_Length=1 << 50)

    def endless(self) -> None:
        self.head(200, Transfer_Encoding="chunked")
        while True:
            self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")

    def moved(self) -> None:
        self.head(302, Content_Length=0, Location="/sound")

    def moved_to_file(self) -> None:
        self.head(302, Content_Length=0, Location="file:///etc/passwd")

    def moved_to_nothing(self) -> None:
        self.head(302, Content_Length=0, Location="http://[bad")

    def countless(self) -> None:
        self.head(200, Content_Length="9" * 5000)
        self.wfile.write(BODY)
        self.close_connection = True

    def loop(self) -> None:
        self.head(302, Content_Length=0, Location="/loop")


class FaultServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Flaky)
        self.requests: list[tuple[str, str | None]] = []
        self.lock, self.is_over = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.is_over.set()
        running.shutdown()
        thread.join()


def policy_of(path: str) -> RetryPolicy:
    return HASTY if path.startswith(("/stall", "/drip")) else FAST


def fetch(server: FaultServer, path: str, cache: Path, policy: RetryPolicy = FAST) -> Path:
    return download(server.url + path, cache, ("http",), policy).path


@pytest.mark.parametrize(
    "path",
    [
        "/sound",
        "/error500/2",
        "/busy/1",
        "/reset/2",
        "/stall/1",
        "/drip/1",
        "/truncated/2",
        "/piecemeal/2",
        "/unversioned/2",
        "/lying/1",
        "/moved",
        "/countless",
        "/sound?sig=a%2Fb&expires=1",
        "/sound?이름=영상",
    ],
)
def test_what_can_be_had_is_had(server: FaultServer, tmp_path: Path, path: str) -> None:
    got = download(server.url + path, tmp_path, ("http",), policy_of(path))
    assert got.path == tmp_path / DIGEST[:2] / DIGEST and got.path.read_bytes() == BODY
    assert (got.media_xxh3, got.size_bytes) == (DIGEST, len(BODY))
    assert not list((tmp_path / "part").iterdir())


@pytest.mark.parametrize(
    ("path", "reason", "num_requests"),
    [
        ("/missing", "http_404", 1),
        ("/forbidden", "http_403", 1),
        ("/error500", "http_500", 4),
        ("/reset", "http_connection", 4),
        ("/stall", "http_timeout", 2),
        ("/drip", "http_slow", 2),
        ("/unversioned", "http_truncated", 4),
        ("/huge", "http_too_large", 1),
        ("/moved_to_file", "http_redirect", 1),
        ("/moved_to_nothing", "http_redirect", 1),
        ("/loop", "http_redirect", 5),
    ],
)
def test_what_cannot_be_had_is_named_and_asked_for_no_oftener_than_helps(
    server: FaultServer, tmp_path: Path, path: str, reason: str, num_requests: int
) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(server, path, tmp_path, policy_of(path))
    assert caught.value.reason == reason
    assert len(server.requests) == num_requests
    assert (reason in PERMANENT) == (num_requests != 1 + policy_of(path).retries)


def test_an_endless_body_ends_at_the_limit(server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"http_too_large: .* above [1-3]\d{6} bytes"):
        fetch(server, "/endless", tmp_path, FAST._replace(max_bytes=1 << 20))


@pytest.mark.parametrize(
    ("path", "kept"), [("/endless", 0), ("/unversioned", 0), ("/truncated", 2)]
)
def test_half_a_file_stays_only_if_the_next_run_may_go_on_with_it(
    server: FaultServer, tmp_path: Path, path: str, kept: int
) -> None:
    with pytest.raises(FetchError):
        fetch(server, path, tmp_path, FAST._replace(max_bytes=2 << 20, retries=0))
    assert len(list((tmp_path / "part").iterdir())) == kept


def test_a_file_that_just_arrived_is_not_evicted_as_the_unused_one_whose_name_it_got(
    server: FaultServer, tmp_path: Path
) -> None:
    budget = CacheBudget(tmp_path, 1)
    download(server.url + "/sound", tmp_path, ("http",), FAST, arriving=budget.hold)
    assert budget.evict({DIGEST}) == [] and budget.full
    budget.release(DIGEST)
    assert [path.name for path in budget.evict({DIGEST})] == [DIGEST]


def test_a_half_fetched_file_is_resumed_not_fetched_again(
    server: FaultServer, tmp_path: Path
) -> None:
    with pytest.raises(FetchError):
        fetch(server, "/truncated/1", tmp_path, FAST._replace(retries=0))
    fetch(server, "/truncated/1", tmp_path, FAST._replace(retries=0))  # the next run
    assert [wanted for _, wanted in server.requests] == [None, "bytes=1500000-"]


def test_a_retry_after_is_waited_for(server: FaultServer, tmp_path: Path) -> None:
    pauses: list[float] = []
    download(server.url + "/busy/2", tmp_path, ("http",), FAST, sleep=pauses.append)
    assert pauses == [1.0, 1.0]


def test_a_full_disk_is_no_fault_of_the_clip(server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / xxhash.xxh3_128_hexdigest(f"{server.url}/sound".encode())).symlink_to(
        "/dev/full"
    )
    with pytest.raises(OSError, match=r"No space left on device: '.*/part/"):
        fetch(server, "/sound", tmp_path)


@pytest.mark.parametrize("read", ["read1", "open"])
def test_a_network_that_is_gone_is_no_fault_of_the_disk(
    server: FaultServer, tmp_path: Path, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    owner = HTTPResponse if read == "read1" else OpenerDirector
    monkeypatch.setattr(owner, read, unreachable)
    with pytest.raises(FetchError, match="No route to host") as caught:
        fetch(server, "/sound", tmp_path)
    assert caught.value.reason == "http_connection" and caught.value.may_pass


def test_a_signature_is_in_no_message(server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(server, "/missing?X-Signature=secret", tmp_path)
    assert "secret" not in str(caught.value)
