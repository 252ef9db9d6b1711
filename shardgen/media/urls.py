"""Which URLs may be asked, how they are sent, and how they are written in messages."""

import string
from collections.abc import Iterable
from urllib.parse import quote, urlsplit

from shardgen.media.errors import FetchError


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
    wrong = ""
    if parts.scheme not in schemes:
        allowed = " and ".join(schemes) or "only local files"
        wrong = f"fetch.schemes allows {allowed}, not {parts.scheme or 'a URL without a scheme'}"
    elif not host:
        wrong = "names no host"
    elif not url.isprintable() or " " in url:
        wrong = "holds a space or a control character; write it as %20, or as its %-code"
    if wrong:
        raise FetchError("url_refused", f"{without_query(url)!r}: {wrong}", may_pass=False)
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
