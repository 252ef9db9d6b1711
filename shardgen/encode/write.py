"""Deterministic shards: a plain ustar file, its DALI index and its hashes, each put in place by
one rename.

The bytes are a function of the samples alone: no times, no owners, a fixed member order. Python's
tarfile makes the headers; the file around them is written here, because the shard's hash is taken
as the bytes pass and because two zero blocks end it, without padding to tar's tape record.

The .tar is renamed into place last, so where a .tar stands its .idx and .xxh3 stand too. What a
killed run leaves is a `*.tmp` file, which the next run removes. Left out: compression (members
are compressed already).
"""

import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import xxhash

from loader.files import TEMPORARY, atomic_file, write_atomic
from loader.manifest import Member, ShardInfo, Split, encode_hashes, encode_index
from loader.sample import MEMBERS

BLOCK_BYTES = 512
TAR, IDX, XXH3 = ".tar", ".idx", ".xxh3"
END = bytes(2 * BLOCK_BYTES)


def write_shard(
    folder: Path, name: str, bucket: str, samples: Iterable[tuple[str, Mapping[str, bytes]]]
) -> ShardInfo:
    """Write `name`.tar, .idx and .xxh3 into `folder` from (key, {extension: bytes}) in ascending
    order of keys.

    Extensions are those of loader.sample.MEMBERS and are stored in its order. Returns the
    manifest's entry. Raises OSError (disk full, read-only); nothing but complete files ever bears
    a shard's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: list[list[Member]] = []
    hashes: list[tuple[str, str]] = []
    whole = xxhash.xxh3_128()
    offset, last = 0, ""
    with atomic_file(folder / (name + TAR)) as file:
        for key, members in samples:
            assert last < key, f"{name}: key {key} after {last}"
            assert members.keys() <= set(MEMBERS), f"{name}: {key} has members {list(members)}"
            last = key
            index.append([])
            for extension in filter(members.__contains__, MEMBERS):
                data = members[extension]
                member = f"{key}.{extension}"
                index[-1].append(Member(member, offset + BLOCK_BYTES, len(data)))
                hashes.append((xxhash.xxh3_64_hexdigest(data), member))
                for part in (tar_header(member, len(data)), data, bytes(-len(data) % BLOCK_BYTES)):
                    file.write(part)
                    whole.update(part)
                    offset += len(part)
        # Two blocks of zeros end a tar.
        file.write(END)
        whole.update(END)
        # Inside the block: where the .tar gets its name, both of these stand already.
        idx, xxh3 = encode_index(index), encode_hashes(hashes)
        write_atomic(folder / (name + IDX), idx)
        write_atomic(folder / (name + XXH3), xxh3)
    return ShardInfo(
        name=name,
        bucket=bucket,
        num_samples=len(index),
        bytes=offset + len(END),
        tar_xxh3=whole.hexdigest(),
        idx_xxh3=xxhash.xxh3_128_hexdigest(idx),
        xxh3_xxh3=xxhash.xxh3_128_hexdigest(xxh3),
    )


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file: mode 0644, mtime, uid and gid 0, no names."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mode = 0o644
    return entry.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete the temporary files that a killed run left in `folder` and its splits; returns them.
    Only the build's owner may. What else lies there, the label tree perhaps, is not ours.
    """
    places = folder, *(folder / split for split in get_args(Split))
    leftovers = [path for place in places for path in sorted(place.glob(f"*.[0-9]*{TEMPORARY}"))]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def remove_shard(folder: Path, name: str) -> None:
    """Delete the files of a shard, as far as they are there. Raises OSError."""
    for suffix in (TAR, IDX, XXH3):
        (folder / (name + suffix)).unlink(missing_ok=True)


def stored_size(folder: Path, name: str) -> int | None:
    """Size in bytes of a finished shard's .tar, or None unless all three files stand."""
    if not all((folder / (name + suffix)).is_file() for suffix in (TAR, IDX, XXH3)):
        return None
    return (folder / (name + TAR)).stat().st_size
