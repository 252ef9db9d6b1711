"""Korean and English: which one a visitor reads, and every sentence of the pages in both.

The sentences stand in wording/*.toml, two of them under each key, English first. What shardgen has
words for (statuses, reasons, flags, checks) is taken from there.
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from starlette.requests import Request

from shardgen.report.labels_ko_en import CHECKS
from shardgen.report.labels_ko_en import wording as code_wording

Language = Literal["en", "ko"]
LANGUAGE_COOKIE = "newsreel_lang"
NOT_MEASURED = ("not measured", "측정되지 않음")
_FOLDER = Path(__file__).parent / "wording"


def load_wording() -> dict[str, tuple[str, str]]:
    """ "page.key" -> (English, Korean). Raises ValueError for an entry that is not a pair."""
    sentences: dict[str, tuple[str, str]] = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        for section, entries in tomllib.loads(path.read_text(encoding="utf-8")).items():
            for key, pair in entries.items():
                if not isinstance(pair, list) or len(pair) != 2:
                    raise ValueError(f"{path.name}: {section}.{key} is not [English, Korean]")
                sentences[f"{section}.{key}"] = (str(pair[0]), str(pair[1]))
    return sentences


def choose_language(request: Request) -> Language:
    """?lang, then the cookie, then Accept-Language; English where none of them says Korean."""
    for wanted in (request.query_params.get("lang"), request.cookies.get(LANGUAGE_COOKIE)):
        if wanted == "ko":
            return "ko"
        if wanted == "en":
            return "en"
    for part in request.headers.get("accept-language", "").split(","):
        tag = part.partition(";")[0].strip().lower()
        if tag.startswith("ko"):
            return "ko"
        if tag.startswith("en"):
            return "en"
    return "en"


def translator(sentences: dict[str, tuple[str, str]], language: Language) -> Callable[..., str]:
    """A function of (key, **values) -> the sentence; a key that is not there raises KeyError."""
    place = 0 if language == "en" else 1

    def translate(key: str, **values: Any) -> str:
        sentence = sentences[key][place]
        return sentence.format(**values) if values else sentence

    return translate


def code_words(code: str, language: Language) -> str:
    """A status, reason or flag in words; an unknown one stands for itself."""
    return code_wording(code)[0 if language == "en" else 1]


def check_words(name: str, definition: str, language: Language) -> tuple[str, str]:
    """(name, definition) of a check of the quality report."""
    if language == "ko" and name in CHECKS:
        return CHECKS[name]
    return name.replace("_", " "), definition
