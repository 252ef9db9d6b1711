"""One shard, opened: where its samples lie (.idx), their bytes (one pread each), whether they are
intact (.xxh3).

The members of a sample are adjacent in the tar, so what is wanted of it is one contiguous read
into a buffer that the thread keeps; each member is then checked against its xxh3_64 before
anything looks at it. What is wrong is raised as a DamagedError, which says where.

Left out: mmap (a truncated file would be a bus error, and one read per sample costs nothing
beside zstd), and reading several samples at once (the shuffle has parted neighbours).
"""

import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple

import xxhash

from loader.manifest import DatasetError, Member, ShardInfo, decode_hashes, decode_index
from loader.sample import JSON, LATENT, SampleError, SampleMeta, decode_meta, split_member_name
from loader.shape import LatentLayout
from loader.store import File, Store

# the extensions that a sample has -> those to read beside json
Wanted = Callable[[Sequence[str]], Sequence[str]]
# what can be wrong with data; every other errno is this machine's fault (too many open files, no
# permission) and is raised as it is
_OF_THE_DATA = (errno.ENOENT, errno.EIO, errno.ESTALE)


class Damage(NamedTuple):
    """What could not be used: one sample, or with `key` = "" all `num_samples` of a shard, of
    which `member` then is the file at fault.
    """

    shard: str
    key: str
    member: str
    reason: str
    num_samples: int = 1

    def __str__(self) -> str:
        where = f"key {self.key}" if self.key else f"all {self.num_samples} samples"
        return f"shard {self.shard}, {where}, member {self.member}: {self.reason}"


class DamagedError(ValueError):
    """Carries a Damage from where it is found to where the sample is replaced."""

    def __init__(self, damage: Damage):
        super().__init__(str(damage))
        self.damage = damage


class Sample(NamedTuple):
    """`members` holds the verified stored bytes by extension; they are valid until this thread's
    next read.
    """

    meta: SampleMeta
    shard: str
    members: dict[str, memoryview]


class Shard(NamedTuple):
    """An open shard: members by sample, hash by member name; `media` holds further members of the
    same samples.
    """

    info: ShardInfo
    file: File
    samples: list[list[Member]]
    hashes: dict[str, str]
    media: "Shard | None"

    def key(self, position: int) -> str:
        return split_member_name(self.samples[position][0].name)[0]


def open_shard(store: Store, split: str, info: ShardInfo, media: ShardInfo | None = None) -> Shard:
    """Open a shard (and that of its media) and check the side files against the manifest. Raises
    DamagedError.
    """
    name = f"{split}/{info.name}"
    suffix = ".idx"
    try:
        index = store.read_file(f"{name}.idx", info.idx_xxh3)
        _check_hash(index, info.idx_xxh3)
        samples = decode_index(index, f"{name}.idx")
        if len(samples) != info.num_samples:
            raise DatasetError(
                f"it holds {len(samples)} samples, the manifest says {info.num_samples}"
            )
        suffix = ".xxh3"
        hashes = store.read_file(f"{name}.xxh3", info.xxh3_xxh3)
        _check_hash(hashes, info.xxh3_xxh3)
        by_member = decode_hashes(hashes, f"{name}.xxh3")
        suffix = ".tar"
        file = store.open(f"{name}.tar", info.bytes, info.tar_xxh3)
        media_shard = open_shard(store, split, media) if media else None
        return Shard(info, file, samples, by_member, media_shard)
    except (OSError, DatasetError) as error:
        raise DamagedError(_whole_shard(info, f"{info.name}{suffix}", error)) from error


def _check_hash(data: bytes, xxh3: str) -> None:
    if xxhash.xxh3_128_hexdigest(data) != xxh3:
        raise DatasetError("its hash differs from the manifest's")


def _whole_shard(info: ShardInfo, member: str, error: OSError | ValueError) -> Damage:
    return Damage(info.name, "", member, _reason(error), info.num_samples)


def _reason(error: OSError | ValueError) -> str:
    """Why a read failed, in words. Raises the error again where it isn't the data's fault."""
    if isinstance(error, OSError):
        if error.errno not in _OF_THE_DATA:
            raise error
        return error.strerror or str(error)
    return str(error)


def read_sample(shard: Shard, position: int, wanted: Wanted, layout: LatentLayout) -> Sample:
    """Read and check sample `position` of a shard: its json and what `wanted` asks for. Raises
    DamagedError.
    """
    key = shard.key(position)
    in_shard = _extensions(shard, position)
    in_media = _extensions(shard.media, position) if shard.media else []
    asked = wanted([*in_shard, *in_media])
    views: dict[str, memoryview] = {}
    from_media = [extension for extension in asked if extension in in_media]
    if shard.media and from_media:
        # copied, because the next read takes the buffer
        media_views = read_members(shard.media, position, from_media)
        views = {extension: memoryview(bytes(view)) for extension, view in media_views.items()}
    from_shard = [JSON, *(extension for extension in asked if extension not in views)]
    views |= read_members(shard, position, from_shard)
    try:
        meta = decode_meta(views[JSON])
    except SampleError as error:
        raise _damaged(shard, key, JSON, str(error)) from error
    if meta.key != key or str(meta.bucket) != shard.info.bucket:
        described = f"it describes key {meta.key} of {meta.bucket}"
        raise _damaged(shard, key, JSON, f"{described}, in a shard of {shard.info.bucket}")
    expected_shape = layout.latent_shape(meta.bucket)
    if meta.latent.shape != expected_shape:
        reason = f"shape {list(meta.latent.shape)}, a {meta.bucket} has {list(expected_shape)}"
        raise _damaged(shard, key, LATENT, reason)
    return Sample(meta, shard.info.name, views)


def _extensions(shard: Shard, position: int) -> list[str]:
    return [split_member_name(member.name)[1] for member in shard.samples[position]]


def _damaged(shard: Shard, key: str, extension: str, reason: str) -> DamagedError:
    return DamagedError(Damage(shard.info.name, key, f"{key}.{extension}", reason))


def read_members(shard: Shard, position: int, extensions: Sequence[str]) -> dict[str, memoryview]:
    """The stored bytes of some members of a sample by extension, in one read, each checked
    against its hash; valid until this thread's next read. Raises DamagedError.
    """
    members = {split_member_name(member.name)[1]: member for member in shard.samples[position]}
    key = shard.key(position)
    for extension in extensions:
        if extension not in members:
            reason = f"missing; the sample has {', '.join(members)}"
            raise _damaged(shard, key, extension, reason)
    chosen = [members[extension] for extension in extensions]
    first = min(member.offset for member in chosen)
    end = max(member.offset + member.size for member in chosen)
    try:
        data = shard.file.read(first, end - first)
    except FileNotFoundError as error:
        # a remote shard is first asked for here
        raise DamagedError(_whole_shard(shard.info, f"{shard.info.name}.tar", error)) from error
    except OSError as error:
        raise _damaged(shard, key, extensions[0], _reason(error)) from error
    views = {}
    for extension, member in zip(extensions, chosen, strict=True):
        start = member.offset - first
        view = views[extension] = data[start : start + member.size]
        if len(view) < member.size:
            reason = f"short: {len(view)} of {member.size} bytes; the shard is truncated"
        elif xxhash.xxh3_64_hexdigest(view) != shard.hashes.get(member.name):
            reason = "damaged: its bytes differ from the .xxh3 file's hash"
        else:
            continue
        shard.file.forget(first, end - first)
        raise _damaged(shard, key, extension, reason)
    return views
