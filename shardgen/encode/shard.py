"""The unit of work: one planned shard in, one written shard out, a pure function of plan, media
and recipe.

Each clip is decoded once for all its windows in the shard, ahead of the encoder and in parallel.
One model is on the device at a time: all latents of the shard, then all its texts, where equal
prompts are encoded once. Batches are cut from the plan, never from what a cache or a killed run
left, because float16 results depend on the batch they are computed in (measured).

The medium is hashed before it is decoded. So a MediaError is a fact about the planned bytes, the
same in every run, and its windows are left out under that reason; a file that is gone or has
changed is an error that ends the shard, and a later run may do better.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loader.files import file_xxh3, write_atomic
from loader.mp4 import encode_mp4
from loader.sample import (
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
)
from loader.shape import Bucket
from shardgen.catalog.rows import LostWindow, WindowFlag
from shardgen.encode.encoders import load_encoders
from shardgen.encode.unit import EncodeSpec, ShardJob, ShardResult
from shardgen.encode.write import write_shard
from shardgen.media.decode import Frames, decode_windows
from shardgen.media.errors import MediaError
from shardgen.media.pictures import encode_jpeg, window_faults
from shardgen.rules.windows import Window


class EncodeError(ValueError):
    """A shard can't be encoded now; the message names the shard, the file and how to fix it."""


class Decoded(NamedTuple):
    """A window out of its clip: uint8 [F, H, W, 3] and the picture members made from it, or why
    there are none.
    """

    window: Window
    frames: Frames
    pictures: dict[str, bytes]
    faults: list[str]
    error: MediaError | None = None


def encode_shard(job: ShardJob, spec: EncodeSpec, decode_threads: int = 2) -> ShardResult:
    """Encode and write one shard. Raises EncodeError, TextError, VAEError or OSError; then
    nothing is in place.
    """
    plan, encoders = job.plan, load_encoders(spec)
    members: dict[str, dict[str, bytes]] = {}
    latents: list[tuple[Window, TensorInfo]] = []
    lost: list[LostWindow] = []
    flags: list[WindowFlag] = []

    def encode_batch(batch: list[Decoded]) -> None:
        encoded = encoders.encode_video([decoded.frames for decoded in batch])
        for decoded, latent in zip(batch, encoded, strict=True):
            packed = encode_tensor(latent, spec.zstd_level)
            members[decoded.window.key] = {**decoded.pictures, LATENT: packed}
            latents.append((decoded.window, TensorInfo("float16", latent.shape)))

    # All latents first, then all texts: the device holds one model at a time.
    with encoders.on_device(encoders.vae):
        batch: list[Decoded] = []
        for decoded in _decode_ahead(job, spec, decode_threads):
            key = decoded.window.key
            if decoded.error is not None:
                lost.append(LostWindow(key, decoded.error.reason, decoded.error.detail))
                continue
            flags += [WindowFlag(key, fault) for fault in decoded.faults]
            batch.append(decoded)
            if len(batch) == spec.vae_batch:
                encode_batch(batch)
                batch = []
        if batch:
            encode_batch(batch)

    texts = encoders.encode_text([window.prompt for window, _ in latents], spec.text_batch)
    for window, latent_info in latents:
        text = texts[window.prompt]
        if text.truncated:
            flags.append(WindowFlag(window.key, "prompt_truncated"))
        text_info = TensorInfo("float16", text.rows.shape)
        meta = _meta(window, Bucket.parse(plan.bucket), latent_info, text_info)
        members[window.key] |= {
            TEXT: encode_tensor(text.rows, spec.zstd_level),
            JSON: encode_meta(meta),
        }

    info = None
    if members:
        folder = Path(spec.output) / plan.split
        info = write_shard(folder, plan.name, plan.bucket, sorted(members.items()))
    return ShardResult(plan.name, info, lost, flags)


def encode_empty_prompt(spec: EncodeSpec) -> None:
    """Write empty_prompt.text.zst: the rows of the prompt "", one zstd frame as in a sample."""
    rows = load_encoders(spec).encode_text([""], 1)[""].rows
    write_atomic(Path(spec.output) / EMPTY_PROMPT_FILE, encode_tensor(rows, spec.zstd_level))


def _decode_ahead(job: ShardJob, spec: EncodeSpec, num_threads: int) -> Iterator[Decoded]:
    """Every window of the plan, clip by clip in an order that only the plan decides;
    `num_threads` clips ahead.
    """
    # Windows by medium: each is decoded once, in one pass.
    clips: dict[str, list[Window]] = {}
    for window in sorted(
        job.plan.windows, key=lambda window: (window.media_xxh3, window.start_ms, window.key)
    ):
        clips.setdefault(window.media_xxh3, []).append(window)
    with ThreadPoolExecutor(num_threads) as pool:
        # Results are taken in the order of the plan, whichever clip is ready first: batches must
        # not depend on the speed of a disk.
        waiting: deque[Future[list[Decoded]]] = deque()
        for windows in clips.values():
            waiting.append(pool.submit(_decode_clip, job, spec, windows))
            if len(waiting) > num_threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _decode_clip(job: ShardJob, spec: EncodeSpec, windows: list[Window]) -> list[Decoded]:
    """All windows of one medium, in one pass. Raises EncodeError if the file is not the planned
    one.
    """
    expected = windows[0].media_xxh3
    path, bucket = Path(job.media[expected]), Bucket.parse(job.plan.bucket)
    # Whatever is decoded below must be the bytes that were planned.
    try:
        found = file_xxh3(path)
    except OSError as error:
        raise EncodeError(
            f"{job.plan.name}: {path} can't be read: {error.strerror}; make it readable and run "
            f"the build again"
        ) from error
    if found != expected:
        raise EncodeError(
            f"{job.plan.name}: {path} has changed since it was planned (its xxh3_128 is {found}, "
            f"was {expected}); put the old file back, or build into a new output folder"
        )
    decoded: dict[int, Decoded] = {}
    try:
        starts_ms = [window.start_ms for window in windows]
        for index, frames in decode_windows(path, starts_ms, windows[0].fps, bucket, spec.fit):
            decoded[index] = Decoded(
                windows[index],
                frames,
                _pictures(windows[index], frames, spec),
                window_faults(frames),
            )
    except MediaError as error:
        # Windows before the fault stand; those behind it are lost for this reason.
        for index, window in enumerate(windows):
            decoded.setdefault(index, Decoded(window, np.empty(0, np.uint8), {}, [], error))
    return [decoded[index] for index in range(len(windows))]


def _pictures(window: Window, frames: Frames, spec: EncodeSpec) -> dict[str, bytes]:
    members = {}
    if window.media_type == "video" or spec.jpg_for_images:
        members[JPG] = encode_jpeg(frames[0], spec.jpg_quality)
    if spec.mp4 and window.media_type == "video":
        members[MP4] = encode_mp4(frames, window.fps, spec.mp4_encoder)
    return members


def _meta(window: Window, bucket: Bucket, latent: TensorInfo, text: TensorInfo) -> SampleMeta:
    shared = {
        name: getattr(window, name)
        for name in SampleMeta.__struct_fields__
        if hasattr(window, name)
    }
    return SampleMeta(
        **shared,
        width_px=bucket.width_px,
        height_px=bucket.height_px,
        num_frames=bucket.num_frames,
        latent=latent,
        text=text,
    )
