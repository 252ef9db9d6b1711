"""Is a dataset whole? Every byte of it is looked at, and every fault is told with the shard and
the member it is in.

Three layers, from cheap to dear: the files against the manifest's hashes; the tar itself
(headers, padding, order, index) against the bytes that write.py would have made; and what the
members hold (metadata, tensors, pictures) against the format. The layers don't stop each other,
so that one flipped bit is traced to its member.

Of an index of foreign tars (tools/index.py) the shards are checked like this, but for latents and
first frames, which it lacks; the foreign tar against its hash, and each of its clips. What else
lies in that tar is not ours to judge.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import numpy as np
import xxhash
from msgspec import UNSET
from PIL import Image

from loader.files import file_xxh3
from loader.manifest import (
    MANIFEST_FILE,
    DatasetError,
    Manifest,
    Member,
    ShardInfo,
    decode_hashes,
    decode_index,
    media_shards,
    read_manifest,
)
from loader.sample import (
    CONDITION,
    EMPTY_PROMPT_FILE,
    JPG,
    JSON,
    LATENT,
    MAX_TEXT_TOKENS,
    MEMBERS,
    MP4,
    TEXT,
    SampleError,
    SampleMeta,
    TensorInfo,
    condition_info,
    decode_meta,
    decode_tensor,
    sample_key,
    split_member_name,
)
from loader.shape import WAN22, Bucket, LatentLayout
from shardgen.encode.executors import Failure, run_local
from shardgen.encode.write import BLOCK_BYTES, END, IDX, TAR, XXH3, tar_header
from shardgen.media.errors import MediaError
from shardgen.media.probe import probe


class Checked(NamedTuple):
    """What one shard gave: its faults, and what must be compared across shards."""

    faults: list[str]
    keys: list[str]
    programmes: set[str]
    text_dims: set[int]


Opened = tuple[mmap.mmap, list[list[Member]], dict[str, str]]


def check_shard(
    shard: tuple[str, ShardInfo, ShardInfo | None],
    dataset: Path,
    layout: LatentLayout = WAN22,
    has_condition: bool = False,
) -> Checked:
    """Check one (split, shard, shard of foreign media) of `dataset` completely. Faults are
    returned, not raised. has_condition: each sample must hold one.
    """
    split, info, media = shard
    checked = Checked([], [], set(), set())
    stem = dataset / split / info.name
    try:
        with _opened(stem, info, checked.faults) as (data, index, hashes):
            checked.faults.extend(_tar_faults(data, index, hashes, info))
            for members in index:
                checked.faults.extend(
                    _sample_faults(data, members, split, info, layout, checked, media is not None)
                )
                key, extensions = split_member_name(members[0].name)[0], _extensions(members)
                if has_condition and CONDITION not in extensions:
                    checked.faults.append(f"{info.name}.tar: {key}: has no member {CONDITION}")
        if media is not None:
            stem = stem.with_name(media.name)
            with _opened(stem, media, checked.faults) as (data, index, hashes):
                checked.faults.extend(_media_faults(data, index, hashes, media, checked.keys))
    except (
        OSError,
        DatasetError,
        ValueError,
    ) as error:  # ValueError: an empty file can't be mapped
        advice = (
            ""
            if stem.name == info.name
            else "; if its tar was moved or changed, index it again: tools.index"
        )
        checked.faults.append(f"{stem}: {error}{advice}")
    return checked


def _extensions(members: list[Member]) -> list[str]:
    return [split_member_name(member.name)[1] for member in members]


@contextmanager
def _opened(stem: Path, info: ShardInfo, faults: list[str]) -> Iterator[Opened]:
    """A shard's tar, index and hashes; `faults` hears where its files are not those of the
    manifest.
    """
    for suffix, digest in (IDX, info.idx_xxh3), (XXH3, info.xxh3_xxh3), (TAR, info.tar_xxh3):
        path = stem.with_name(info.name + suffix)
        if (found := file_xxh3(path)) != digest:
            faults.append(f"{path}: xxh3_128 is {found}, the manifest says {digest}")
    with (
        stem.with_name(info.name + TAR).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if len(data) != info.bytes:
            faults.append(f"{info.name}.tar: {len(data)} bytes, the manifest says {info.bytes}")
        index = decode_index(stem.with_name(info.name + IDX).read_bytes(), f"{info.name}.idx")
        yield (
            data,
            index,
            decode_hashes(stem.with_name(info.name + XXH3).read_bytes(), f"{info.name}.xxh3"),
        )


def _media_faults(
    data: mmap.mmap,
    index: list[list[Member]],
    hashes: dict[str, str],
    media: ShardInfo,
    keys: list[str],
) -> Iterator[str]:
    """The clips in a foreign tar: line i of its index is one clip, of sample i."""
    clips = [[split_member_name(member.name) for member in members] for members in index]
    if [[key] for key in keys] != [[key for key, _ in names] for names in clips]:
        yield (
            f"{media.name}.idx: its {len(index)} clips are not those of the {len(keys)} samples, "
            f"one each"
        )
    for member in (member for members in index for member in members):
        with memoryview(data) as view, view[member.offset : member.offset + member.size] as stored:
            if xxhash.xxh3_64_hexdigest(stored) != hashes.get(member.name):
                yield f"{media.name}.tar: {member.name}: its bytes don't match {media.name}.xxh3"


def _tar_faults(
    data: mmap.mmap, index: list[list[Member]], hashes: dict[str, str], info: ShardInfo
) -> Iterator[str]:
    """The tar, byte for byte, as write.py makes it from these members."""
    offset = 0
    for member in (member for members in index for member in members):
        header, padding = tar_header(member.name, member.size), bytes(-member.size % BLOCK_BYTES)
        if member.offset != offset + BLOCK_BYTES or data[offset : offset + BLOCK_BYTES] != header:
            place = f"{info.name}.tar: {member.name}"
            yield f"{place}: the header at byte {offset} is not that of this member"
        end = member.offset + member.size
        if data[end : end + len(padding)] != padding:
            yield f"{info.name}.tar: {member.name}: the padding after it is not zero"
        with memoryview(data) as view, view[member.offset : end] as stored:
            if xxhash.xxh3_64_hexdigest(stored) != hashes.get(member.name):
                yield f"{info.name}.tar: {member.name}: its bytes don't match {info.name}.xxh3"
        offset = end + len(padding)
    if data[offset:] != END:
        yield (
            f"{info.name}.tar: {len(data) - offset} bytes follow the last member, expected two "
            f"blocks of zeros"
        )
    names = [member.name for members in index for member in members]
    if list(hashes) != names:
        yield (
            f"{info.name}.xxh3: names {len(hashes)} members, the index {len(names)}, or in "
            f"another order"
        )
    if len(index) != info.num_samples:
        yield f"{info.name}.idx: {len(index)} samples, the manifest says {info.num_samples}"


def _sample_faults(
    data: mmap.mmap,
    members: list[Member],
    split: str,
    info: ShardInfo,
    layout: LatentLayout,
    checked: Checked,
    foreign: bool,
) -> Iterator[str]:
    """One sample against the format; a `foreign` one has its media elsewhere, and no latent."""
    key = split_member_name(members[0].name)[0]
    place = f"{info.name}.tar: {key}"
    stored = {}
    for member in members:
        member_key, extension = split_member_name(member.name)
        if member_key != key or extension not in MEMBERS or extension in stored:
            yield f"{place}: {member.name} does not belong into this sample"
        stored[extension] = data[member.offset : member.offset + member.size]
    if checked.keys and checked.keys[-1] >= key:
        yield f"{place}: comes after {checked.keys[-1]}, keys must ascend"
    checked.keys.append(key)
    try:
        meta = decode_meta(stored[JSON])
        checked.programmes.add(meta.programme)
        bucket = Bucket.parse(info.bucket)
        expected = sample_key(
            meta.media_xxh3, meta.clip_id, meta.shot, meta.start_ms, meta.bucket, meta.fps
        )
        if not key == meta.key == expected:
            yield f"{place}: its metadata say key {meta.key} and belong to key {expected}"
        if (meta.split, meta.bucket) != (split, bucket):
            yield f"{place}: a sample of {meta.split} {meta.bucket} in a shard of {split} {bucket}"
        latent_shape, text_shape = meta.latent.shape, meta.text.shape
        if latent_shape != (wanted := layout.latent_shape(bucket)):
            yield f"{place}.{LATENT}: shape {list(latent_shape)}, {bucket} has {list(wanted)}"
        if len(text_shape) != 2 or not 1 <= text_shape[0] <= MAX_TEXT_TOKENS:
            wanted_text = f"[1 to {MAX_TEXT_TOKENS}, text dimension]"
            yield f"{place}.{TEXT}: shape {list(text_shape)}, expected {wanted_text}"
        checked.text_dims.add(text_shape[-1])
        tensors = [(LATENT, meta.latent), (TEXT, meta.text)][foreign:]
        if CONDITION in stored:
            tensors.append((CONDITION, condition_info(stored[CONDITION], meta.latent)))
        for name, tensor in tensors:
            if not np.isfinite(decode_tensor(stored[name], tensor)).all():
                yield f"{place}.{name}: holds inf or NaN"
        if meta.media_type == "video" and JPG not in stored and not foreign:
            yield f"{place}: a video without {JPG}"
        yield from _picture_faults(stored, place, meta)
    except KeyError as error:
        yield f"{place}: has no member {error.args[0]}"
    except SampleError as error:
        yield f"{place}: {error}"


def _picture_faults(stored: dict[str, bytes], place: str, meta: SampleMeta) -> Iterator[str]:
    if JPG in stored:
        try:
            with Image.open(BytesIO(stored[JPG]), formats=["JPEG"]) as image:
                image.load()
                if image.size != (meta.width_px, meta.height_px):
                    size, wanted = (
                        f"{image.width}x{image.height}",
                        f"{meta.width_px}x{meta.height_px}",
                    )
                    yield f"{place}.{JPG}: {size}, expected {wanted}"
        except (OSError, SyntaxError) as error:
            yield f"{place}.{JPG}: does not decode: {error}"
    if MP4 in stored:
        with NamedTemporaryFile(suffix=".mp4") as file:
            file.write(stored[MP4])
            file.flush()
            try:
                found = probe(Path(file.name))
            except MediaError as error:
                yield f"{place}.{MP4}: {error}"
                return
        shape = f"{found.width_px}x{found.height_px}x{found.num_frames}"
        if shape != str(meta.bucket) or abs(found.fps - meta.fps) > 0.01:
            yield f"{place}.{MP4}: {shape} at {found.fps} fps, expected {meta.bucket} at {meta.fps}"


def verify_dataset(
    dataset: Path, num_workers: int, advance: Callable[[int], None]
) -> Iterator[str]:
    """Yield every fault of `dataset`; `advance` hears of shards done. Raises DatasetError without
    a manifest.
    """
    manifest = read_manifest(dataset)
    media = media_shards(manifest)
    shards = [
        (split, info, media.get(info.name))
        for split, infos in manifest.splits.items()
        for info in infos
    ]
    checked: dict[str, Checked] = {}
    for (_, info, _), result in run_local(
        partial(
            check_shard,
            dataset=dataset,
            layout=manifest.layout,
            has_condition=manifest.condition is not UNSET,
        ),
        shards,
        num_workers,
    ):
        if isinstance(result, Failure):
            yield f"{info.name}: {result}"
            continue
        checked[info.name] = result
        yield from result.faults
        advance(1)
    yield from check_across(dataset, manifest, checked)


def check_across(dataset: Path, manifest: Manifest, checked: dict[str, Checked]) -> Iterator[str]:
    """What only the whole shows: repeated keys, programmes on both sides, stray files, the empty
    prompt.
    """
    home: dict[str, str] = {}
    for name, shard in checked.items():
        for key in shard.keys:
            if home.setdefault(key, name) != name:
                yield f"key {key} is in {home[key]} and in {name}"
    sides = {
        split: set().union(
            *(checked[info.name].programmes for info in shards if info.name in checked)
        )
        for split, shards in manifest.splits.items()
    }
    for programme in sorted(sides.get("train", set()) & sides.get("val", set())):
        yield f"programme {programme!r} is on both sides of the split"
    dims = set().union(*(shard.text_dims for shard in checked.values()))
    if len(dims) > 1:
        yield f"text rows of different dimensions: {sorted(dims)}"
    media = media_shards(manifest)
    for split, shards in manifest.splits.items():
        known = {
            one.name + suffix
            for info in shards
            for one in (info, media.get(info.name, info))
            for suffix in (TAR, IDX, XXH3)
        }
        for path in sorted((dataset / split).glob("*")):
            if path.name not in known:
                yield f"{path}: is not in {MANIFEST_FILE}"
    try:
        data = (dataset / EMPTY_PROMPT_FILE).read_bytes()
        for dim in dims:
            decode_tensor(data, TensorInfo("float16", (1, dim)))
    except (OSError, SampleError) as error:
        yield f"{dataset / EMPTY_PROMPT_FILE}: {error}"
