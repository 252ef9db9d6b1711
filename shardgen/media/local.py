"""Media that lie beside their label: found by name, and hashed where they lie."""

import os
from pathlib import Path
from typing import NamedTuple

import xxhash

from shardgen.media.errors import FetchError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mxf", ".mkv", ".webm", ".avi", ".ts", ".mpg")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_BLOCK_BYTES = 1 << 20


class Fetched(NamedTuple):
    """A file with these bytes."""

    path: Path
    size_bytes: int
    mtime_ns: int
    media_xxh3: str


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
