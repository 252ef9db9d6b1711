"""What a stranger sends is refused: hosts, tokens, forged forms, long queries, paths of others."""

import asyncio
import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardgen.catalog.catalog import Catalog
from tools.dashboard.__main__ import main
from tools.dashboard.app import create_app
from tools.dashboard.guard import (
    ATTEMPT_WINDOW_S,
    MAX_ATTEMPTS,
    Attempts,
    TokenError,
    host_name,
    read_token,
)
from tools.dashboard.sources import find_sources
from tools.fake.catalog import write_catalog

TOKEN = "0123456789abcdef0123456789abcdef"
EVIL = "<script>alert(1)</script>\x00\u202e=cmd|' /C calc'!A0"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_catalog(folder, captions=[EVIL, "어시장에서 생선을 판다."])
    return folder


@pytest.fixture
def client(dataset: Path, tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(find_sources([str(dataset)], None, tmp_path / "own"), with_index=False)
    app.state.dashboard.indexers["data"].update()
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def csrf_of(client: TestClient, page: str = "/") -> str:
    found = re.search(r'"X-CSRF-Token": "([0-9a-f]{64})"', client.get(page).text)
    assert found is not None
    return found[1]


def status_of(app: ASGIApp, query: bytes) -> int:
    """The answer to a request that no client library would send."""
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "raw_path": b"/",
        "query_string": query,
        "headers": [(b"host", b"127.0.0.1")],
    }
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    asyncio.run(_call(app, scope, receive, send))
    return statuses[0]


async def _call(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_host_that_is_not_ours_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:7020", "127.0.0.1", "[::1]:7020"])
def test_loopback_by_any_name_is_served(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


def test_host_names_are_read_without_their_port() -> None:
    assert host_name("[::1]:7020") == "::1"
    assert host_name("LOCALHOST:7020") == "localhost"


def test_the_policy_allows_nothing_from_elsewhere(client: TestClient) -> None:
    for page in ("/", "/nothing", "/static/dashboard.css", "/data/data/media/clip/1"):
        policy = client.get(page).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe" not in policy and "http" not in policy
    assert '"allowEval": false' in client.get("/").text


def test_a_caption_stays_text(client: TestClient) -> None:
    for page in ("/data/data/case/1", "/data/data/defects?text=alert"):
        text = client.get(page).text
        assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in client.get("/data/data/case/1").text


def test_a_query_is_no_sql_and_no_search_syntax(client: TestClient) -> None:
    for text in ("'; DROP TABLE clips; --", '" OR 1=1', "caption : *", "NEAR(a b)", "\x00", "()*^"):
        assert client.get("/data/data/defects", params={"text": text}).status_code == 200
    for value in ("9" * 400, "-1", "1e3", "٣", "1; DROP TABLE rows"):
        assert client.get("/data/data/defects", params={"after": value}).status_code == 200
    assert client.get("/data/data/defects", params={"reason": "' OR ''='"}).status_code == 200
    assert "어시장" in client.get("/data/data/case/2").text


def test_long_queries_and_bodies_are_refused(client: TestClient) -> None:
    assert client.get("/?text=" + "a" * 5000).status_code == 414
    assert status_of(client.app, query=b"text=" + b"a" * 10_000_000) == 414
    headers = {"x-csrf-token": csrf_of(client)}
    body = b"note=" + b"a" * 10_000_000
    assert client.post("/data/data/case/1", content=body, headers=headers).status_code == 413


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client: TestClient, method: str) -> None:
    assert client.request(method, "/").status_code == 405


def test_a_forged_post_is_refused(client: TestClient) -> None:
    form = {"person": "홍길동", "verdict": "exclude", "type": "", "note": ""}
    token = csrf_of(client)
    for headers in (
        {},
        {"x-csrf-token": "0" * 64},
        {"x-csrf-token": token, "origin": "http://evil.example"},
        {"x-csrf-token": token, "origin": "null"},
    ):
        assert client.post("/data/data/case/1", data=form, headers=headers).status_code == 403
    good = {"x-csrf-token": token, "origin": "http://127.0.0.1"}
    assert client.post("/data/data/case/1", data=form, headers=good).status_code == 200


def test_paths_outside_are_not_served(client: TestClient, dataset: Path) -> None:
    with sqlite3.connect(dataset / "catalog.sqlite") as db:
        db.execute("UPDATE clips SET media_xxh3 = ?", ("a" * 32,))
        db.execute("INSERT INTO sources VALUES ('x', '/etc/passwd', 1, 1, ?)", ("a" * 32,))
        link = dataset / "link.mp4"
        link.symlink_to("/etc/passwd")
        db.execute("INSERT INTO sources VALUES ('y', ?, 1, 1, ?)", (str(link), "a" * 32))
    db.close()
    for path in ("clip/1", "still/1", "proxy/1", "sample/../../etc/passwd.mp4"):
        assert client.get(f"/data/data/media/{path}").status_code == 404
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/data/../../etc/passwd"):
        assert client.get(path).status_code == 404
    assert client.get("/data/data/case/1").status_code == 200


def test_a_clip_id_that_is_a_path_leads_nowhere(dataset: Path, client: TestClient) -> None:
    with sqlite3.connect(dataset / "catalog.sqlite") as db:
        db.execute("UPDATE clips SET clip_id = '../../../../../../etc/passwd', media_xxh3 = ''")
    db.close()
    assert client.get("/data/data/media/clip/1").status_code == 404
    assert client.get("/data/data/case/1").status_code == 200


def test_with_a_token_nothing_is_shown_before_the_login(dataset: Path, tmp_path: Path) -> None:
    app = create_app(
        find_sources([str(dataset)], None, tmp_path / "own"), token=TOKEN, with_index=False
    )
    with TestClient(app, base_url="http://127.0.0.1", follow_redirects=False) as client:
        for page in ("/", "/data/data/case/1", "/data/data/media/clip/1", "/loginx"):
            assert client.get(page).status_code == 303
            assert client.get(page, headers={"hx-request": "true"}).status_code == 401
        shown = client.get("/login")
        assert shown.status_code == 200 and "data" not in re.findall(r'href="/(\w+)/', shown.text)
        headers = {"x-csrf-token": csrf_of(client, "/login")}
        assert client.post("/login", data={"token": "wrong"}, headers=headers).status_code == 401
        entered = client.post("/login", data={"token": TOKEN}, headers=headers)
        assert entered.status_code == 204
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
        assert client.get("/").status_code == 200
        for _ in range(MAX_ATTEMPTS):
            client.post("/login", data={"token": "wrong"}, headers=headers)
        assert client.post("/login", data={"token": TOKEN}, headers=headers).status_code == 429


def test_attempts_are_limited_by_address_and_forgotten_after_a_minute() -> None:
    now = 0.0
    attempts = Attempts(clock=lambda: now)
    for _ in range(MAX_ATTEMPTS):
        assert attempts.allowed("1.2.3.4")
        attempts.failed("1.2.3.4")
    assert not attempts.allowed("1.2.3.4")
    assert attempts.allowed("1.2.3.5")
    now = ATTEMPT_WINDOW_S + 1
    assert attempts.allowed("1.2.3.4")


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o644)
    with pytest.raises(TokenError, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    path.write_text("short")
    with pytest.raises(TokenError, match="needs 32"):
        read_token(path)


def test_the_secret_is_ours_alone_and_survives_a_restart(dataset: Path, tmp_path: Path) -> None:
    sources = find_sources([str(dataset)], None, tmp_path / "own")
    first = create_app(sources, with_index=False).state.dashboard
    second = create_app(sources, with_index=False).state.dashboard
    assert first.csrf == second.csrf
    assert os.stat(tmp_path / "own" / "secret").st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0", "--dataset", "{data}"], "--token-file"),
        ([], "nothing to show"),
        (["--dataset", "{data}", "--dataset", "data={data}"], "two datasets"),
        (["--dataset", "{data}/missing"], "no such dataset"),
        (["--dataset", "a/b={data}"], "letters, digits"),
        (["--dataset", "{data}", "--port", "99999"], "--port 99999: a port is a number"),
    ],
)
def test_the_command_refuses_by_name(
    arguments: list[str],
    message: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [each.format(data=dataset) for each in arguments]
    assert main([*given, "--own", str(tmp_path / "own")]) == 2
    assert message in capsys.readouterr().err


def test_damaged_decisions_are_told_and_stay_as_they_are(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    review = tmp_path / "own" / "review.sqlite"
    review.parent.mkdir()
    review.write_bytes(b"no database, but all that is left" * 9)
    assert main(["--dataset", str(dataset), "--own", str(review.parent)]) == 2
    assert "it holds the decisions and votes: bring back a copy" in capsys.readouterr().err
    assert review.read_bytes() == b"no database, but all that is left" * 9


def test_a_second_dashboard_in_one_folder_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    with open(own / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["--dataset", str(dataset), "--own", str(own)]) == 2
    assert "another dashboard" in capsys.readouterr().err


def test_the_fixture_is_a_catalog_as_shardgen_writes_it(dataset: Path) -> None:
    with Catalog(dataset / "catalog.sqlite") as catalog:
        assert catalog.count() == 2
