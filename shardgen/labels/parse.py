"""Label JSON -> Label. Tolerant exactly where the labels are known to vary, strict and by name
everywhere else.

The reading is one pass of msgspec over Structs that mirror the JSON: fields we don't name are
skipped without being built, and a wrong type ends the pass. A label is input from strangers, so
everything has a bound: the size of the file, the depth (the decoder's own), what an id may
contain. Timecodes stay text in a Label, because a wrong one is a fact to report about the shot,
not a reason to refuse the file; `timecode_frame` reads them.
"""

import re
from functools import lru_cache
from typing import Any

import msgspec

from shardgen.labels.timecode import iso_date, length_s

MAX_ID_CHARS, MAX_FIELD_CHARS = 64, 200
_NAMES = (
    ("raw_data_info", "source_media_info", "media_type"),
    ("source_data_info", "ai_generated_info", "mid_category"),
    ("source_data_info", "source_mbc"),
)
_ID = re.compile(r"\w[\w-]*")
_RESOLUTION = re.compile(r"\s*(\d{1,5})\s*[,xX×]\s*(\d{1,5})\s*")


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


class _Scene(msgspec.Struct):
    description: str | None = None
    tc_in: str | None = None
    tc_out: str | None = None


class _Caption(msgspec.Struct):
    text: str | None = None
    tc_in: str | None = None
    tc_out: str | None = None


class _Generated(msgspec.Struct):
    stt_script: str | None = None
    keyword: str | None = None
    mid_category: str | None = None
    scene_description_auto: list[_Scene] | None = None


class _Source(msgspec.Struct):
    clip_id: str
    source_mbc: str | None = None
    broadcast_date: str | None = None
    clip_proxy_url: str | None = None
    clip_proxy_thumbnail_url: list[str] | None = None
    ai_generated_info: _Generated | None = None


class _Levels(msgspec.Struct):
    object_level: list[_Caption] | None = None
    semantic_level: list[_Caption] | None = None
    application_level: list[_Caption] | None = None


class _Captions(msgspec.Struct):
    caption_info: _Levels | None = None


class _Details(msgspec.Struct):
    length: str | None = None
    frame_rate: float | str | None = None
    resolution: str | None = None


class _MediaInfo(msgspec.Struct):
    media_type: str | None = None
    details: _Details | None = None
    resolution: str | None = None


class _Basic(msgspec.Struct):
    resolution: str | None = None


class _InnerRaw(msgspec.Struct):
    basic_info: _Basic | None = None


class _Raw(msgspec.Struct):
    source_media_info: _MediaInfo | None = None
    basic_info: _Basic | None = None
    raw_data_info: _InnerRaw | None = None


class _File(msgspec.Struct):
    source_data_info: _Source
    labeling_data_info: _Captions | None = None
    raw_data_info: _Raw | None = None


_decoder = msgspec.json.Decoder(_File)
_NO_MEDIA, _NO_DETAILS, _NO_GENERATED, _NO_LEVELS = (
    _MediaInfo(),
    _Details(),
    _Generated(),
    _Levels(),
)


def parse_label(data: bytes) -> Label:
    """Read one label file's bytes. Raises LabelError with one of the reasons label_empty,
    label_not_utf8, label_not_json, label_not_object, label_too_deep, label_wrong_type,
    label_unsafe_id and label_long_field.
    """
    try:
        file = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
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
    raw = file.raw_data_info
    media = (raw and raw.source_media_info) or _NO_MEDIA
    details = media.details or _NO_DETAILS
    width_px, height_px = _declared_size(raw, media, details)
    names = media.media_type or "", generated.mid_category or "", source.source_mbc or ""
    if len(joined := "".join(names)) > MAX_FIELD_CHARS or not joined.isprintable():
        names = _name(data, names[0], 0), _name(data, names[1], 1), _name(data, names[2], 2)
    return Label(
        clip_id,
        *names,
        iso_date(_short(source.broadcast_date)),
        source.clip_proxy_url or "",
        source.clip_proxy_thumbnail_url or [],
        generated.keyword or "",
        generated.stt_script or "",
        [
            Timed(s.description, s.tc_in or "", s.tc_out or "")
            for s in generated.scene_description_auto or ()
            if s.description
        ],
        [Timed(c.text, c.tc_in or "", c.tc_out or "") for c in levels.object_level or () if c.text],
        [c.text for c in levels.semantic_level or () if c.text],
        [c.text for c in levels.application_level or () if c.text],
        width_px,
        height_px,
        length_s(_short(details.length)),
        _number(details.frame_rate),
    )


def _declared_size(
    raw: _Raw | None, media: _MediaInfo, details: _Details
) -> tuple[int | None, int | None]:
    """The first readable one of the four places where the labels keep a resolution."""
    inner = raw and raw.raw_data_info and raw.raw_data_info.basic_info
    outer = raw and raw.basic_info
    for text in (
        media.resolution,
        details.resolution,
        outer and outer.resolution,
        inner and inner.resolution,
    ):
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


def _short(text: str | None) -> str:
    """A text that may be a date, a length or a size; what is too long to be one is kept out of
    the caches.
    """
    return text if text and len(text) <= MAX_FIELD_CHARS else ""


@lru_cache(maxsize=4096)
def _size(text: str) -> tuple[int, int] | None:
    """ "1920, 1080" -> (1920, 1080); None for anything else."""
    match = _RESOLUTION.fullmatch(text)
    return (int(match[1]), int(match[2])) if match and int(match[1]) and int(match[2]) else None


def _number(value: float | str | None) -> float | None:
    try:
        number = float(value) if value is not None else 0.0
    except ValueError:
        return None
    return number if 0 < number < 1000 else None


def _explain(data: bytes, error: Exception) -> LabelError:
    """The decoder's complaint as a LabelError. Runs for bad labels only, so it may take its
    time.
    """
    text = str(error)
    if not data.strip():
        return LabelError("label_empty", "the file holds no JSON", 0)
    if isinstance(error, RecursionError):
        return LabelError("label_too_deep", "objects or arrays are nested too deeply to be a label")
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
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, IndexError, RecursionError):
        return None
    return np.frombuffer(view, np.uint8).ctypes.data - np.frombuffer(data, np.uint8).ctypes.data
