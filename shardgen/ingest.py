"""The label tree into the catalog: processes parse, one process writes, and what hasn't changed isn't read.

The parent walks the folders and hands out file names in chunks; a worker stats, reads, hashes and parses a chunk and
returns rows ready for SQLite; the parent writes them, a transaction per few chunks. Only a bounded number of chunks is
in flight, so memory doesn't grow with the tree. Interrupted at any point, the catalog holds whole chunks and the next
run reads the rest: a file counts as unchanged if size and mtime are those of the catalog, else if its hash is.
"""

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash

from shardgen.catalog import Catalog
from shardgen.labels import Label, LabelError, parse_label
from shardgen.tables import GONE, INGESTED, UNREADABLE, IngestRow, Seen

CHUNK_FILES = 512
_MIN_FILES_FOR_POOL = 4096  # below, starting processes takes longer than reading the labels
_pack = msgspec.msgpack.Encoder().encode


class Chunk(NamedTuple):
    """Label files of one folder (relative to `root`, "" for the root itself), and what the catalog knows of them."""

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


def ingest_labels(catalog: Catalog, root: Path, *, max_bytes: int = 1 << 20, workers: int = 0,
                  advance: Callable[[int], None] = lambda num_files: None) -> None:
    """Bring the catalog up to date with every *.json below `root`; `advance` hears of label files done.

    Symbolic links to folders are not followed. Raises OSError if a folder can't be listed.
    """
    workers = workers or len(os.sched_getaffinity(0))
    folders: set[str] = set()
    gone: list[Seen] = []
    results = _read_chunks(_chunks(catalog, root, max_bytes, folders, gone), workers)
    batch: list[Found] = []
    for found in results:
        batch.append(found)
        if sum(each.num_files for each in batch) >= 8 * CHUNK_FILES:
            _write(catalog, batch)
            batch = []
        advance(found.num_files)
    _write(catalog, batch)
    for folder in catalog.label_folders() - folders:
        gone += [seen for seen in catalog.known_labels(folder).values() if seen.status != GONE]
    catalog.write_labels([], [], [], gone)
    catalog.index()


def _write(catalog: Catalog, batch: list[Found]) -> None:
    catalog.write_labels([row for found in batch for row in found.new],
                         [pair for found in batch for pair in found.changed],
                         [pair for found in batch for pair in found.touched], [])


def _chunks(catalog: Catalog, root: Path, max_bytes: int, folders: set[str], gone: list[Seen]) -> Iterator[Chunk]:
    """Walk the tree in name order. Fills `folders` with those that hold labels, `gone` with files that are no more."""
    todo = [""]
    while todo:
        folder = todo.pop()
        names, below = [], []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.endswith(".json") and not entry.is_dir(follow_symlinks=False):
                    names.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    below.append(f"{folder}/{entry.name}" if folder else entry.name)
        todo += sorted(below, reverse=True)
        if not names:
            continue
        names.sort()
        folders.add(_shown(folder))
        known = catalog.known_labels(_shown(folder))
        there = set(map(_shown, names))
        gone += [seen for name, seen in known.items() if name not in there and seen.status != GONE]
        for start in range(0, len(names), CHUNK_FILES):
            part = names[start:start + CHUNK_FILES]
            yield Chunk(str(root), folder, part, {name: known[name] for name in map(_shown, part) if name in known},
                        max_bytes)


def _read_chunks(chunks: Iterator[Chunk], workers: int) -> Iterator[Found]:
    """read_chunk over all chunks, in order: here if there are few of them, else in processes, few at a time."""
    first = []
    for chunk in chunks:
        first.append(chunk)
        if workers > 1 and sum(len(each.names) for each in first) >= _MIN_FILES_FOR_POOL:
            break
    else:
        yield from map(read_chunk, first)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending: deque[Future[Found]] = deque(pool.submit(read_chunk, chunk) for chunk in first)
        for chunk in chunks:
            while len(pending) >= max(4 * workers, len(first)):
                yield pending.popleft().result()
            pending.append(pool.submit(read_chunk, chunk))
        while pending:
            yield pending.popleft().result()


def read_chunk(chunk: Chunk) -> Found:
    """Read what the catalog doesn't know already. A file that can't be read becomes a row with the reason."""
    found = Found([], [], [], len(chunk.names))
    label_prefix = f"{_shown(chunk.folder)}/" if chunk.folder else ""
    folder = os.open(f"{chunk.root}/{chunk.folder}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in chunk.names:
            shown = _shown(name)
            seen = chunk.known.get(shown)
            row = _read_label(folder, name, label_prefix + shown, seen, chunk.max_bytes)
            if row is None:
                continue
            if seen is None:
                found.new.append(tuple(row))  # pickles three times as fast as a NamedTuple
            elif row.label_xxh3 and row.label_xxh3 == seen.label_xxh3 and seen.status != GONE:
                found.touched.append((seen, row.mtime_ns))
            else:
                found.changed.append((seen, row))
    finally:
        os.close(folder)
    return found


def _read_label(folder: int, name: str, label: str, seen: Seen | None, max_bytes: int) -> IngestRow | None:
    """One file of an open folder as a row; None if its size and mtime are those in the catalog."""
    size_bytes, mtime_ns, digest = 0, 0, ""
    try:
        if not label.endswith(name):
            raise LabelError("label_bad_name", "the file's name is not UTF-8; rename it")
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)  # a pipe would block
        try:
            status = os.fstat(descriptor)
            size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
            if seen and seen.size_bytes == size_bytes and seen.mtime_ns == mtime_ns and seen.status != GONE:
                return None
            if not stat.S_ISREG(status.st_mode):
                raise LabelError("label_unreadable", "not a regular file")
            if size_bytes > max_bytes:
                raise LabelError("label_too_large", f"{size_bytes} bytes; labels.max_bytes = {max_bytes}")
            data = os.read(descriptor, size_bytes + 1)
        finally:
            os.close(descriptor)
        digest = xxhash.xxh3_64_hexdigest(data)
        return _row(label, size_bytes, mtime_ns, digest, parse_label(data))
    except OSError as error:
        problem = LabelError("label_unreadable", str(error.strerror))
    except LabelError as error:
        problem = error
    return IngestRow(label, size_bytes, mtime_ns, digest, UNREADABLE, problem.reason, problem.detail[:500],
                     problem.byte_offset, "", "", "", "", "", "", None, None, None, None, 0, b"")


def _row(label: str, size_bytes: int, mtime_ns: int, digest: str, read: Label) -> IngestRow:
    media_type = read.media_type or label.partition("/")[0]  # <root>/{image,video}/...
    return IngestRow(label, size_bytes, mtime_ns, digest, INGESTED, "", "", None, read.clip_id, media_type,
                     read.category, read.station, read.broadcast_date, read.url, read.width_px, read.height_px,
                     read.duration_s, read.fps, len(read.objects), _pack(read))


def _shown(name: str) -> str:
    """A file name as SQLite can hold it: bytes that are not UTF-8 as \\xNN."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")
