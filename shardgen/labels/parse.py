"""Label JSON -> Label. Tolerant exactly where the labels are known to vary, strict and by name
everywhere else.

The reading is one pass of msgspec over Structs that mirror the JSON: fields we don't name are
skipped without being built, and a wrong type ends the pass. A label is input from strangers, so
everything has a bound: the size of the file, the depth (the decoder's own), what an id may
contain. Timecodes stay text in a Label, because a wrong one is a fact to report about the shot,
not a reason to refuse the file; `timecode_frame` reads them.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

from shardgen.labels.nesting import MAX_DEPTH, is_too_deep
from shardgen.labels.schema import (
    Bare,
    Basic,
    Caption,
    Details,
    Generated,
    InnerRaw,
    LabelFile,
    Levels,
    MediaInfo,
    RawData,
    Scene,
)
from shardgen.labels.timecode import iso_date, length_s

MAX_ID_CHARS, MAX_FIELD_CHARS = 64, 200
_NAMES = (
    ("raw_data_info", "source_media_info", "media_type"),
    ("source_data_info", "ai_generated_info", "mid_category"),
    ("source_data_info", "source_mbc"),
)
_ID = re.compile(r"\w[\w-]*")
_RESOLUTION = re.compile(
    r"\s*(\d{1,5})\s*(?:px)?\s*[,xX×*]\s*(\d{1,5})\s*(?:px|[pi])?\s*", re.ASCII
)
# A string, or what Python's json writes for numbers that JSON does not have.
_NO_NUMBER = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\b(?:NaN|Infinity)\b', re.DOTALL)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LabelError(ValueError):
    """A label that can't be read: a stable reason code, where in the file (None: nowhere in
    particular), and what.
    """

    def __init__(self, reason: str, detail: str, byte_offset: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.byte_offset = reason, detail, byte_offset


class Timed(msgspec.Struct, frozen=True, array_like=True):
    """A sentence and the inclusive range of timecodes it speaks of; "" where it has none."""

    text: str
    tc_in: str = ""
    tc_out: str = ""


class Label(msgspec.Struct, frozen=True, array_like=True):
    """What a label file says, as it says it. Unknown text is "", unknown numbers are None."""

    clip_id: str
    media_type: str
    category: str
    station: str
    broadcast_date: str  # YYYY-MM-DD
    url: str
    thumbnail_urls: list[str]
    keyword: str
    stt_script: str
    scenes: list[Timed]
    objects: list[Timed]
    semantic: list[str]
    application: list[str]
    width_px: int | None
    height_px: int | None
    duration_s: float | None
    fps: float | None
    # the text in the picture, which no rule uses; None in a catalog that was written without it
    ocr: list[str] | None = None


_decoder = msgspec.json.Decoder(LabelFile)
_NO_RAW, _NO_MEDIA, _NO_DETAILS, _NO_GENERATED, _NO_LEVELS = (
    RawData(),
    MediaInfo(),
    Details(),
    Generated(),
    Levels(),
)


def parse_label(data: bytes) -> Label:
    """Read one label file's bytes. Raises LabelError with one of the reasons label_empty,
    label_not_utf8, label_not_json, label_not_object, label_too_deep, label_wrong_type,
    label_unsafe_id and label_long_field.
    """
    if data.startswith(_BYTE_ORDER_MARK):
        # as many spaces, so that byte offsets stay those of the file
        data = data.replace(_BYTE_ORDER_MARK, b"   ", 1)
    if is_too_deep(data):
        raise LabelError("label_too_deep", f"objects or arrays are nested over {MAX_DEPTH} deep")
    try:
        file = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _explain(data, error) from error
    source = file.source_data_info
    clip_id = source.clip_id
    if len(clip_id) > MAX_ID_CHARS or _ID.fullmatch(clip_id) is None:
        raise LabelError(
            "label_unsafe_id",
            f"clip_id {clip_id[:MAX_ID_CHARS]!r}: an id is 1 to {MAX_ID_CHARS} "
            f"letters, digits, _ and -, because file names are made of it",
            _offset_of(data, ["source_data_info", "clip_id"]),
        )
    generated = source.ai_generated_info or _NO_GENERATED
    levels = (file.labeling_data_info and file.labeling_data_info.caption_info) or _NO_LEVELS
    raw = file.raw_data_info if isinstance(file.raw_data_info, RawData) else _NO_RAW
    media = raw.source_media_info
    media = media if isinstance(media, MediaInfo) else _NO_MEDIA
    details = media.details if isinstance(media.details, Details) else _NO_DETAILS
    width_px, height_px = _declared_size(raw, media, details)
    names = media.media_type or "", generated.mid_category or "", source.source_mbc or ""
    if len(joined := "".join(names)) > MAX_FIELD_CHARS or not joined.isprintable():
        names = _name(data, names[0], 0), _name(data, names[1], 1), _name(data, names[2], 2)
    return Label(
        clip_id,
        *names,
        iso_date(_short(source.broadcast_date)),
        source.clip_proxy_url or "",
        _texts(source.clip_proxy_thumbnail_url),
        ", ".join(_texts(generated.keyword)),
        generated.stt_script or "",
        _timed(generated.scene_description_auto),
        _timed(levels.object_level),
        [each.text for each in _timed(levels.semantic_level)],
        [each.text for each in _timed(levels.application_level)],
        width_px,
        height_px,
        _length(details.length),
        _number(details.frame_rate),
        _ocr(generated.auto_tags),
    )


def _decode(data: bytes) -> LabelFile:
    """The label's JSON; NaN and Infinity, which JSON does not have, count as null."""
    try:
        return _decoder.decode(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if b"NaN" not in data and b"Infinity" not in data:
            raise
        return _decoder.decode(
            _NO_NUMBER.sub(lambda found: found[0] if found[0][:1] == b'"' else b"null", data)
        )


def _timed(entries: Sequence[Scene | Caption | Bare] | None) -> list[Timed]:
    """The sentences of a list, in order. A bare string is one without timecodes; a number or a
    null says nothing.
    """
    try:
        return [
            Timed(entry.text, entry.tc_in or "", entry.tc_out or "")  # type: ignore[union-attr]
            for entry in entries or ()
            if entry.text  # type: ignore[union-attr]
        ]
    except AttributeError:
        # bare ones are rare, and are made objects only where there are some
        return _timed([_as_caption(entry) for entry in entries or ()])


def _ocr(tags: Any) -> list[str]:
    """The text that was read in the picture: `auto_tags.ocr`."""
    return _texts(tags.get("ocr") if isinstance(tags, dict) else None)


def _texts(found: Any) -> list[str]:
    """A list of texts, or one. Other things in its place are skipped: no label is lost for what
    no rule uses.
    """
    return [
        text
        for text in (found if isinstance(found, list) else [found])
        if isinstance(text, str) and text
    ]


def _as_caption(entry: Scene | Caption | Bare) -> Scene | Caption:
    if isinstance(entry, Scene | Caption):
        return entry
    return Caption(text=entry if isinstance(entry, str) else None)


def _declared_size(
    raw: RawData, media: MediaInfo, details: Details
) -> tuple[int | None, int | None]:
    """The first readable one of the four places where the labels keep a resolution."""
    inner = raw.raw_data_info.basic_info if isinstance(raw.raw_data_info, InnerRaw) else None
    for place in (media, details, raw.basic_info, inner):
        if not isinstance(place, MediaInfo | Details | Basic):
            continue
        text = place.resolution
        if isinstance(text, list) and len(text) == 2:
            text = f"{text[0]}, {text[1]}"
        if text and (size := _size(_short(text))):
            return size
    return None, None


def _name(data: bytes, text: str, which: int) -> str:
    """A name as the tables of a report can hold it: on one line, without what a terminal would
    obey.
    """
    if len(text) > MAX_FIELD_CHARS:
        raise LabelError(
            "label_long_field",
            f"{_NAMES[which][-1]} {text[:40]!r}... has {len(text)} characters; it may "
            f"have {MAX_FIELD_CHARS}",
            _offset_of(data, list(_NAMES[which])),
        )
    return "".join(filter(str.isprintable, " ".join(text.split())))


def _short(text: Any) -> str:
    """A text that may be a date, a length or a size; what is none, or too long to be one, is kept
    out of the caches.
    """
    return text if isinstance(text, str) and len(text) <= MAX_FIELD_CHARS else ""


def _length(value: Any) -> float | None:
    """A length in seconds: "HH:MM:SS.cc", or a plain number of them."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if 0 < value < 1e6 else None
    return length_s(_short(value))


@lru_cache(maxsize=4096)
def _size(text: str) -> tuple[int, int] | None:
    """ "1920, 1080" -> (1920, 1080); None for anything else."""
    match = _RESOLUTION.fullmatch(text)
    return (int(match[1]), int(match[2])) if match and int(match[1]) and int(match[2]) else None


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float | str) else 0.0
    except (ValueError, OverflowError):
        return None
    return number if 0 < number < 1000 else None


def _explain(data: bytes, error: Exception) -> LabelError:
    """The decoder's complaint as a LabelError. Runs for bad labels only, so it may take its
    time.
    """
    text = str(error)
    if not data.strip():
        return LabelError("label_empty", "the file holds no JSON", 0)
    try:
        data.decode()
    except UnicodeDecodeError as bad:
        if bad.reason == "unexpected end of data":
            return LabelError("label_not_json", "the file is cut off inside a character", len(data))
        return LabelError("label_not_utf8", f"byte 0x{data[bad.start]:02x} is not UTF-8", bad.start)
    if not isinstance(error, msgspec.ValidationError):
        place = re.search(r"\(byte (\d+)\)", text)
        return LabelError("label_not_json", text, int(place[1]) if place else len(data))
    path = text.rpartition(" - at `")[2].rstrip("`") if " - at `" in text else "$"
    if path == "$" and data.lstrip()[:1] != b"{":
        return LabelError("label_not_object", text, len(data) - len(data.lstrip()))
    keys = [
        int(key) if key.isdigit() else key
        for key in re.findall(r"[^.\[\]]+", path.removeprefix("$"))
    ]
    return LabelError("label_wrong_type", text, _offset_of(data, keys))


def _offset_of(data: bytes, keys: list[str | int]) -> int | None:
    """Where in `data` the value at this path begins: a msgspec.Raw is a view of the buffer it was
    decoded from.
    """
    # takes longer to load than a thousand labels to read, and is needed for bad ones only
    import numpy as np

    view: Any = data
    try:
        for key in keys:
            kind: Any = dict[str, msgspec.Raw] if isinstance(key, str) else list[msgspec.Raw]
            view = msgspec.json.decode(view, type=kind)[key]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, IndexError):
        return None
    return np.frombuffer(view, np.uint8).ctypes.data - np.frombuffer(data, np.uint8).ctypes.data
