"""Whole files or none: the one way in which newsreel puts a file in its place, and a file's hash.

A reader must never meet half of a file, and what a program has said to be written must survive a
power cut. So the bytes go to a temporary file beside the target, are synced, and get their name
by a rename, whose folder is synced too. A killed process leaves at most a `*.tmp` file.
"""

import errno
import fcntl
import filecmp
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import xxhash

TEMPORARY, LOCK_FILE = ".tmp", ".lock"
_READ_BYTES = 1 << 20
# until whoever asks for a writer is taken for one
_ASKS_FOR_S = 30.0
_ADVICE = {
    errno.ENOENT: "; check the path, or make it first",
    errno.EEXIST: "; a file stands where a folder is needed, name another folder",
    errno.ENOTDIR: "; a file stands where a folder is needed, name another folder",
    errno.ENOSPC: "; free some space and run the same command, what was finished stands",
    errno.EDQUOT: "; free some space and run the same command, what was finished stands",
    errno.EROFS: "; name a folder on a disk that can be written",
    errno.EACCES: "; make it accessible to this user, or name another folder",
    errno.EPERM: "; make it accessible to this user, or name another folder",
}


class FolderInUseError(ValueError):
    """Another process writes to this folder; the message names both."""


def cause_of(error: Exception) -> str:
    """What went wrong, for a message that says where: without the system's number and path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def told(error: Exception) -> str:
    """What to print of an error: of the system's where, what and what to do about it in one line,
    of ours the text, which says all of that.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}{_ADVICE.get(error.errno, '')}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path into an OSError that has none: a write or a sync knows only its descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `path` when the block ends, and is removed when it
    raises. Raises OSError.

    A file that holds these bytes already stays as it is. `durable=False` leaves out the syncs,
    for caches whose entries can be checked and made again.
    """
    # two processes or threads never share one
    name = f"{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}"
    temporary = path.with_name(name)
    try:
        with naming(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if _are_equal(temporary, path):
                return
            temporary.replace(path)
            if durable:
                sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _are_equal(first: Path, second: Path) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except FileNotFoundError:
        return False


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file by way of `atomic_file`. Raises OSError."""
    with atomic_file(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk: a rename is a change of the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def sole_writer(folder: Path, owner: str) -> Iterator[None]:
    """Make this process the only one that writes to `folder`, which is created, until the block
    ends or the process dies, however it dies: the kernel lets go of the lock. `owner` says who
    it is, for the message that another process gets.

    Raises FolderInUseError, OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # without a buffer, which would fail once more where it is closed
    with (folder / LOCK_FILE).open("a+b", buffering=0) as file:
        try:
            _lock(file)
        except BlockingIOError as error:
            file.seek(0)
            other = file.read().decode(errors="replace").strip() or "another process"
            raise FolderInUseError(
                f"{folder}: {other} writes here already; wait for it, stop it, or choose another "
                f"output"
            ) from error
        with naming(folder / LOCK_FILE):
            file.truncate(0)
            file.write(owner.encode())
        yield


def _lock(file: IO[bytes]) -> None:
    """Raises BlockingIOError where another process has it to write."""
    deadline_s = time.monotonic() + _ASKS_FOR_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # one that only asks `has_writer` shares it, and is not refused; it asks for a moment,
            # which on a busy machine may be a long one
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.02)


def has_writer(folder: Path) -> bool:
    """Whether some process is inside `sole_writer` of `folder` now."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def file_xxh3(path: Path) -> str:
    """xxh3_128 hex of a file's bytes. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
