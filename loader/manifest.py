"""THE CONTRACT: what a dataset folder is. manifest.json, and the .idx and .xxh3 beside each
shard; torch-free.

`manifest.json` is written last and by rename: a folder that has one is complete. It names every
shard with its bucket and the xxh3_128 of its three files, holds no timestamps, and is the only
file a reader needs in order to know the sequence of samples of any epoch.

An index of foreign tars (tools/index.py) is a dataset whose samples hold no latent: their media
stay in the foreign tar, which `NAME.media.tar` links to, with a .idx and .xxh3 of its own whose
line i belongs to sample i of `NAME`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import xxhash
from msgspec import UNSET, UnsetType

from loader.files import cause_of
from loader.sample import split_member_name
from loader.shape import WAN22, Bucket, LatentLayout

MANIFEST_FILE = "manifest.json"
VERSION_WITH_LAYOUT = 2  # version 1 says nothing of the layout: it is the Wan2.2 VAE's
MEDIA = "media"  # in a recipe: the ShardInfo of each shard's foreign media, by the shard's name
Split = Literal["train", "val"]


class DatasetError(ValueError):
    """A dataset folder or shard that can't be used; the message names the file, the fault and what
    to do.
    """


class ShardInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One shard. `name` has no suffix ("train-1280x704x49-000000"); `bytes` is the size of the
    .tar.
    """

    name: str
    bucket: str
    num_samples: int
    bytes: int
    tar_xxh3: str
    idx_xxh3: str
    xxh3_xxh3: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json; made by `make_manifest`. `recipe` is what decided the bytes (models, rules,
    shapes); `recipe_id` is its xxh3_128.

    Version 2 adds `latent_layout`, and where samples have a member KEY.condition.zst, what that
    one means (`condition`, for example "first_frame_and_grey"). Unset fields are not written.
    """

    recipe: dict[str, Any]
    recipe_id: str
    splits: dict[Split, list[ShardInfo]]
    format_version: int = 1
    latent_layout: LatentLayout | UnsetType = UNSET
    condition: str | UnsetType = UNSET

    @property
    def layout(self) -> LatentLayout:
        """The layout of every latent in the dataset."""
        return WAN22 if self.latent_layout is UNSET else self.latent_layout


class _Version(msgspec.Struct):
    """Of any manifest, older or newer: all other fields are ignored."""

    format_version: int = 1


class Member(NamedTuple):
    """Where a member's bytes lie inside the .tar."""

    name: str
    offset: int
    size: int


def shard_name(split: str, bucket: Bucket, number: int) -> str:
    """SPLIT-WIDTHxHEIGHTxFRAMES-NUMBER; the split is in the name because caches go by file name."""
    return f"{split}-{bucket}-{number:06d}"


def recipe_id(recipe: dict[str, Any]) -> str:
    """xxh3_128 hex of the recipe as compact JSON with sorted keys."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(recipe, order="sorted"))


def make_manifest(
    recipe: dict[str, Any],
    splits: dict[Split, list[ShardInfo]],
    *,
    layout: LatentLayout = WAN22,
    condition: str = "",
    version: int = 1,
) -> Manifest:
    """A manifest of `version`, or of version 2 if what it says needs that. The version is no part
    of the recipe's identity.
    """
    manifest = Manifest(recipe=recipe, recipe_id=recipe_id(recipe), splits=splits)
    if version < VERSION_WITH_LAYOUT and layout == WAN22 and not condition:
        return manifest
    return msgspec.structs.replace(
        manifest,
        format_version=VERSION_WITH_LAYOUT,
        latent_layout=layout,
        condition=condition or UNSET,
    )


def media_shards(manifest: Manifest) -> dict[str, ShardInfo]:
    """Where the media of each shard lie; empty unless the dataset is an index of foreign tars."""
    return msgspec.convert(manifest.recipe.get(MEDIA, {}), dict[str, ShardInfo])


def encode_manifest(manifest: Manifest) -> bytes:
    """manifest.json as stored: indented UTF-8 JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def read_manifest(dataset: Path) -> Manifest:
    """Read and check `dataset`/manifest.json. Raises DatasetError."""
    path = dataset / MANIFEST_FILE
    return load_manifest(path.read_bytes, str(path))


def load_manifest(read: Callable[[], bytes], name: str) -> Manifest:
    """Check the manifest whose bytes `read` fetches from wherever; `name` is for messages. Raises
    DatasetError.
    """
    try:
        data = read()
        # first the version alone: what a newer one adds must not read as a fault of the file
        version = msgspec.json.decode(data, type=_Version).format_version
        if not 1 <= version <= VERSION_WITH_LAYOUT:
            raise DatasetError(
                f"{name}: format_version {version}, this program reads versions 1 to "
                f"{VERSION_WITH_LAYOUT}; update newsreel, or build the dataset anew"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{name}: no manifest; a dataset is complete once `shardgen build` has written "
            f"one; run it again, it goes on where it stopped"
        ) from error
    except OSError as error:
        raise DatasetError(f"{name}: {cause_of(error)}") from error
    except msgspec.MsgspecError as error:
        raise DatasetError(
            f"{name}: {cause_of(error)}; the file is cut off or damaged, copy it anew"
        ) from error
    has_layout = manifest.latent_layout is not UNSET
    if has_layout != (version == VERSION_WITH_LAYOUT) or (manifest.condition and not has_layout):
        raise DatasetError(
            f"{name}: format_version {version} goes {'with' if not has_layout else 'without'} "
            f"latent_layout: the file was edited or damaged"
        )
    if manifest.recipe_id != recipe_id(manifest.recipe):
        raise DatasetError(
            f"{name}: recipe_id does not match the recipe: the file was edited or damaged"
        )
    for shards in manifest.splits.values():
        for shard in shards:
            try:
                manifest.layout.parse(shard.bucket)
            except ValueError as error:
                raise DatasetError(f"{name}: shard {shard.name}: {error}") from error
    return manifest


def encode_index(samples: list[list[Member]]) -> bytes:
    """The .idx of a shard: DALI's "v1.2" text, a line per sample of `ext offset size name`
    quadruples.
    """
    lines = [f"v1.2 {len(samples)}"]
    for members in samples:
        lines.append(
            " ".join(
                f"{split_member_name(m.name)[1]} {m.offset} {m.size} {m.name}" for m in members
            )
        )
    return ("\n".join(lines) + "\n").encode()


def decode_index(data: bytes, name: str) -> list[list[Member]]:
    """Read a .idx: per sample its members in tar order. `name` is for messages. Raises
    DatasetError.
    """
    lines = data.decode("utf-8", errors="replace").splitlines()
    header = lines[0].split() if lines else []
    if len(header) != 2 or header[0] != "v1.2" or header[1] != str(len(lines) - 1):
        raise DatasetError(
            f"{name}: not a complete DALI index of version v1.2; its first line is {lines[:1]} and "
            f"{max(len(lines) - 1, 0)} lines follow"
        )
    samples = []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split(" ")
        try:
            samples.append(
                [
                    Member(words[i + 3], int(words[i + 1]), int(words[i + 2]))
                    for i in range(0, len(words), 4)
                ]
            )
        except (ValueError, IndexError) as error:
            raise DatasetError(f"{name}: line {number} is damaged: {line[:80]!r}") from error
    return samples


def encode_hashes(hashes: list[tuple[str, str]]) -> bytes:
    """The .xxh3 of a shard: per member in tar order "xxh3_64-hex  name", as `xxhsum` prints it."""
    return "".join(f"{digest}  {name}\n" for digest, name in hashes).encode()


def decode_hashes(data: bytes, name: str) -> dict[str, str]:
    """Read a .xxh3: member name -> xxh3_64 hex of its stored bytes. Raises DatasetError."""
    hashes: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
        digest, separator, member = line.partition("  ")
        if not separator or len(digest) != 16 or member in hashes:
            raise DatasetError(f"{name}: line {number} is damaged: {line[:80]!r}")
        hashes[member] = digest
    return hashes
