"""The rows that come out of the catalog, as types: a misspelt column is found by mypy."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shardgen.media.probe import Probe
from shardgen.rules.windows import Origin

_decode_probe = msgspec.json.Decoder(Probe).decode


class Clip(NamedTuple):
    """A label file and what the build knows of it. `probe` is None until its media were probed
    well; if they can't be decoded, `probe_error` is the reason.
    """

    id: int
    label: str  # path of the label file, below the label root
    status: str
    reason: str
    detail: str
    byte_offset: int | None  # where in the label file the fault is
    clip_id: str
    media_type: str
    category: str
    url: str
    declared_width_px: int | None
    declared_height_px: int | None
    declared_duration_s: float | None
    declared_fps: float | None
    caption_chars: int | None
    declared: str  # with `probed`: the two values where label and media differ
    probed: str
    programme: str
    split: str
    media_xxh3: str  # "" until the media were hashed
    num_windows: int
    flags: str  # separated by spaces
    probe: Probe | None
    probe_error: str
    probe_error_detail: str

    @property
    def declared_size(self) -> str:
        """ "1920x1080", or "unknown"."""
        if not self.declared_width_px:
            return "unknown"
        return f"{self.declared_width_px}x{self.declared_height_px}"

    @property
    def origin(self) -> Origin:
        """What its windows will say of it."""
        return Origin(
            label=self.label,
            media_type=self.media_type,
            category=self.category,
            programme=self.programme,
            media_xxh3=self.media_xxh3,
        )


CLIP_COLUMNS = """
clips.id, label, status, reason, detail, byte_offset, clip_id, media_type, category, url,
declared_width_px, declared_height_px, declared_duration_s, declared_fps, caption_chars,
declared, probed, programme, split, media_xxh3, num_windows, flags,
probe, coalesce(error_reason, ''), coalesce(error_detail, '')
"""


def clip_of(row: tuple[Any, ...]) -> Clip:
    """A row of CLIP_COLUMNS."""
    *columns, probe, error, error_detail = row
    found = _decode_probe(probe) if probe else None
    return Clip._make((*columns, found, error, error_detail))


class Claim(NamedTuple):
    """One of several label files that claim the same clip id, or the same media."""

    id: int
    clip_id: str
    label: str
    status: str
    media_xxh3: str


class StatusCount(NamedTuple):
    """How many label files of a category ended in a status for a reason."""

    category: str
    status: str
    reason: str
    num_labels: int


class MediaFile(NamedTuple):
    """A file, and the hash of the bytes that it held when it had this size and mtime."""

    path: Path
    size_bytes: int
    mtime_ns: int
    media_xxh3: str

    def is_unchanged(self) -> bool:
        """Whether it still has that size and mtime; False if it can't be looked at, because
        hashing it again will say why.
        """
        try:
            now = self.path.stat()
        except OSError:
            return False
        return (now.st_size, now.st_mtime_ns) == (self.size_bytes, self.mtime_ns)


class LostWindow(NamedTuple):
    """A planned window that its medium could not give."""

    key: str
    reason: str
    detail: str


class WindowFlag(NamedTuple):
    """A remark on a window: its clip gets the flag."""

    key: str
    flag: str
