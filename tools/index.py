"""Train on webdataset tars as they are: `python -m tools.index TAR... --output DIR --model MODEL`.

A sample of such a tar is a `json` with a caption beside an `mp4` or a `jpg`; there are no
latents. The tars are read once and stay untouched. DIR becomes a dataset: its shards hold what
training needs and the tars lack (metadata, and the caption's embedding), and beside each lie a
link to its tar, a .idx with the place of every clip, and a .xxh3. In training (`data.condition =
"raw"`) DALI decodes the clips and the VAE encodes them, in every epoch again: `shardgen build`
does both once and better, so this is for trying out a set.

A clip gives its first `--frames` frames at its own frame rate, an image one. What does not have a
multiple of 32 (A14B, Wan2.1: 16) as width or height loses pixels at the edges; nothing is resized.
Not for I2V-A14B, which takes what a build has encoded. What can't be used is refused, by the rules
of a build and what else DALI can't show rightly, and counted by reason; each clip is decoded once
for that. Links hold absolute paths: after moving the tars, index them again; for another machine,
copy DIR with links followed (`cp -rL`, `rsync -L`).
"""

import argparse
import os
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import xxhash

from loader.files import file_xxh3, told, write_atomic
from loader.manifest import (
    MANIFEST_FILE,
    MEDIA,
    Manifest,
    Member,
    ShardInfo,
    Split,
    encode_hashes,
    encode_index,
    encode_manifest,
    make_manifest,
    shard_name,
)
from loader.models import read_kind
from loader.sample import (
    EMPTY_PROMPT_FILE,
    JPG,
    JSON,
    MP4,
    TEXT,
    SampleMeta,
    TensorInfo,
    encode_meta,
    encode_tensor,
    sample_key,
)
from loader.shape import WAN22, Bucket, LatentLayout
from shardgen.encode.text import EncodedText, TextEncoder
from shardgen.encode.write import write_shard
from shardgen.rules.prompt import prompt_clean
from tools.device import add_device
from tools.index_rules import RefusedError, examine_clip, examine_image


class Found(NamedTuple):
    """A usable sample of a tar: its metadata without the text's shape, and where its media lie."""

    meta: SampleMeta
    media: Member  # under our name for it, KEY.mp4 or KEY.jpg
    digest: str


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """(name, {extension: member}) of adjacent members, named as webdataset does: up to the first
    dot of the file name.

    Raises ValueError for what is no uncompressed tar, or a truncated one.
    """

    def split(member: tarfile.TarInfo) -> tuple[str, str]:
        folder, _, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        return f"{folder}/{stem}" if folder else stem, extension.lower().replace("jpeg", JPG)

    try:
        with tarfile.open(path, "r:") as tar:
            files = (member for member in tar if member.isreg() and not member.issparse())
            for name, members in groupby(files, key=lambda member: split(member)[0]):
                yield name, {split(m)[1]: Member(m.name, m.offset_data, m.size) for m in members}
    except (tarfile.TarError, OverflowError) as error:  # a length that no machine has
        raise ValueError(
            f"{path}: not a plain, whole tar file: {error}; unpack .tar.gz first"
        ) from error


def examine(
    name: str,
    members: Mapping[str, Member],
    tar: Path,
    split: Split,
    caption_field: str,
    num_frames: int,
    layout: LatentLayout,
) -> Found:
    """Metadata of one sample. Raises RefusedError."""
    # of other bytes tarfile makes lone surrogates
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise RefusedError("its name is not UTF-8")
    kind = next((kind for kind in (MP4, JPG) if kind in members), None)
    if JSON not in members or kind is None:
        raise RefusedError("no json" if JSON not in members else "neither mp4 nor jpg")
    with tar.open("rb") as file:
        about, data = (
            os.pread(file.fileno(), m.size, m.offset) for m in (members[JSON], members[kind])
        )
    try:
        fields = msgspec.json.decode(about)
    except msgspec.DecodeError:
        raise RefusedError("its json can't be read") from None
    caption = fields.get(caption_field) if isinstance(fields, dict) else None
    prompt = prompt_clean(caption) if isinstance(caption, str) else ""
    if not prompt:
        raise RefusedError(f'no text under "{caption_field}" in its json')
    side_px = layout.patch_px
    width, height, fps = (
        examine_clip(data, num_frames, side_px) if kind == MP4 else (*examine_image(data), 0.0)
    )
    if min(width, height) < side_px:
        raise RefusedError(f"smaller than {side_px}x{side_px}")
    num_shown = num_frames if kind == MP4 else 1
    bucket = Bucket(width - width % side_px, height - height % side_px, num_shown)
    media_xxh3 = xxhash.xxh3_128_hexdigest(data)
    key = sample_key(media_xxh3, name, 0, 0, bucket, fps)
    meta = SampleMeta(
        key=key,
        clip_id=name,
        label=f"{tar.name}/{members[JSON].name}",
        category="",
        programme=tar.stem,
        media_type="video" if kind == MP4 else "image",
        split=split,
        prompt=prompt,
        fps=fps,
        start_ms=0,
        width_px=bucket.width_px,
        height_px=bucket.height_px,
        num_frames=bucket.num_frames,
        shot=0,
        media_xxh3=media_xxh3,
        latent=TensorInfo("float16", layout.latent_shape(bucket)),
        text=TensorInfo("float16", (0, 0)),
    )
    media = Member(f"{key}.{kind}", members[kind].offset, members[kind].size)
    return Found(meta, media, xxhash.xxh3_64_hexdigest(data))


def check_inputs(
    tars: Sequence[Path], output: Path, num_frames: int, layout: LatentLayout = WAN22
) -> None:
    """What can be seen to fail before a model is loaded. Raises ValueError for an output that is a
    dataset already and for frames that the model doesn't take, OSError for tars that can't be read.
    """
    if (output / MANIFEST_FILE).exists():
        raise ValueError(f"{output} is a dataset already; take another folder")
    layout.check(Bucket(layout.patch_px, layout.patch_px, num_frames))
    for tar in tars:
        tar.open("rb").close()


def write_index(
    tars: Sequence[Path],
    output: Path,
    encoder: TextEncoder,
    *,
    split: Split = "train",
    caption_field: str = "caption",
    num_frames: int = 49,
    layout: LatentLayout = WAN22,
) -> tuple[Manifest, Counter[str]]:
    """Write the dataset `output`; returns its manifest and how many samples were refused, by
    reason.

    Raises ValueError for an output that is a dataset already, for tars that can't be read, and
    for samples that repeat.
    """
    check_inputs(tars, output, num_frames, layout)
    refused: Counter[str] = Counter()
    shards: list[ShardInfo] = []
    media: dict[str, ShardInfo] = {}
    sources: dict[str, str] = {}
    for tar in sorted(tars):
        by_bucket: defaultdict[Bucket, list[Found]] = defaultdict(list)
        for name, members in tar_samples(tar):
            try:
                found = examine(name, members, tar, split, caption_field, num_frames, layout)
            except RefusedError as error:
                refused[error.reason] += 1
                continue
            key, source = found.meta.key, f"{name} in {tar}"
            if key in sources:
                raise ValueError(
                    f"{source} is the same sample as {sources[key]}; leave one of them out"
                )
            sources[key] = source
            by_bucket[found.meta.bucket].append(found)
        tar_hash = file_xxh3(tar) if by_bucket else ""
        for bucket, samples in sorted(by_bucket.items()):
            samples.sort(key=lambda found: found.meta.key)
            name = shard_name(split, bucket, sum(shard.bucket == str(bucket) for shard in shards))
            folder = output / split
            shards.append(write_shard(folder, name, str(bucket), _with_text(samples, encoder)))
            idx = encode_index([[found.media] for found in samples])
            hashes = encode_hashes([(found.digest, found.media.name) for found in samples])
            write_atomic(folder / f"{name}.media.idx", idx)
            write_atomic(folder / f"{name}.media.xxh3", hashes)
            link = folder / f"{name}.media.tar"
            link.unlink(missing_ok=True)  # of a run that was interrupted
            link.symlink_to(tar.resolve())
            media[name] = ShardInfo(
                name=f"{name}.media",
                bucket=str(bucket),
                num_samples=len(samples),
                bytes=tar.stat().st_size,
                tar_xxh3=tar_hash,
                idx_xxh3=xxhash.xxh3_128_hexdigest(idx),
                xxh3_xxh3=xxhash.xxh3_128_hexdigest(hashes),
            )
    recipe: dict[str, Any] = {
        "caption_field": caption_field,
        "num_frames": num_frames,
        MEDIA: {name: msgspec.to_builtins(info) for name, info in media.items()},
    }
    manifest = make_manifest(recipe, {split: shards}, layout=layout)
    if shards:
        write_atomic(output / EMPTY_PROMPT_FILE, encode_tensor(_encode([""], encoder)[""].rows))
        write_atomic(output / MANIFEST_FILE, encode_manifest(manifest))
    return manifest, refused


def _with_text(
    samples: Sequence[Found], encoder: TextEncoder
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for start in range(0, len(samples), 64):  # a shard's texts together may fill the memory
        some = samples[start : start + 64]
        texts = _encode([found.meta.prompt for found in some], encoder)
        for found in some:
            rows = texts[found.meta.prompt].rows
            meta = msgspec.structs.replace(found.meta, text=TensorInfo("float16", rows.shape))
            yield meta.key, {JSON: encode_meta(meta), TEXT: encode_tensor(rows)}


def _encode(prompts: Sequence[str], encoder: TextEncoder) -> dict[str, EncodedText]:
    """Those on which float16 saturates in float32, which is said."""
    texts, saturated = encoder.encode(prompts, 16)
    if saturated:
        print(
            f"tools.index: float16 overflows on {len(saturated)} prompts, which are encoded in "
            f"float32: {saturated[0][:80]!r}, ...",
            file=sys.stderr,
        )
        # a card may hold one of the two
        exact, place = encoder.in_float32(), encoder.model.device
        encoder.model.to("cpu")
        exact.model.to(place)
        texts |= exact.encode(saturated, 16).texts
        exact.model.to("cpu")
        encoder.model.to(place)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tars", nargs="+", type=Path, metavar="TAR")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder, for its UMT5")
    parser.add_argument("--frames", type=int, default=49, help="of each clip; 4n+1")
    parser.add_argument("--caption", default="caption", help="the caption's field in the json")
    parser.add_argument("--split", choices=["train", "val"], default="train")
    add_device(parser)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    try:
        kind = read_kind(arguments.model)
        if kind.condition:
            raise ValueError(f"{kind.name} takes what `shardgen build` alone stores; use that")
        check_inputs(arguments.tars, arguments.output, arguments.frames, kind.layout)
        encoder = TextEncoder(arguments.model, arguments.device, getattr(torch, arguments.dtype))
        encoder.model.to(arguments.device)
        manifest, refused = write_index(
            arguments.tars,
            arguments.output,
            encoder,
            split=arguments.split,
            caption_field=arguments.caption,
            num_frames=arguments.frames,
            layout=kind.layout,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"tools.index: {told(error)}") from error
    num = sum(shard.num_samples for shard in manifest.splits[arguments.split])
    print(f"{arguments.output}: {num} samples of {num + refused.total()}")
    for reason, count in refused.most_common():
        print(f"  refused, {reason}: {count}")
    if num == 0:
        raise SystemExit("tools.index: nothing to train on, no dataset written")


if __name__ == "__main__":
    main()
