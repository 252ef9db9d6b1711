"""THE CONTRACT: what one sample is. Names, metadata, key and tensor codec; torch-free, so that
any tool can use it.

A sample is a run of adjacent members in a tar, all named by one key:

    KEY.json         SampleMeta, first
    KEY.latent.zst   fp16 [C, T, h, w] (Wan2.2: [48, (F-1)/4+1, H/16, W/16]), posterior mean of the
                     VAE, normalised
    KEY.condition.zst  fp16 [Cc, T, h, w], stored like a latent; only where a model concatenates
                     to its input what can't be derived in training (the manifest says its meaning)
    KEY.text.zst     fp16 [num_tokens, 4096], UMT5 rows of the real tokens
    KEY.jpg          the first frame at the bucket's size (videos)
    KEY.mp4          the transcoded clip, only where the recipe asks for it

Tensors are stored as two byte planes (all high bytes, then all low bytes) because the high bytes
of fp16 noise are far more alike than its low ones: zstd then packs better and decodes faster.
`decode_planes` hands the planes over as they are, to be merged on the device; `decode_tensor`
merges them here.
"""

import math
import re
from typing import Any, Literal

import msgspec
import numpy as np
import xxhash
import zstandard

from loader.shape import Bucket

FORMAT_VERSION = 1
JSON, LATENT, CONDITION, TEXT = "json", "latent.zst", "condition.zst", "text.zst"
JPG, MP4 = "jpg", "mp4"
MEMBERS = (JSON, LATENT, CONDITION, TEXT, JPG, MP4)  # their order inside a sample
MAX_TEXT_TOKENS = 512
EMPTY_PROMPT_FILE = "empty_prompt.text.zst"

_KEY = re.compile(r"[0-9a-f]{32}")


class SampleError(ValueError):
    """A member that is damaged, missing or not what its metadata says; the message names key and
    member.
    """


def is_bt709(width_px: int, height_px: int) -> bool:
    """What players assume of a video that states no colour matrix; if not, it is BT.601."""
    return height_px > 576 or width_px >= 1280


class TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a tensor member holds: numpy dtype name (always "float16" in version 1) and shape."""

    dtype: str
    shape: tuple[int, ...]


class SampleMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KEY.json. `label` is the label file's path relative to the label root; `shot` is 0-based in
    time order.
    """

    format_version: int = FORMAT_VERSION
    key: str
    clip_id: str
    label: str
    media_type: Literal["video", "image"]
    category: str
    programme: str
    split: Literal["train", "val"]
    prompt: str
    width_px: int
    height_px: int
    num_frames: int
    fps: float
    start_ms: int
    shot: int
    media_xxh3: str
    latent: TensorInfo
    text: TensorInfo

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.width_px, self.height_px, self.num_frames)


def sample_key(
    media_xxh3: str, clip_id: str, shot: int, start_ms: int, bucket: Bucket, fps: float
) -> str:
    """xxh3_128 hex of "media_xxh3/clip_id/shot/start_ms/WxHxF/fps", numbers as KEY.json writes
    them (24 fps: 24.0).
    """
    fps_text = msgspec.json.encode(float(fps)).decode()
    return xxhash.xxh3_128_hexdigest(
        f"{media_xxh3}/{clip_id}/{shot}/{start_ms}/{bucket}/{fps_text}".encode()
    )


def split_member_name(name: str) -> tuple[str, str]:
    """ "KEY.latent.zst" -> ("KEY", "latent.zst"): at the first dot, as webdataset does."""
    key, _, extension = name.partition(".")
    return key, extension


def encode_meta(meta: SampleMeta) -> bytes:
    """KEY.json as stored: one line of UTF-8 JSON, keys in the Struct's order."""
    return msgspec.json.encode(meta)


_meta_decoder = msgspec.json.Decoder(SampleMeta)


def decode_meta(data: bytes | memoryview) -> SampleMeta:
    """Read KEY.json. Raises SampleError if it is not version 1 of the format."""
    try:
        meta = _meta_decoder.decode(data)
        version = meta.format_version
    except msgspec.MsgspecError as error:
        version = _version_of(data)
        if version == FORMAT_VERSION:
            raise SampleError(f"{JSON} member: {error}") from error
    if version != FORMAT_VERSION:
        raise SampleError(
            f"{JSON} member: format_version {version}, this program reads version "
            f"{FORMAT_VERSION}; update newsreel, or build the dataset anew"
        )
    if _KEY.fullmatch(meta.key) is None:
        raise SampleError(f"{JSON} member: key {meta.key!r} is not 32 hexadecimal digits")
    return meta


class _Version(msgspec.Struct):
    """Of any KEY.json, older or newer: all other fields are ignored."""

    format_version: int = FORMAT_VERSION


def _version_of(data: bytes | memoryview) -> int:
    try:
        return msgspec.json.decode(data, type=_Version).format_version
    except msgspec.MsgspecError:
        return FORMAT_VERSION  # too damaged to say: the strict decoder's message is the better one


def encode_tensor(array: np.ndarray[Any, Any], level: int = 3) -> bytes:
    """Pack a float16 array of any shape into one zstd frame of two byte planes, with content size
    and checksum.

    The bytes are a function of (array, level, zstandard version). Raises SampleError for another
    dtype or for values that are not finite.
    """
    if array.dtype != np.float16:
        raise SampleError(f"tensor members hold float16, not {array.dtype}")
    if not np.isfinite(array).all():
        raise SampleError("a tensor holds inf or NaN: the encoder overflowed float16")
    bytes_N2 = array.reshape(-1).astype("<f2", copy=False).view(np.uint8).reshape(-1, 2)
    planes = bytes_N2.T[::-1].tobytes()  # little-endian: the high byte is the second
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=True)
    return compressor.compress(planes)


def decode_planes(data: bytes | memoryview, info: TensorInfo) -> bytearray:
    """Unpack a tensor member to 2*n bytes: n high bytes, then n low bytes. Raises SampleError
    when it is damaged.
    """
    planes = bytearray(2 * math.prod(info.shape))
    decode_planes_into(data, info, memoryview(planes))
    return planes


def decode_planes_into(data: bytes | memoryview, info: TensorInfo, out: memoryview) -> None:
    """`decode_planes` into memory of exactly that size, for example pinned. Raises SampleError
    when it is damaged.
    """
    if info.dtype != "float16":
        raise SampleError(
            f"a tensor member says dtype {info.dtype}; version {FORMAT_VERSION} holds float16 only"
        )
    try:
        size, expected = zstandard.frame_content_size(data), 2 * math.prod(info.shape)
        if size != expected:
            raise SampleError(
                f"a tensor member of shape {list(info.shape)} must hold {expected} bytes, its zstd "
                f"frame says {size}"
            )
        # a stream, because decompress() would allocate megabytes anew for each sample
        with zstandard.ZstdDecompressor().stream_reader(data) as stream:
            if stream.readinto(out) != len(out):
                raise SampleError("a tensor member's zstd frame is cut short")
            if stream.read(1):
                raise SampleError("a tensor member's zstd frame holds more than it says")
    except zstandard.ZstdError as error:
        raise SampleError(f"a tensor member does not decompress: {error}") from error


def condition_info(data: bytes | memoryview, latent: TensorInfo) -> TensorInfo:
    """What a KEY.condition.zst holds: float16 [Cc, T, h, w] on the latent's grid, with as many
    channels as its bytes make. Raises SampleError when they make no whole channel.
    """
    grid = latent.shape[1:]
    try:
        num_bytes = zstandard.frame_content_size(data)
    except zstandard.ZstdError as error:
        raise SampleError(f"a tensor member does not decompress: {error}") from error
    num_channels, rest = divmod(num_bytes, 2 * math.prod(grid))
    if rest or num_channels < 1:
        raise SampleError(
            f"{CONDITION} holds {num_bytes} bytes, no whole number of channels of {list(grid)}"
        )
    return TensorInfo("float16", (num_channels, *grid))


def without_checksum(frame: memoryview) -> memoryview:
    """A zstd frame as one without checksum, for bytes that the .xxh3 has vouched for: a tenth of
    a sample's CPU time.

    Writes to the frame; one that can't be written to stays as it is.
    """
    # RFC 8878: the flag of the 4 bytes at the frame's end
    if frame.readonly or len(frame) < 9 or not frame[4] & 4:
        return frame
    frame[4] &= ~4
    return frame[:-4]


def decode_tensor(data: bytes | memoryview, info: TensorInfo) -> np.ndarray[Any, Any]:
    """Unpack a tensor member to a float16 array of `info.shape`. Raises SampleError when it is
    damaged.
    """
    high, low = np.frombuffer(decode_planes(data, info), np.uint8).reshape(2, *info.shape)
    return (high * np.uint16(256) | low).view(np.float16)
