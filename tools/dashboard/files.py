"""Reading files that somebody else is writing: decoded once per version, followed as they grow."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")
S = TypeVar("S")
MAX_JSON_BYTES = 256 << 20
MAX_REMEMBERED = 400


class FileProblem(NamedTuple):
    """Why a file can't be shown."""

    name: str
    detail: str


class JsonFiles:
    """Decoded JSON files, kept until they change. Safe from several threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Path, type], tuple[tuple[int, int, int], Any]] = (
            OrderedDict()
        )
        self._lock = threading.Lock()

    def read(self, path: Path, kind: type[T]) -> T | FileProblem | None:
        """The file as `kind`; None where there is none; a FileProblem where it can't be read."""
        try:
            stat = path.stat()
            version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            with self._lock:
                known = self._known.get((path, kind))
            if known and known[0] == version:
                found: T | FileProblem = known[1]
                return found
            if stat.st_size > MAX_JSON_BYTES:
                return FileProblem(path.name, f"larger than {MAX_JSON_BYTES} bytes")
            try:
                value: T | FileProblem = msgspec.json.decode(path.read_bytes(), type=kind)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                value = FileProblem(path.name, str(error))
        except FileNotFoundError:
            return None
        except OSError as error:
            return FileProblem(path.name, str(error.strerror))
        with self._lock:
            self._known[path, kind] = (version, value)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return value


class Lines(Generic[S]):
    """The records of one growing file of JSON lines.

    `read` takes up what was added since the last call and leaves a line that is not finished yet to
    the next one. A file that was replaced or became shorter (a resumed run drops the lines past its
    checkpoint) is read from its start again.
    """

    def __init__(self, path: Path, kind: type[S]) -> None:
        self.path, self.records = path, list[S]()
        self.num_damaged = 0
        self._decode: Callable[[bytes], S] = msgspec.json.Decoder(kind).decode
        self._offset, self._inode = 0, 0
        self._head = b""
        self._lock = threading.Lock()

    def read(self) -> list[S]:
        """All finished records so far; a file that is gone has none."""
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    stat = os.fstat(file.fileno())
                    head = file.read(len(self._head))
                    if (
                        stat.st_ino != self._inode
                        or stat.st_size < self._offset
                        or head != self._head
                    ):
                        self._restart(stat.st_ino)
                    file.seek(self._offset)
                    self._take(file.read(stat.st_size - self._offset))
            except OSError:
                self._restart(0)
            return self.records

    def _restart(self, inode: int) -> None:
        self.records, self.num_damaged = [], 0
        self._offset, self._inode, self._head = 0, inode, b""

    def _take(self, data: bytes) -> None:
        whole = data.rfind(b"\n") + 1
        if not self._head:
            self._head = data[: min(whole, 256)]
        self._offset += whole
        # a new list, so that whoever reads the old one is not disturbed
        records = list(self.records) if whole else self.records
        for line in data[:whole].splitlines():
            try:
                records.append(self._decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError):
                self.num_damaged += bool(line.strip())
        self.records = records


class LineFiles:
    """One `Lines` per file, dropped when many others were read since."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, Lines[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def follow(self, path: Path, kind: type[S]) -> Lines[S]:
        with self._lock:
            lines = self._known.get(path)
            if lines is None:
                lines = self._known[path] = Lines(path, kind)
            self._known.move_to_end(path)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return lines


class _Answer:
    """One remembered answer, and the lock of whoever works it out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: Any = None
        self.made_s: float | None = None


class Recent:
    """Answers that all pages share for a few seconds: fifty open pages cost what one does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._known: OrderedDict[Hashable, _Answer] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave at most `seconds` ago; one thread makes it, the others wait for it."""
        with self._lock:
            answer = self._known.setdefault(key, _Answer())
            self._known.move_to_end(key)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        with answer.lock:
            if answer.made_s is None or time.monotonic() - answer.made_s > self.seconds:
                answer.value, answer.made_s = make(), time.monotonic()
            value: T = answer.value
            return value
