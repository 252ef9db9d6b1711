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
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from loader.files import file_xxh3, write_atomic
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
from loader.vae.encoder import load_vae_encoder
from shardgen.encode.text import EncodedText, TextEncoder
from shardgen.encode.unit import EncodeSpec, Lost, ShardJob, ShardResult
from shardgen.encode.write import write_shard
from shardgen.media.decode import Frames, decode_windows
from shardgen.media.errors import MediaError
from shardgen.media.pictures import encode_jpeg, encode_mp4, window_faults
from shardgen.rules.shards import Window


class EncodeError(ValueError):
    """A shard can't be encoded now; the message names the shard, the file and the way out."""


class Decoded(NamedTuple):
    """A window out of its clip: uint8 [F, H, W, 3] and the picture members made from it, or why
    there are none.
    """

    window: Window
    frames: Frames
    pictures: dict[str, bytes]
    faults: list[str]
    error: MediaError | None = None


class Encoders:
    """Both models. Their weights stay on the CPU; `on_device` lends one of them the device."""

    def __init__(self, spec: EncodeSpec) -> None:
        torch.set_num_threads(spec.threads)
        # a timed choice of algorithm would change bytes from run to run
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        transformers.utils.logging.disable_progress_bar()
        self.device, self.dtype = torch.device(spec.device), getattr(torch, spec.dtype)
        self.vae = load_vae_encoder(Path(spec.model), "cpu", self.dtype)
        self.text = TextEncoder(Path(spec.model), self.device, self.dtype)

    @contextmanager
    def on_device(self, model: torch.nn.Module) -> Iterator[None]:
        """A copy of the weights on the device, dropped at the end: nothing is copied back."""
        host = [(tensor, tensor.data) for tensor in chain(model.parameters(), model.buffers())]
        for tensor, data in host:
            tensor.data = data.to(self.device)
        try:
            yield
        finally:
            for tensor, data in host:
                tensor.data = data
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def encode_video(self, windows: list[Frames]) -> np.ndarray[Any, Any]:
        """float16 [B, 48, T, H/16, W/16] of B windows uint8 [F, H, W, 3]. The VAE must be on the
        device.
        """
        pixels_BFHWC = torch.from_numpy(np.stack(windows)).to(self.device)
        video_BCFHW = (pixels_BFHWC.movedim(-1, 1).float() / 127.5 - 1).to(self.dtype)
        latent_BCTHW = self.vae.encode(video_BCFHW)
        return latent_BCTHW.to(torch.float16).cpu().numpy()

    def encode_text(self, prompts: list[str], batch_size: int) -> dict[str, EncodedText]:
        """{prompt: EncodedText} of every different prompt."""
        with self.on_device(self.text.model):
            return self.text.encode(prompts, batch_size)


@lru_cache(maxsize=1)
def load_encoders(spec: EncodeSpec) -> Encoders:
    """The models of this process, loaded once."""
    return Encoders(spec)


def encode_shard(job: ShardJob, spec: EncodeSpec, decode_threads: int = 2) -> ShardResult:
    """Encode and write one shard. Raises EncodeError, TextError, VAEError or OSError; then
    nothing is in place.
    """
    plan, encoders = job.plan, load_encoders(spec)
    members: dict[str, dict[str, bytes]] = {}
    metas: list[tuple[Window, TensorInfo]] = []
    lost: list[Lost] = []
    notes: list[tuple[str, str]] = []

    def encode_batch(batch: list[Decoded]) -> None:
        for decoded, latent in zip(
            batch, encoders.encode_video([item.frames for item in batch]), strict=True
        ):
            members[decoded.window.key] = {
                **decoded.pictures,
                LATENT: encode_tensor(latent, spec.zstd_level),
            }
            metas.append((decoded.window, TensorInfo("float16", latent.shape)))

    with encoders.on_device(encoders.vae):
        batch: list[Decoded] = []
        for decoded in _decode_ahead(job, spec, decode_threads):
            if decoded.error is not None:
                lost.append(Lost(decoded.window.key, decoded.error.reason, decoded.error.detail))
                continue
            notes += [(decoded.window.key, fault) for fault in decoded.faults]
            batch.append(decoded)
            if len(batch) == spec.vae_batch:
                encode_batch(batch)
                batch = []
        if batch:
            encode_batch(batch)
    texts = encoders.encode_text([window.prompt for window, _ in metas], spec.text_batch)
    for window, latent_info in metas:
        text = texts[window.prompt]
        if text.truncated:
            notes.append((window.key, "prompt_truncated"))
        meta = _meta(
            window, Bucket.parse(plan.bucket), latent_info, TensorInfo("float16", text.rows.shape)
        )
        members[window.key] |= {
            TEXT: encode_tensor(text.rows, spec.zstd_level),
            JSON: encode_meta(meta),
        }
    if not members:
        return ShardResult(plan.name, None, lost, notes)
    info = write_shard(
        Path(spec.output) / plan.split, plan.name, plan.bucket, sorted(members.items())
    )
    return ShardResult(plan.name, info, lost, notes)


def encode_empty_prompt(spec: EncodeSpec) -> None:
    """Write empty_prompt.text.zst: the rows of the prompt "", one zstd frame as in a sample."""
    rows = load_encoders(spec).encode_text([""], 1)[""].rows
    write_atomic(Path(spec.output) / EMPTY_PROMPT_FILE, encode_tensor(rows, spec.zstd_level))


def _decode_ahead(job: ShardJob, spec: EncodeSpec, num_threads: int) -> Iterator[Decoded]:
    """Every window of the plan, clip by clip in an order that only the plan decides;
    `num_threads` clips ahead.
    """
    clips: dict[str, list[Window]] = {}
    for window in sorted(
        job.plan.windows, key=lambda window: (window.media_xxh3, window.start_ms, window.key)
    ):
        clips.setdefault(window.media_xxh3, []).append(window)
    with ThreadPoolExecutor(num_threads) as pool:
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
    try:
        found = file_xxh3(path)
    except OSError as error:
        raise EncodeError(
            f"{job.plan.name}: {path} can't be read: {error.strerror}; make it readable and run the "
            f"build again"
        ) from error
    if found != expected:
        raise EncodeError(
            f"{job.plan.name}: {path} has changed since it was planned (its xxh3_128 is {found}, was "
            f"{expected}); put the old file back, or build into a new output folder"
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
