"""Times as the labels write them: drop-frame timecodes, lengths, dates."""

import re
from functools import lru_cache

_LENGTH = re.compile(r"(\d{1,2}):([0-5]\d):([0-5]\d)(?:[.,](\d{1,6}))?", re.ASCII)
_TIMECODE = re.compile(r"(\d\d):([0-5]\d):([0-5]\d);([0-2]\d)", re.ASCII)
_DATE = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) (\d{2}) (\d{4})\b.*", re.ASCII | re.DOTALL)
_MONTHS = dict(
    zip("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), range(1, 13), strict=True)
)


class TimecodeError(ValueError):
    """A timecode that no 29.97 fps drop-frame counter ever shows."""


@lru_cache(maxsize=4096)
def iso_date(text: str) -> str:
    """ "Tue May 14 2019 00:00:00 GMT+0900 (Korean Standard Time)" -> "2019-05-14"; what is no such
    date -> "".
    """
    match = _DATE.fullmatch(text)
    if match is None or match[1] not in _MONTHS:
        return ""
    return f"{match[3]}-{_MONTHS[match[1]]:02}-{match[2]}"


@lru_cache(maxsize=4096)
def length_s(text: str) -> float | None:
    """ "HH:MM:SS.cc" -> seconds, with any number of decimals or none; None for anything else."""
    match = _LENGTH.fullmatch(text.strip())
    if match is None:
        return None
    hours, minutes, seconds = map(int, match.groups()[:3])
    decimals = match[4] or ""
    # one division of integers: the nearest float, whatever the number of decimals
    scale = 10 ** len(decimals)
    return ((hours * 3600 + minutes * 60 + seconds) * scale + int(decimals or 0)) / scale


def timecode_frame(text: str) -> int:
    """Frame number of a 29.97 fps drop-frame timecode "HH:MM:SS;FF"; "00:00:00;00" is frame 0.

    Drop-frame skips the numbers ;00 and ;01 at the start of each minute but every tenth, so that
    the counter keeps up with the clock. Raises TimecodeError for a text that is no timecode,
    skipped numbers included.
    """
    # before the cache: it is not to hold what a hostile label holds
    if len(text) != len("HH:MM:SS;FF"):
        raise TimecodeError(f"timecode {text[:20]!r} is not HH:MM:SS;FF")
    return _frame(text)


@lru_cache(maxsize=65536)
def _frame(text: str) -> int:
    match = _TIMECODE.fullmatch(text)
    if match is None:
        raise TimecodeError(f"timecode {text!r} is not HH:MM:SS;FF")
    hours, minutes, seconds, frames = map(int, match.groups())
    if frames < 2 and seconds == 0 and minutes % 10:
        raise TimecodeError(
            f"timecode {text} does not exist: drop-frame skips ;00 and ;01 of this minute"
        )
    minutes += 60 * hours
    return (60 * minutes + seconds) * 30 + frames - 2 * (minutes - minutes // 10)
