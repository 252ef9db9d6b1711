"""Media behind a URL, into a content-addressed cache.

A download goes into CACHE/part under the hash of its URL and is renamed to CACHE/xx/<xxh3_128>
once it is whole, so that a name in the cache is a promise about the bytes. What may pass
(timeouts, resets, 5xx, 429, short bodies) is tried again with growing, jittered pauses. It goes on
from where it broke off if the server gave a validator (ETag, Last-Modified) to hold it to. What
can't pass (403, 404, a refused scheme) is not tried again.

Left out: HTTP/2 and connection reuse (a clip is megabytes, a handshake is not), and guessing that
two URLs which differ in their signature are one file: after the download the hash says so.
"""

import http.client
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from loader.files import naming
from shardgen.media.errors import FetchError
from shardgen.media.local import Fetched, hash_local
from shardgen.media.urls import ascii_url, check_url, without_query

MIN_BYTES_PER_S = 1024  # slower, over a whole timeout, counts as a stall
_BLOCK_BYTES = 1 << 20
PERMANENT = frozenset(
    {
        "url_refused",
        "http_too_large",
        "http_redirect",
        "http_400",
        "http_401",
        "http_403",
        "http_404",
        "http_410",
        "http_451",
    }
)
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524})


class RetryPolicy(NamedTuple):
    """How long and how often to try. `timeout_s` is for one silence, `backoff_s` the first pause,
    doubled each time.
    """

    timeout_s: float = 30.0
    retries: int = 4
    backoff_s: float = 0.5
    max_bytes: int = 8 << 30


def download(
    url: str,
    cache: Path,
    schemes: tuple[str, ...],
    policy: RetryPolicy,
    sleep: Callable[[float], None] = time.sleep,
    arriving: Callable[[str], None] = lambda media_xxh3: None,
) -> Fetched:
    """Fetch a URL into the cache; `arriving` hears of the hash before a file gets it as its name.

    Raises FetchError; OSError if the cache can't be written (a full disk). Half a file stays for
    the next run only if that may go on with it.
    """
    check_url(url, schemes)
    part = cache / "part" / xxhash.xxh3_128_hexdigest(url.encode())
    part.parent.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while True:
        size_before = part.stat().st_size if part.exists() else 0
        try:
            _download_once(url, part, schemes, policy)
            break
        except FetchError as error:
            progressed = part.exists() and part.stat().st_size > size_before + _BLOCK_BYTES
            attempt = 1 if progressed else attempt + 1
            if not error.may_pass or attempt > policy.retries:
                if not error.may_pass or not _validator_file(part).exists():
                    part.unlink(missing_ok=True)
                    _validator_file(part).unlink(missing_ok=True)
                raise
            pause_s = min(policy.backoff_s * 2 ** (attempt - 1), 300.0) * random.uniform(0.5, 1.5)
            sleep(max(pause_s, min(error.wait_s, 60.0)))
    done = hash_local(part)
    path = cache / done.media_xxh3[:2] / done.media_xxh3
    path.parent.mkdir(exist_ok=True)
    arriving(done.media_xxh3)
    with naming(path), part.open("rb") as file:
        # a name in the cache is a promise about the bytes, after a power failure too
        os.fsync(file.fileno())
    part.replace(path)
    _validator_file(part).unlink(missing_ok=True)
    return done._replace(path=path)


def _validator_file(part: Path) -> Path:
    return part.with_suffix(".validator")


def _download_once(url: str, part: Path, schemes: tuple[str, ...], policy: RetryPolicy) -> None:
    """One request: appends to `part` if the server agrees that it is still the same file, else
    starts it anew.
    """
    request = urllib.request.Request(
        ascii_url(url), headers={"User-Agent": "newsreel", "Accept-Encoding": "identity"}
    )
    held = part.stat().st_size if part.exists() and _validator_file(part).exists() else 0
    if held:
        request.add_header("Range", f"bytes={held}-")
        request.add_header("If-Range", _validator_file(part).read_text())
    try:
        response = _opener(schemes).open(request, timeout=policy.timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # what we hold is not a beginning of what is there
                part.unlink(missing_ok=True)
            if 300 <= error.code < 400:
                raise FetchError(
                    "http_redirect",
                    f"{without_query(url)}: redirects in a circle, or to what may not be fetched",
                    may_pass=False,
                ) from error
            wait_s = _count(error.headers.get("Retry-After")) or 0
            raise FetchError(
                f"http_{error.code}",
                f"{without_query(url)}: {error.reason}",
                error.code in _PASSING or error.code == 416,
                float(wait_s),
            ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _broken(url, error) from error
    with response:
        if response.status == 206 and _range_start(response) != held:
            part.unlink(missing_ok=True)
            raise FetchError(
                "http_range",
                f"{without_query(url)}: asked for byte {held}, got Content-Range "
                f"{response.headers.get('Content-Range')}",
                may_pass=True,
            )
        if response.status not in (200, 206):
            raise FetchError(
                f"http_{response.status}",
                f"{without_query(url)}: unexpected status",
                may_pass=False,
            )
        _receive(response, part, held if response.status == 206 else 0, url, policy)


def _broken(url: str, error: Exception) -> FetchError:
    """A connection that failed, whatever the error's kind: a network that is gone is a plain
    OSError.
    """
    reason = getattr(error, "reason", error)
    return FetchError(
        "http_timeout" if isinstance(reason, TimeoutError) else "http_connection",
        f"{without_query(url)}: {reason or type(reason).__name__}",
        may_pass=True,
    )


def _blocks(response: Any, url: str) -> Iterator[bytes]:
    """The body as it comes. Raises FetchError, so that an OSError beside it is one of the cache's
    disk.
    """
    try:
        while block := response.read1(_BLOCK_BYTES):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _broken(url, error) from error


def _count(text: str | None) -> int | None:
    """A number of bytes or seconds in a header; None for what is no such number, thousands of
    digits included.
    """
    return int(text) if text and len(text) < 19 and text.isascii() and text.isdigit() else None


def _receive(response: Any, part: Path, held: int, url: str, policy: RetryPolicy) -> None:
    """Body to file. The part stays for the next attempt only if there is a validator to hold the
    server to.
    """
    length = _count(response.headers.get("Content-Length"))
    expected = None if length is None else held + length
    if response.status == 206:
        # a server may send less than all that was asked for
        expected = _range_total(response) or expected
    if expected is not None and expected > policy.max_bytes:
        raise FetchError(
            "http_too_large", f"{without_query(url)}: {expected} bytes", may_pass=False
        )
    etag = response.headers.get("ETag") or ""
    validator = (
        etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified") or ""
    )
    if validator:
        with naming(part):
            _validator_file(part).write_text(validator)
    else:
        _validator_file(part).unlink(missing_ok=True)
    size, window_size, window_start = held, held, time.monotonic()
    with naming(part), part.open("ab" if held else "wb") as file:
        for block in _blocks(response, url):
            file.write(block)
            size += len(block)
            if size > policy.max_bytes:
                raise FetchError(
                    "http_too_large", f"{without_query(url)}: above {size} bytes", may_pass=False
                )
            now = time.monotonic()
            if now - window_start > policy.timeout_s:
                if size - window_size < MIN_BYTES_PER_S * policy.timeout_s:
                    raise FetchError(
                        "http_slow",
                        f"{without_query(url)}: {size - window_size} bytes in "
                        f"{now - window_start:.0f} s",
                        may_pass=True,
                    )
                window_size, window_start = size, now
    if expected is not None and size != expected:
        raise FetchError(
            "http_truncated", f"{without_query(url)}: {size} of {expected} bytes", may_pass=True
        )


def _range_total(response: Any) -> int | None:
    """Size of the whole file by a "bytes 5-9/10" Content-Range; None if it says none."""
    return _count((response.headers.get("Content-Range") or "").rpartition("/")[2])


def _range_start(response: Any) -> int:
    """The first byte of a "bytes 5-9/10" Content-Range; -1 if it says none."""
    start = _count(
        (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    )
    return -1 if start is None else start


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the allowed schemes only."""

    def __init__(self, schemes: tuple[str, ...]) -> None:
        self.schemes = schemes

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        check_url(newurl, self.schemes)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError as error:  # a refused URL, or what is none
            fp.close()
            raise (
                error
                if isinstance(error, FetchError)
                else FetchError(
                    "http_redirect",
                    f"{without_query(req.full_url)}: redirects to what is no URL: {error}",
                    may_pass=False,
                )
            ) from error

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener(schemes: tuple[str, ...]) -> urllib.request.OpenerDirector:
    """urllib without its handlers for file:, ftp: and data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirect(schemes),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
