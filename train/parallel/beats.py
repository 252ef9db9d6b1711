"""Signs of life between the processes of a run, by way of something that outlives whoever wrote
them: files in the output folder, or, where not all hosts see that folder, the store that torchrun's
agent on the first host keeps for all.
"""

import os
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from loader.files import atomic_file
from train.parallel import mesh
from train.parallel.mesh import World

# of one question to the store
_TIMEOUT = timedelta(seconds=10)


class Beats(Protocol):
    """The newest words of each rank."""

    def write(self, rank: int, words: bytes) -> None:
        """Raises OSError."""

    def read(self, rank: int) -> bytes | None:
        """None where it has none. Raises OSError where nothing can be read at all."""

    def remove(self, rank: int) -> None: ...


class FolderBeats:
    """Files that all processes see."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, rank: int, words: bytes) -> None:
        with atomic_file(self._path(rank), durable=False) as file:
            file.write(words)

    def read(self, rank: int) -> bytes | None:
        try:
            return self._path(rank).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, rank: int) -> None:
        self._path(rank).unlink(missing_ok=True)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}"


class StoreBeats:
    """Keys of the store that the process group has met in, by a connection of its own. `start`
    tells these processes from those that torchrun has started before: the store stays.
    """

    def __init__(self, start: str) -> None:
        """Raises OSError where the store does not answer."""
        with _store_errors():
            store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=_TIMEOUT,
            )
        self._store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"newsreel/alive/{start}", store
        )

    def write(self, rank: int, words: bytes) -> None:
        with _store_errors():
            self._store.set(str(rank), words.hex())

    def read(self, rank: int) -> bytes | None:
        with _store_errors():
            if not self._store.check([str(rank)]):
                return None
            return bytes.fromhex(self._store.get(str(rank)).decode())

    def remove(self, rank: int) -> None:
        # at the end of a run the store may have gone first
        with suppress(OSError), _store_errors():
            self._store.delete_key(str(rank))


def open_beats(world: World, folder: Path) -> Beats:
    """Files in `folder`, if all processes see it. On all processes together. Raises OSError."""
    if world.output_ranks is None:
        return FolderBeats(folder)
    # no number of starts, which torchrun's agents of several hosts don't count alike
    return StoreBeats(mesh.broadcast(uuid.uuid4().hex, world))


class _store_errors:
    """A store that does not answer raises OSError."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            # the rest is where torch was
            cause = str(error).partition("\n")[0]
            raise OSError(
                f"the store at {os.environ['MASTER_ADDR']} does not answer: {cause}"
            ) from error


def with_output(world: World, folder: Path) -> World:
    """The same world, and which of its processes see `folder`, that the main one has made. On all
    processes together.
    """
    if world.size == 1:
        return world
    name = mesh.broadcast(f"seen-{uuid.uuid4().hex}", world)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    mesh.barrier(world)
    sees = mesh.gather((folder / name).exists(), world)
    if world.is_main:
        (folder / name).unlink()
    ranks = tuple(rank for rank, each in enumerate(sees) if each)
    return world._replace(output_ranks=None if all(sees) else ranks)
