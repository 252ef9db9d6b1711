"""Where the media are: beside the label, or behind a URL and then in a content-addressed cache.
Bytes to xxh3_128.

A local file is hashed in place, never copied, moved or touched. A download goes into CACHE/part
under the hash of its URL and is renamed to CACHE/xx/<xxh3_128> once it is whole, so that a name
in the cache is a promise about the bytes. What may pass (timeouts, resets, 5xx, 429, short
bodies) is tried again with growing, jittered pauses, from where it broke off if the server gave a
validator (ETag, Last-Modified) to hold it to; what can't (403, 404, a refused scheme) is not. A
queue hands out work so that one slow host never takes the workers of the others.

Left out: HTTP/2 and connection reuse (a clip is megabytes, a handshake is not), and guessing that
two URLs which differ in their signature are one file: after the download the hash says so.
"""

import http.client
import os
import random
import string
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import xxhash

VIDEO_SUFFIXES = (".mp4", ".mov", ".mxf", ".mkv", ".webm", ".avi", ".ts", ".mpg")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
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
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class FetchError(ValueError):
    """Media that can't be had: a stable reason code, and whether asking again, now or another
    day, may help.
    """

    def __init__(self, reason: str, detail: str, may_pass: bool, wait_s: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.may_pass, self.wait_s = reason, detail, may_pass, wait_s


class Fetched(NamedTuple):
    """A file with these bytes."""

    path: Path
    size_bytes: int
    mtime_ns: int
    media_xxh3: str


class Patience(NamedTuple):
    """How long and how often to try. `timeout_s` is for one silence, `backoff_s` the first pause,
    doubled each time.
    """

    timeout_s: float = 30.0
    retries: int = 4
    backoff_s: float = 0.5
    max_bytes: int = 8 << 30


def find_local(label_path: Path, clip_id: str, media_type: str) -> Path | None:
    """The media file beside its label, named by the label file or by the clip id; None if there
    is none.
    """
    suffixes = IMAGE_SUFFIXES if media_type == "image" else VIDEO_SUFFIXES
    for stem in dict.fromkeys((label_path.stem, clip_id)):
        for suffix in suffixes:
            path = label_path.with_name(stem + suffix)
            if path.is_file():
                return path
    return None


def hash_local(path: Path) -> Fetched:
    """Hash a file where it lies. Raises FetchError (media_unreadable, media_changing)."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        after = path.stat()
    except OSError as error:
        raise FetchError("media_unreadable", f"{path}: {error.strerror}", may_pass=True) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise FetchError("media_changing", f"{path}: changed while it was read", may_pass=True)
    return Fetched(path, after.st_size, after.st_mtime_ns, digest.hexdigest())


def check_url(url: str, schemes: Iterable[str]) -> str:
    """The host of a URL that may be asked. Raises FetchError (url_refused) for another scheme,
    file:// above all, for a host or port that is none, and for a name and password, which would
    end up in messages.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:
        raise FetchError(
            "url_refused", f"{without_query(url)!r}: {error}", may_pass=False
        ) from error
    if "@" in parts.netloc:
        raise FetchError(
            "url_refused", f"{host}: a URL with a name and password is not fetched", may_pass=False
        )
    if parts.scheme not in schemes or not host or not url.isprintable() or " " in url:
        raise FetchError(
            "url_refused",
            f"{without_query(url)!r}: only {', '.join(schemes) or 'local files'} with a "
            f"host are fetched (fetch.schemes)",
            may_pass=False,
        )
    return host


def ascii_url(url: str) -> str:
    """A URL as it is sent: what isn't ASCII in percent-encoded UTF-8, in the host's name in
    Punycode. One that is ASCII stays as it is, because a signature may cover every character.
    """
    if url.isascii():
        return url
    parts = urlsplit(url)
    return quote(
        parts._replace(netloc=parts.netloc.encode("idna").decode()).geturl(),
        safe=string.punctuation,
    )


def without_query(url: str) -> str:
    """A URL fit for messages: a signature in the query is a secret."""
    return url.partition("?")[0][:300]


def download(
    url: str,
    cache: Path,
    schemes: tuple[str, ...],
    patience: Patience,
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
            _download_once(url, part, schemes, patience)
            break
        except FetchError as error:
            progressed = part.exists() and part.stat().st_size > size_before + _BLOCK_BYTES
            attempt = 1 if progressed else attempt + 1
            if not error.may_pass or attempt > patience.retries:
                if not error.may_pass or not _validator_file(part).exists():
                    part.unlink(missing_ok=True)
                    _validator_file(part).unlink(missing_ok=True)
                raise
            pause_s = min(patience.backoff_s * 2 ** (attempt - 1), 300.0) * random.uniform(0.5, 1.5)
            sleep(max(pause_s, min(error.wait_s, 60.0)))
    done = hash_local(part)
    path = cache / done.media_xxh3[:2] / done.media_xxh3
    path.parent.mkdir(exist_ok=True)
    arriving(done.media_xxh3)
    with part.open("rb") as file:
        # a name in the cache is a promise about the bytes, after a power failure too
        os.fsync(file.fileno())
    part.replace(path)
    _validator_file(part).unlink(missing_ok=True)
    return done._replace(path=path)


def _validator_file(part: Path) -> Path:
    return part.with_suffix(".validator")


def _download_once(url: str, part: Path, schemes: tuple[str, ...], patience: Patience) -> None:
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
        response = _opener(schemes).open(request, timeout=patience.timeout_s)
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
        _receive(response, part, held if response.status == 206 else 0, url, patience)


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


def _receive(response: Any, part: Path, held: int, url: str, patience: Patience) -> None:
    """Body to file. The part stays for the next attempt only if there is a validator to hold the
    server to.
    """
    length = _count(response.headers.get("Content-Length"))
    expected = None if length is None else held + length
    if expected is not None and expected > patience.max_bytes:
        raise FetchError(
            "http_too_large", f"{without_query(url)}: {expected} bytes", may_pass=False
        )
    etag = response.headers.get("ETag") or ""
    validator = (
        etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified") or ""
    )
    if validator:
        _validator_file(part).write_text(validator)
    else:
        _validator_file(part).unlink(missing_ok=True)
    size, window_size, window_start = held, held, time.monotonic()
    with part.open("ab" if held else "wb") as file:
        for block in _blocks(response, url):
            file.write(block)
            size += len(block)
            if size > patience.max_bytes:
                raise FetchError(
                    "http_too_large", f"{without_query(url)}: above {size} bytes", may_pass=False
                )
            now = time.monotonic()
            if now - window_start > patience.timeout_s:
                if size - window_size < MIN_BYTES_PER_S * patience.timeout_s:
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


def in_parallel(
    items: Iterable[ItemT],
    work: Callable[[ItemT], ResultT],
    host_of: Callable[[ItemT], str],
    *,
    workers: int,
    per_host: int,
    max_waiting: int = 4096,
) -> Iterator[tuple[ItemT, ResultT | FetchError]]:
    """Run `work` over `items` in threads, at most `workers` at once and `per_host` for one host
    ("": no limit).

    Yields (item, result or FetchError) as they end. Reads at most `max_waiting` items ahead.
    """
    queues: dict[str, deque[ItemT]] = {}
    running: dict[Future[ResultT], tuple[str, ItemT]] = {}
    busy: dict[str, int] = {}
    source, exhausted = iter(items), False
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while not exhausted and sum(map(len, queues.values())) < max(max_waiting, workers):
                item = next(source, None)
                if item is None:
                    exhausted = True
                else:
                    queues.setdefault(host_of(item), deque()).append(item)
            for host in list(queues):
                while (
                    queues[host]
                    and len(running) < workers
                    and (not host or busy.get(host, 0) < per_host)
                ):
                    item = queues[host].popleft()
                    running[pool.submit(work, item)] = host, item
                    busy[host] = busy.get(host, 0) + 1
                if not queues[host]:
                    del queues[host]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                host, item = running.pop(future)
                busy[host] -= 1
                error = future.exception()
                if error is not None and not isinstance(error, FetchError):
                    raise error
                yield item, error if isinstance(error, FetchError) else future.result()
