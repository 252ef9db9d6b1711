"""The unit of work: one planned shard in, one written shard out, a pure function of plan, media
and recipe.

Each clip is decoded once for all its windows in the shard, ahead of the encoder and in parallel
(decoding.py). One model is on the device at a time: all latents of the shard, then all its texts,
where equal prompts are encoded once. Batches are cut from the plan, never from what a cache or a
killed run left, because float16 results depend on the batch they are computed in (measured). While
the device encodes a batch, the one before is packed and the next one's frames arrive.

The medium is hashed before it is decoded. So a MediaError is a fact about the planned bytes, the
same in every run, and its windows are left out under that reason; a file that is gone or has
changed is an error that ends the shard, and a later run may do better.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from loader.files import write_atomic
from loader.sample import (
    CONDITION,
    EMPTY_PROMPT_FILE,
    JSON,
    LATENT,
    TEXT,
    SampleMeta,
    TensorInfo,
    encode_meta,
    encode_tensor,
)
from loader.shape import Bucket
from shardgen.catalog.rows import LostWindow, WindowFlag
from shardgen.encode.decoding import Decoded, clip_reader
from shardgen.encode.encoders import EncodedVideo, Encoders, load_encoders
from shardgen.encode.unit import EncodeSpec, ShardJob, ShardResult, ShardTimes
from shardgen.encode.write import write_shard
from shardgen.rules.windows import Window


class _Latents:
    """The first half of a shard: windows in, packed latents and pictures out, batch by batch. With
    a condition each batch is encoded twice: its clips, and their first frames with grey after them.
    """

    def __init__(self, encoders: Encoders, bucket: Bucket, spec: EncodeSpec) -> None:
        self._encoders, self._plan = encoders, encoders.plan(bucket)
        self._zstd_level = spec.zstd_level
        self._num_grey_frames = bucket.num_frames - 1 if spec.condition else 0
        self._batch: list[Decoded] = []
        self._running: tuple[list[Decoded], dict[str, Callable[[], EncodedVideo]]] | None = None
        self.members: dict[str, dict[str, bytes]] = {}  # by key
        self.windows: list[tuple[Window, TensorInfo]] = []
        self.device_s = 0.0

    def add(self, decoded: Decoded) -> None:
        """Take one more window; every full batch goes to the device."""
        self._batch.append(decoded)
        if len(self._batch) == self._plan.batch:
            self._start()

    def finish(self) -> None:
        """The last batch may be a smaller one."""
        if self._batch:
            self._start()
        self._pack()

    def _start(self) -> None:
        frames = [decoded.frames for decoded in self._batch]
        chunk_frames = self._plan.chunk_frames
        started = {LATENT: self._encoders.start_video(frames, chunk_frames)}
        if self._num_grey_frames:
            first_frames = [window[:1] for window in frames]
            started[CONDITION] = self._encoders.start_video(
                first_frames, chunk_frames, self._num_grey_frames
            )
        # while that runs
        self._pack()
        self._running, self._batch = (self._batch, started), []

    def _pack(self) -> None:
        """Compress the latents that the device has been at work on."""
        if self._running is None:
            return
        (batch, started), self._running = self._running, None
        for decoded in batch:
            self.members[decoded.window.key] = {**decoded.pictures}
        for member, wait in started.items():
            tensors, device_s = wait()
            self.device_s += device_s
            for decoded, tensor in zip(batch, tensors, strict=True):
                packed = encode_tensor(tensor, self._zstd_level)
                self.members[decoded.window.key][member] = packed
                if member == LATENT:
                    self.windows.append((decoded.window, TensorInfo("float16", tensor.shape)))


def encode_shard(
    job: ShardJob,
    spec: EncodeSpec,
    decode_threads: int = 2,
    upcoming: ShardJob | None = None,
) -> ShardResult:
    """Encode and write one shard. The clips of `upcoming`, which may follow, are decoded ahead.

    Raises EncodeError, DeviceError, TextError, VAEError or OSError; then nothing is in place.
    """
    plan, encoders = job.plan, load_encoders(spec)
    # of the shard, not of the first one's wait for the models
    begin_s = time.perf_counter()
    bucket = Bucket.parse(plan.bucket)
    lost: list[LostWindow] = []
    flags: list[WindowFlag] = []
    waiting = _Waiting()

    # All latents first, then all texts: the device holds one model at a time.
    latents = _Latents(encoders, bucket, spec)
    decoding = clip_reader(decode_threads).windows(job, spec, upcoming)
    with encoders.on_device(encoders.vae), closing(decoding):
        for decoded in waiting.timed(decoding):
            key = decoded.window.key
            if decoded.error is not None:
                lost.append(LostWindow(key, decoded.error.reason, decoded.error.detail))
                continue
            flags += [WindowFlag(key, fault) for fault in decoded.faults]
            latents.add(decoded)
        latents.finish()

    text_begin_s = time.perf_counter()
    prompts = [window.prompt for window, _ in latents.windows]
    texts = encoders.encode_text(prompts, spec.text_batch)
    write_begin_s = time.perf_counter()
    for window, latent_info in latents.windows:
        text = texts[window.prompt]
        if text.truncated:
            flags.append(WindowFlag(window.key, "prompt_truncated"))
        if text.in_float32:
            flags.append(WindowFlag(window.key, "text_in_float32"))
        text_info = TensorInfo("float16", text.rows.shape)
        latents.members[window.key] |= {
            TEXT: encode_tensor(text.rows, spec.zstd_level),
            JSON: encode_meta(_meta(window, bucket, latent_info, text_info)),
        }

    info = None
    if latents.members:
        folder = Path(spec.output) / plan.split
        info = write_shard(folder, plan.name, plan.bucket, sorted(latents.members.items()))
    end_s = time.perf_counter()
    times = ShardTimes(
        wall_s=end_s - begin_s,
        waiting_s=waiting.total_s,
        vae_s=latents.device_s,
        text_s=write_begin_s - text_begin_s,
        writing_s=end_s - write_begin_s,
    )
    return ShardResult(plan.name, info, lost, flags, times)


class _Waiting:
    """How long a loop has waited for its next element."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def timed(self, elements: Iterator[Decoded]) -> Iterator[Decoded]:
        while True:
            begin_s = time.perf_counter()
            element = next(elements, None)
            self.total_s += time.perf_counter() - begin_s
            if element is None:
                return
            yield element


def encode_empty_prompt(spec: EncodeSpec) -> None:
    """Write empty_prompt.text.zst: the rows of the prompt "", one zstd frame as in a sample."""
    rows = load_encoders(spec).encode_text([""], 1)[""].rows
    write_atomic(Path(spec.output) / EMPTY_PROMPT_FILE, encode_tensor(rows, spec.zstd_level))


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
