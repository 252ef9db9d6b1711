"""Media that lie beside their label: found by name, and hashed where they lie."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import xxhash

from shardgen.media.errors import FetchError

# In this order, where a label has several files beside it.
VIDEO_SUFFIXES = (
    ".mp4",
    ".mov",
    ".mxf",
    ".mkv",
    ".webm",
    ".avi",
    ".ts",
    ".mpg",
    ".mpeg",
    ".m2ts",
    ".mts",
    ".m4v",
    ".wmv",
    ".vob",
    ".m2t",
    ".m2v",
    ".qt",
    ".3gp",
    ".asf",
    ".flv",
    ".ogv",
    ".dv",
    ".gxf",
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".jpe", ".jfif")
_BLOCK_BYTES = 1 << 20


class Fetched(NamedTuple):
    """A file with these bytes."""

    path: Path
    size_bytes: int
    mtime_ns: int
    media_xxh3: str


# What a folder holds: {(stem in NFC, suffix in lower case): file names in order}.
Listing = dict[tuple[str, str], list[str]]


def list_media(folder: Path) -> Listing:
    """The files of a folder by the names that labels may know them by; nothing for a folder that
    can't be read.

    A Mac writes Hangul as separate letters (NFD) and a Korean keyboard as syllables (NFC), and
    cameras write suffixes in capitals: the same name to a person.
    """
    listing: Listing = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return listing
    for name in names:
        stem, suffix = os.path.splitext(name)
        key = unicodedata.normalize("NFC", stem), suffix.lower()
        listing.setdefault(key, []).append(name)
    return listing


def find_local(
    label_path: Path,
    clip_id: str,
    media_type: str,
    list_folder: Callable[[Path], Listing] = list_media,
) -> Path | None:
    """The media file beside its label, named by the label file or by the clip id; None if there
    is none. `list_folder` may be a `list_media` that remembers the last folders.
    """
    suffixes = IMAGE_SUFFIXES if media_type == "image" else VIDEO_SUFFIXES
    listing = list_folder(label_path.parent)
    for stem in dict.fromkeys((label_path.stem, clip_id)):
        for suffix in suffixes:
            names = listing.get((unicodedata.normalize("NFC", stem), suffix), [])
            # of several, the one that is spelt as the label is
            for name in sorted(names, key=lambda name: name != stem + suffix):
                path = label_path.with_name(name)
                if path.is_file():
                    return path
    return None


def others_beside(
    label_path: Path, clip_id: str, list_folder: Callable[[Path], Listing] = list_media
) -> list[str]:
    """Files beside the label that have its name, or the clip's, whatever their suffix."""
    stems = {unicodedata.normalize("NFC", stem) for stem in (label_path.stem, clip_id)}
    listing = list_folder(label_path.parent)
    names = {name for (stem, _), found in listing.items() if stem in stems for name in found}
    return sorted(name for name in names if not name.lower().endswith(".json"))


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
