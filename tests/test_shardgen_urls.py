"""Nothing is asked that may not be, and what is sent is what browsers send."""

from pathlib import Path

import pytest

from shardgen.media.download import RetryPolicy, download
from shardgen.media.errors import FetchError
from shardgen.media.urls import ascii_url, check_url


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/x",
        "data:,x",
        "",
        "http://",
        "//host/x",
        "http:///x",
        "javascript:alert(1)",
        "/etc/passwd",
        "http://[bad",
        "http://host/a b",
        "http://host/a\r\nX: y",
        "FILE:///etc/passwd",
        "https://host:99999/a",
        "https://host:x/a",
        "http://a..b/x",
        f"http://{'a' * 64}.org/x",
        "https://user:secret@host/a",
        "ftp://host/a?sig=secret",
    ],
)
def test_only_http_urls_with_a_host_are_asked(url: str, tmp_path: Path) -> None:
    for attempt in (
        lambda: check_url(url, ("http", "https")),
        lambda: download(url, tmp_path, ("http", "https"), RetryPolicy()),
    ):
        with pytest.raises(FetchError) as caught:
            attempt()
        assert caught.value.reason == "url_refused" and not caught.value.may_pass
        assert "secret" not in str(caught.value)
    assert check_url("https://cdn.example.org/a.mp4?sig=%2F..%2F", ("https",)) == "cdn.example.org"
    assert not list(tmp_path.iterdir())


def test_what_is_not_ascii_is_sent_as_browsers_send_it_and_the_rest_as_it_is() -> None:
    assert ascii_url("http://방송.kr:81/뉴스/1.mp4?sig=a%2Fb&이름=가") == (
        "http://xn--vh3b23h.kr:81/%EB%89%B4%EC%8A%A4/1.mp4?sig=a%2Fb&%EC%9D%B4%EB%A6%84=%EA%B0%80"
    )
    assert ascii_url("http://host/a?") == "http://host/a?"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://host/a b.mp4", "holds a space or a control character; write it as %20"),
        ("https://host/a\nb.mp4", "holds a space or a control character"),
        ("ftp://host/a", "fetch.schemes allows https, not ftp"),
        ("/a/b.mp4", "fetch.schemes allows https, not a URL without a scheme"),
        ("https:///a", "names no host"),
    ],
)
def test_a_url_that_is_refused_says_what_is_wrong_with_it(url: str, words: str) -> None:
    with pytest.raises(FetchError) as caught:
        check_url(url, ("https",))
    assert words in caught.value.detail
