"""What a shard holds: a line per sample, or all of one sample."""

import json
from collections.abc import Iterator
from pathlib import Path

from loader.manifest import decode_index
from loader.sample import (
    CONDITION,
    JSON,
    LATENT,
    TEXT,
    condition_info,
    decode_meta,
    decode_tensor,
    split_member_name,
)
from shardgen.encode.write import IDX, TAR


def inspect_shard(shard: Path, key: str | None = None) -> Iterator[str]:
    """Lines about the samples of SHARD.tar; with `key` all about those whose key begins so.

    Raises ValueError if no key does, or if a file is not what it should be; OSError.
    """
    path, index_path = shard.with_suffix(TAR), shard.with_suffix(IDX)
    index = decode_index(index_path.read_bytes(), str(index_path))
    found = False
    with path.open("rb") as tar:
        for members in index:
            stored = {}
            for member in members:
                tar.seek(member.offset)
                stored[split_member_name(member.name)[1]] = tar.read(member.size)
            meta = decode_meta(stored[JSON])
            if key is None:
                place = f"shot {meta.shot}  {meta.start_ms} ms  {meta.bucket}"
                yield f"{meta.key}  {meta.clip_id}  {place}  {meta.prompt}"
            elif meta.key.startswith(key):
                found = True
                yield from _all_of(stored)
    if key is not None and not found:
        raise ValueError(f"{path}: no sample has a key that begins with {key}")


def _all_of(stored: dict[str, bytes]) -> Iterator[str]:
    meta = decode_meta(stored[JSON])
    yield json.dumps(json.loads(stored[JSON]), ensure_ascii=False, indent=2)
    for name, data in stored.items():
        yield f"{meta.key}.{name}: {len(data)} bytes"
    tensors = [(LATENT, meta.latent), (TEXT, meta.text)]
    if CONDITION in stored:
        tensors.append((CONDITION, condition_info(stored[CONDITION], meta.latent)))
    for name, info in tensors:
        if name not in stored:  # in an index of foreign tars
            continue
        tensor = decode_tensor(stored[name], info).astype("float32")
        yield (
            f"{name}: shape {list(info.shape)}, mean {tensor.mean():.4f}, "
            f"deviation {tensor.std():.4f}, from {tensor.min():.4f} to {tensor.max():.4f}"
        )
