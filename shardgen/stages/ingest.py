"""The label tree into the catalog: processes parse, one process writes, and what hasn't changed
isn't read.

The parent walks the folders and hands out file names in chunks; a worker stats, reads, hashes and
parses a chunk and returns rows ready for SQLite; the parent writes them, a transaction per few
chunks. Only a bounded number of chunks is in flight, so memory doesn't grow with the tree.
Interrupted at any point, the catalog holds whole chunks and the next run reads the rest: a file
counts as unchanged if size and mtime are those of the catalog, else if its hash is.
"""

import errno
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from subprocess import PIPE, Popen

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.tables import GONE, Seen
from shardgen.stages.reader import Chunk, Found, read_chunk, shown

CHUNK_FILES = 512
_MIN_FILES_FOR_POOL = 4096  # below, starting processes takes longer than reading the labels


def ingest_labels(
    catalog: Catalog,
    root: Path,
    *,
    max_bytes: int = 1 << 20,
    workers: int = 0,
    advance: Callable[[int], None] = lambda num_files: None,
) -> None:
    """Bring the catalog up to date with every *.json below `root`, whatever the case of its
    suffix; `advance` hears of label files done.

    Links to folders are followed, and each folder is read once: by its own path if that lies
    below `root` too. A folder that vanishes while the tree is read counts as gone. Raises OSError
    if `root` does, or if a folder can't be listed.
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
    for folder in catalog.labels.folders() - folders:
        gone += [seen for seen in catalog.labels.known(folder).values() if seen.status != GONE]
    catalog.labels.write([], [], [], gone)
    catalog.database.build_indexes()


def _write(catalog: Catalog, batch: list[Found]) -> None:
    catalog.labels.write(
        [row for found in batch for row in found.new],
        [pair for found in batch for pair in found.changed],
        [pair for found in batch for pair in found.touched],
        [],
    )


def _chunks(
    catalog: Catalog, root: Path, max_bytes: int, folders: set[str], gone: list[Seen]
) -> Iterator[Chunk]:
    """The labels of each folder, cut into chunks. Fills `folders` with those that hold labels,
    `gone` with files that are no more.
    """
    is_empty = catalog.count() == 0  # nothing to look up then, and no index to do it with
    for folder, names in _folders(root):
        folders.add(shown(folder))
        known = {} if is_empty else catalog.labels.known(shown(folder))
        there = set(map(shown, names))
        gone += [seen for name, seen in known.items() if name not in there and seen.status != GONE]
        for start in range(0, len(names), CHUNK_FILES):
            part = names[start : start + CHUNK_FILES]
            yield Chunk(
                str(root),
                folder,
                part,
                {name: known[name] for name in map(shown, part) if name in known},
                max_bytes,
            )


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to `root`, names of its labels in order) of each folder that holds labels:
    first the tree itself in name order, then what links lead to.
    """
    todo, links = [""], list[str]()
    visited: set[tuple[int, int]] = set()
    while todo or links:
        folder = todo.pop() if todo else links.pop(0)
        names: list[str] = []
        below: list[str] = []
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        (links if entry.is_symlink() else below).append(path)
                    elif entry.name.lower().endswith(".json"):
                        names.append(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            if not root.is_dir():
                raise
            continue
        todo += sorted(below, reverse=True)
        links.sort()
        if names:
            yield folder, sorted(names)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link that leads in a circle is none; a label by its name, it can't be read."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _read_chunks(chunks: Iterator[Chunk], workers: int) -> Iterator[Found]:
    """read_chunk over all chunks, in order: here if there are few of them, else in processes, few
    at a time.
    """
    first = []
    for chunk in chunks:
        first.append(chunk)
        if workers > 1 and sum(len(each.names) for each in first) >= _MIN_FILES_FOR_POOL:
            break
    else:
        yield from map(read_chunk, first)
        return
    with ExitStack() as stack:
        readers: SimpleQueue[Popen[bytes]] = SimpleQueue()
        for _ in range(workers):
            readers.put(stack.enter_context(_reader()))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        pending = deque(pool.submit(_ask, readers, chunk) for chunk in first)
        for chunk in chunks:
            while len(pending) >= max(4 * workers, len(first)):
                yield pending.popleft().result()
            pending.append(pool.submit(_ask, readers, chunk))
        while pending:
            yield pending.popleft().result()


@contextmanager
def _reader() -> Iterator[Popen[bytes]]:
    """A reading process; closing its stdin ends it."""
    path = os.pathsep.join(filter(None, sys.path))
    with Popen(
        [sys.executable, "-S", "-c", "from shardgen.stages.reader import main; main()"],
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        yield process


def _ask(readers: "SimpleQueue[Popen[bytes]]", chunk: Chunk) -> Found:
    """Have a free reader read a chunk. Raises ChildProcessError if it has died."""
    reader = readers.get()
    assert reader.stdin is not None and reader.stdout is not None
    try:
        pickle.dump(chunk, reader.stdin, pickle.HIGHEST_PROTOCOL)
        reader.stdin.flush()
        found: Found = pickle.load(reader.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise ChildProcessError(
            "a process that reads labels died: killed from outside, or out of memory. What was "
            "read stands; run the build again to go on"
        ) from error
    finally:
        readers.put(reader)
    return found
