"""What every request has to pass before a page sees it, and what every answer carries.

In order: the length of the query, the Host header (a name that a stranger's DNS points at this
machine must not open it: rebinding), the session where a token is asked for, and for every POST the
size of the body, its origin and the CSRF header. Plain ASGI, so that ranged answers stream through.

The secret lies in the dashboard's own folder, so that pages that are open survive a restart.
"""

import hmac
import os
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CSRF_HEADER, SESSION_COOKIE = "x-csrf-token", "newsreel_session"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_QUERY_BYTES, MAX_BODY_BYTES = 4096, 64 * 1024
MIN_TOKEN_CHARS = 32
MAX_ATTEMPTS, ATTEMPT_WINDOW_S, MAX_PEERS = 5, 60.0, 1000
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class TokenError(ValueError):
    """A token file that can't be used; the message names it and what to do."""


def read_token(path: Path) -> str:
    """The token that visitors have to give. Raises TokenError unless only its owner can read it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"{path}: can't read the token: {error}") from error
    if mode & 0o077:
        raise TokenError(f"{path}: its mode is {mode:04o}, others can read it: chmod 600 {path}")
    if len(token) < MIN_TOKEN_CHARS:
        raise TokenError(
            f"{path}: the token has {len(token)} characters, it needs {MIN_TOKEN_CHARS}: "
            f"openssl rand -hex 32 > {path}"
        )
    return token


def read_secret(own: Path) -> bytes:
    """The key that cookies and CSRF tokens are made with; created when there is none."""
    path = own / "secret"
    own.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    return path.read_bytes()


class Attempts:
    """Counts wrong tokens per address; after MAX_ATTEMPTS within a minute that address waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def allowed(self, peer: str) -> bool:
        since = self._clock() - ATTEMPT_WINDOW_S
        recent = [moment for moment in self._failures.get(peer, []) if moment > since]
        return len(recent) < MAX_ATTEMPTS

    def failed(self, peer: str) -> None:
        times = self._failures.setdefault(peer, [])
        self._failures[peer] = [*times[-MAX_ATTEMPTS:], self._clock()]
        self._failures.move_to_end(peer)
        while len(self._failures) > MAX_PEERS:
            self._failures.popitem(last=False)


class Guard:
    """Middleware with the rules above. `token` is "" on loopback without a token file."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], token: str, secret: bytes) -> None:
        self.app, self.hosts, self.token = app, hosts, token
        self.csrf = _derived(secret, "csrf")
        self.session = session_cookie(secret, token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-cache")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that may not pass."""
        headers = Headers(scope=scope)
        if len(scope["query_string"]) > MAX_QUERY_BYTES:
            return PlainTextResponse(f"query longer than {MAX_QUERY_BYTES} bytes", 414)
        if host_name(headers.get("host", "")) not in self.hosts:
            return PlainTextResponse("this Host is not served; see --allow-host", 421)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("method not allowed", 405)
        path = scope["path"]
        if self.token and path != "/login" and not path.startswith("/static/"):
            cookie = cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE, "")
            if not hmac.compare_digest(cookie.encode(), self.session.encode()):
                if scope["method"] == "GET" and "hx-request" not in headers:
                    return RedirectResponse("/login", 303)
                return PlainTextResponse("log in first", 401)
        if scope["method"] == "POST":
            return self._refused_post(scope, headers)
        return None

    def _refused_post(self, scope: Scope, headers: Headers) -> Response | None:
        length = headers.get("content-length", "")
        # without a length there is nothing to check before the body is read
        if not length.isascii() or not length.isdigit():
            return PlainTextResponse("a POST states its length", 411)
        if int(length) > MAX_BODY_BYTES:
            return PlainTextResponse(f"body longer than {MAX_BODY_BYTES} bytes", 413)
        origin = headers.get("origin", "")
        if origin and origin.partition("://")[2] != headers.get("host"):
            return PlainTextResponse("a POST from another origin", 403)
        if not hmac.compare_digest(headers.get(CSRF_HEADER, "").encode(), self.csrf.encode()):
            return PlainTextResponse("the CSRF header is missing or old: reload the page", 403)
        return None


def session_cookie(secret: bytes, token: str) -> str:
    """What the cookie holds: proof of the token, not the token; another token ends the session."""
    return _derived(secret, f"session {token}")


def csrf_token(secret: bytes) -> str:
    return _derived(secret, "csrf")


def _derived(secret: bytes, purpose: str) -> str:
    return hmac.new(secret, purpose.encode(), "sha256").hexdigest()


def host_name(host: str) -> str:
    """ "[::1]:7020" -> "::1", "localhost:7020" -> "localhost"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
