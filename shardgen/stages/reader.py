"""What a process that reads labels does: a chunk of file names in, rows for the catalog out.

It is a program of its own (`python -c` and `main`, pickles on stdin and stdout) that imports
little, rather than a multiprocessing worker: that would import the whole of the parent's program
first, which takes longer than reading some ten thousand labels. It ends when its stdin does, so
it never outlives the parent.
"""

import os
import pickle
import signal
import stat
import sys
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import xxhash

from shardgen.catalog.tables import GONE, INGESTED, UNREADABLE, IngestRow, Seen
from shardgen.labels.parse import Label, LabelError, parse_label

_pack = msgspec.msgpack.Encoder().encode


class Chunk(NamedTuple):
    """Label files of one folder (relative to `root`, "" for the root itself), and what the
    catalog knows of them.
    """

    root: str
    folder: str
    names: list[str]
    known: dict[str, Seen]
    max_bytes: int


class Found(NamedTuple):
    """What reading a chunk gave. `new` holds IngestRows as plain tuples."""

    new: list[tuple[Any, ...]]
    changed: list[tuple[Seen, IngestRow]]
    touched: list[tuple[Seen, int]]
    num_files: int


def read_chunk(chunk: Chunk) -> Found:
    """Read what the catalog doesn't know already. A file that can't be read becomes a row with
    the reason.
    """
    found = Found([], [], [], len(chunk.names))
    label_prefix = f"{shown(chunk.folder)}/" if chunk.folder else ""
    folder: int | None = None
    try:
        path = f"{chunk.root}/{chunk.folder}"
        with suppress(OSError):  # each label of it will say so
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in chunk.names:
            label = label_prefix + shown(name)
            seen = chunk.known.get(label[len(label_prefix) :])
            row = _read_label(folder, name, label, seen, chunk.max_bytes)
            if row is None:
                continue
            if seen is None:
                found.new.append(tuple(row))  # pickles three times as fast as a NamedTuple
            elif row.label_xxh3 and row.label_xxh3 == seen.label_xxh3 and seen.status != GONE:
                found.touched.append((seen, row.mtime_ns))
            else:
                found.changed.append((seen, row))
    finally:
        if folder is not None:
            os.close(folder)
    return found


def _read_label(
    folder: int | None, name: str, label: str, seen: Seen | None, max_bytes: int
) -> IngestRow | None:
    """One file of an open folder as a row; None if its size and mtime are those in the catalog."""
    size_bytes, mtime_ns, digest = 0, 0, ""
    try:
        if not label.endswith(name):
            raise LabelError("label_bad_name", "the file's name is not UTF-8; rename it")
        if folder is None:
            raise LabelError("label_unreadable", "its folder vanished, or can't be opened")
        # a pipe would block
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            status = os.fstat(descriptor)
            size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
            if (
                seen
                and seen.size_bytes == size_bytes
                and seen.mtime_ns == mtime_ns
                and seen.status != GONE
            ):
                return None
            if not stat.S_ISREG(status.st_mode):
                raise LabelError("label_unreadable", "not a regular file")
            if size_bytes > max_bytes:
                raise LabelError(
                    "label_too_large", f"{size_bytes} bytes; labels.max_bytes = {max_bytes}"
                )
            data = os.read(descriptor, size_bytes + 1)
        finally:
            os.close(descriptor)
        digest = xxhash.xxh3_64_hexdigest(data)
        return _row(label, size_bytes, mtime_ns, digest, parse_label(data))
    except OSError as error:
        problem = LabelError("label_unreadable", str(error.strerror))
    except LabelError as error:
        problem = error
    return IngestRow(
        label,
        size_bytes,
        mtime_ns,
        digest,
        UNREADABLE,
        problem.reason,
        problem.detail[:500],
        problem.byte_offset,
        "",
        "",
        "",
        "",
        "",
        "",
        None,
        None,
        None,
        None,
        0,
        b"",
    )


def _row(label: str, size_bytes: int, mtime_ns: int, digest: str, read: Label) -> IngestRow:
    media_type = read.media_type or label.partition("/")[0]  # <root>/{image,video}/...
    return IngestRow(
        label,
        size_bytes,
        mtime_ns,
        digest,
        INGESTED,
        "",
        "",
        None,
        read.clip_id,
        media_type,
        read.category,
        read.station,
        read.broadcast_date,
        read.url,
        read.width_px,
        read.height_px,
        read.duration_s,
        read.fps,
        len(read.objects),
        _pack(read),
    )


def shown(name: str) -> str:
    """A file name as SQLite can hold it: bytes that are not UTF-8 as \\xNN."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def main() -> None:
    """Chunks from stdin, what was Found to stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(read_chunk(chunk), sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
        sys.stdout.buffer.flush()
