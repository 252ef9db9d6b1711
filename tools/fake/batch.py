"""A dataset of random tensors in the exact shard format: for benchmarks and tests of the loader,
never for training.

    python -m tools.fake.batch DIR --bucket 1280x704x49=64 --bucket 832x480x9=256 --text-dim 4096

Latents are Gaussian, as real ones nearly are, so they compress alike; captions have as many
tokens as real ones tend to. Keys, prompts and the frame in KEY.jpg differ from sample to sample;
`--mp4 CLIP` stores that clip in its place (of several each in its turn). Equal arguments give
equal bytes, and tensors and keys don't depend on the clips.
"""

import argparse
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from loader.files import write_atomic
from loader.manifest import (
    MANIFEST_FILE,
    Manifest,
    ShardInfo,
    Split,
    encode_manifest,
    make_manifest,
    shard_name,
)
from loader.sample import (
    CONDITION,
    EMPTY_PROMPT_FILE,
    JPG,
    JSON,
    LATENT,
    MP4,
    TEXT,
    SampleMeta,
    TensorInfo,
    encode_meta,
    encode_tensor,
    sample_key,
)
from loader.shape import WAN22, Bucket, LatentLayout
from shardgen.encode.write import write_shard


def write_synthetic_dataset(
    folder: Path,
    buckets: Mapping[str, int],
    *,
    samples_per_shard: int = 16,
    text_dim: int = 32,
    split: Split = "train",
    seed: int = 0,
    clips: Sequence[bytes] = (),
    layout: LatentLayout = WAN22,
    condition: str = "",
) -> Manifest:
    """Write a dataset with so many samples of each bucket ("160x96x9": 24) and return its manifest.
    condition: of the manifest, and then each sample holds one.

    Videos hold a KEY.jpg, or one of `clips` as KEY.mp4, whose size is the caller's to match.
    """
    shards: list[ShardInfo] = []
    for name, num_samples in buckets.items():
        bucket = layout.parse(name)
        keys = sorted(
            sample_key(f"{seed:032x}", f"{i:07d}", 0, 0, bucket, 24.0) for i in range(num_samples)
        )
        for number, start in enumerate(range(0, num_samples, samples_per_shard)):
            samples = _samples(
                keys[start : start + samples_per_shard],
                bucket,
                layout,
                text_dim,
                split,
                clips,
                bool(condition),
            )
            shards.append(
                write_shard(folder / split, shard_name(split, bucket, number), name, samples)
            )
    recipe = {"synthetic": dict(buckets), "text_dim": text_dim, "seed": seed}
    manifest = make_manifest(recipe, {split: shards}, layout=layout, condition=condition)
    write_atomic(folder / EMPTY_PROMPT_FILE, encode_tensor(np.full((1, text_dim), 0.5, np.float16)))
    write_atomic(folder / MANIFEST_FILE, encode_manifest(manifest))
    return manifest


def _samples(
    keys: list[str],
    bucket: Bucket,
    layout: LatentLayout,
    text_dim: int,
    split: Split,
    clips: Sequence[bytes],
    has_condition: bool,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for i, key in enumerate(keys):
        rng = np.random.default_rng(int(key, 16))
        latent = rng.standard_normal(layout.latent_shape(bucket), np.float32).astype(np.float16)
        text = rng.standard_normal((int(rng.integers(60, 260)), text_dim), np.float32).astype(
            np.float16
        )
        meta = SampleMeta(
            key=key,
            clip_id=key[:7],
            label=f"synthetic/{key}.json",
            category="synthetic",
            programme=key[:5],
            media_type="video" if bucket.num_frames > 1 else "image",
            split=split,
            prompt=f"A synthetic sample, {key}.",
            width_px=bucket.width_px,
            height_px=bucket.height_px,
            num_frames=bucket.num_frames,
            fps=24.0,
            start_ms=0,
            shot=0,
            media_xxh3=key,
            latent=TensorInfo("float16", latent.shape),
            text=TensorInfo("float16", text.shape),
        )
        members = {
            JSON: encode_meta(meta),
            LATENT: encode_tensor(latent),
            TEXT: encode_tensor(text),
        }
        if has_condition:
            given = rng.standard_normal(layout.latent_shape(bucket), np.float32)
            members[CONDITION] = encode_tensor(given.astype(np.float16))
        if bucket.num_frames > 1:
            members |= {MP4: clips[i % len(clips)]} if clips else {JPG: synthetic_jpeg(rng, bucket)}
        yield key, members


def synthetic_jpeg(rng: np.random.Generator, bucket: Bucket) -> bytes:
    """Random soft colours at the bucket's size, compressed as shardgen does it."""
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 10, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture = coarse.resize((bucket.width_px, bucket.height_px), PIL.Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--bucket", action="append", required=True, metavar="WIDTHxHEIGHTxFRAMES=SAMPLES"
    )
    parser.add_argument("--samples-per-shard", type=int, default=64)
    parser.add_argument("--text-dim", type=int, default=4096)
    parser.add_argument("--mp4", action="append", default=[], type=Path, metavar="CLIP")
    arguments = parser.parse_args()
    buckets = {
        name: int(num) for name, _, num in (bucket.partition("=") for bucket in arguments.bucket)
    }
    manifest = write_synthetic_dataset(
        arguments.folder,
        buckets,
        text_dim=arguments.text_dim,
        samples_per_shard=arguments.samples_per_shard,
        clips=[clip.read_bytes() for clip in arguments.mp4],
    )
    num_bytes = sum(shard.bytes for shard in manifest.splits["train"])
    print(f"{arguments.folder}: {sum(buckets.values())} samples, {num_bytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
