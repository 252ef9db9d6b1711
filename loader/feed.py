"""Ready batches on the device, ahead of the trainer: threads read, verify and unpack; a side
stream copies.

A job is one micro-batch, whole: which samples (order.py), their bytes (read.py), zstd straight
into pinned memory, one copy to the device, the byte planes merged and the text padded there. A
pool of threads works on at most `max_ahead` jobs at a time and `next()` hands them out in order;
there is no other thread, queue or process, so nothing can be lost between them, and what a job
raises is raised by `next()`. All of the work that costs time (pread, xxh3, zstd, copies) runs
without Python's lock.

Where the feed stands is one number, the global batches handed out whole: what was prefetched but
not consumed is simply read again. With `condition="raw"` the first frame of an I2V sample is
decoded by DALI and encoded by the VAE, one at a time, so that its latent does not depend on who
shares its batch.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import zstandard
from torch import Tensor

from loader.manifest import DatasetError, Split, media_shards
from loader.order import GlobalBatch, Order, is_i2v, keyed_uniform, micro_slice, sample_seed
from loader.pinned import HostMemory
from loader.read import Damage, Reader, Sample, Store, read_dataset
from loader.sample import (
    EMPTY_PROMPT_FILE,
    LATENT,
    MAX_TEXT_TOKENS,
    TEXT,
    SampleError,
    TensorInfo,
    decode_planes_into,
    without_checksum,
)
from loader.shape import WAN22, Bucket
from loader.vae.encoder import VAEEncoder

if TYPE_CHECKING:
    from loader.dali import FirstFrames

log = logging.getLogger(__name__)
# members that hold the first frame, the better one first
FRAMES: tuple[Literal["jpg", "mp4"], ...] = ("jpg", "mp4")
# shards per dataset and rank: a process may often have 1024 files open; beyond it they are
# reopened
MAX_OPEN = 256
CLIPS = FRAMES[::-1]  # members to make a latent of where none is stored


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device. B samples of one bucket and one dataset.

    latent_BCTHW: float16, normalised. text_BSD: float16 [B, 512, D], zeros after each caption's
    last row. condition_BC1HW: float16 latent of frame 0 as the raw path made it (for samples that
    are not I2V the stored one), or None with condition="latent", where it is `latent_BCTHW[:, :,
    :1]`. seeds: 63 bits from (seed, epoch, key). epoch: the dataset's own. index: the number of
    the global batch. wait_s: how long `next()` waited for it.
    """

    latent_BCTHW: Tensor
    text_BSD: Tensor
    condition_BC1HW: Tensor | None
    is_i2v: list[bool]
    caption_dropped: list[bool]
    seeds: list[int]
    keys: list[str]
    bucket: Bucket
    dataset: int
    epoch: int
    index: int
    wait_s: float


class Feed:
    """Iterates over (Batch, state) for ever; `state` is what to resume from once the batch's
    global batch is done.

    `datasets` are folders or URLs (of which `cache_dir` keeps up to `cache_bytes`), mixed by
    `weights` (default: by size), each with its own epochs. Of global batch n, rank r gets in
    micro-step m the samples [(m*world_size + r)*micro_batch : +micro_batch]. `num_threads` jobs
    run at a time, at most `max_ahead` micro-batches are ready or in work. `condition="raw"` needs
    `vae`, on `device`; an index of foreign tars, whose latents are made on the way, needs "raw".
    More than `max_damaged` damaged samples of a dataset, on this rank, raise TooManyDamagedError.
    Raises ValueError for sizes that don't divide and datasets that can't be used.
    """

    def __init__(
        self,
        datasets: Sequence[Path | str],
        *,
        split: Split,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        i2v_share: float,
        caption_dropout: float,
        condition: Literal["latent", "raw"],
        device: torch.device | str,
        num_threads: int = 2,
        max_ahead: int = 4,
        vae: VAEEncoder | None = None,
        weights: Sequence[float] | None = None,
        window_shards: int = 32,
        max_damaged: int = 16,
        cache_dir: Path | None = None,
        cache_bytes: int = 64 * 2**30,
    ):
        if global_batch % (micro_batch * world_size):
            raise ValueError(
                f"global batch {global_batch} is not a multiple of micro-batch {micro_batch} x world size "
                f"{world_size}; every rank must get the same number of whole micro-batches"
            )
        if condition == "raw" and vae is None:
            raise ValueError('condition "raw" encodes first frames with the VAE: pass one')
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._rank, self._world_size, self._micro_batch = rank, world_size, micro_batch
        self._num_micro = global_batch // (micro_batch * world_size)
        self._seed, self._i2v_share, self._caption_dropout = seed, i2v_share, caption_dropout
        self._num_threads, self._max_ahead = num_threads, max_ahead

        stores, manifests = zip(
            *(read_dataset(dataset, cache_dir, cache_bytes) for dataset in datasets), strict=True
        )
        media = [media_shards(manifest) for manifest in manifests]
        self.encodes_clips = any(media)  # whole ones, because some dataset has no latents
        foreign = [str(dataset) for dataset, names in zip(datasets, media, strict=True) if names]
        if condition == "latent" and foreign:
            raise DatasetError(
                f"{', '.join(foreign)}: an index of foreign tars holds no latents; set "
                f'data.condition = "raw", which makes them in training'
            )
        shards = [manifest.splits.get(split, []) for manifest in manifests]
        self._order = Order(
            shards,
            seed=seed,
            global_batch=global_batch,
            weights=weights,
            window_shards=window_shards,
        )
        max_open = min(
            2 * window_shards * max(len(buckets) for buckets in self._order.buckets), MAX_OPEN
        )
        self._readers = [
            Reader(store, split, infos, max_open=max_open, max_damaged=max_damaged, media=names)
            for store, infos, names in zip(stores, shards, media, strict=True)
        ]
        self._stores, self._empty_text = (
            stores,
            [_empty_text(*pair) for pair in zip(stores, datasets, strict=True)],
        )
        self._raw = (
            _first_frames(vae, self._device) if condition == "raw" and vae is not None else None
        )
        if rank == 0:
            for dataset, num, dropped in zip(
                datasets, self._order.batches_per_epoch, self._order.dropped_per_epoch, strict=True
            ):
                tails = (
                    ", ".join(f"{count} of {bucket}" for bucket, count in dropped.items() if count)
                    or "none"
                )
                log.info(
                    "%s: %d batches of %d an epoch; samples left out each epoch, others each time: %s",
                    dataset,
                    num,
                    global_batch,
                    tails,
                )

        self._memory = HostMemory(self._device)
        self._next = (0, 0)  # (global batch, micro-step) of the next job
        self._consumed = 0
        self._pending: deque[Future[_Ready]] = deque()
        use_stream = None if self._stream is None else partial(torch.cuda.set_stream, self._stream)
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="feed", initializer=use_stream
        )

    @property
    def num_batches_per_epoch(self) -> int:
        """Global batches in which every dataset is seen about once: exactly, for a single
        dataset.
        """
        return sum(self._order.batches_per_epoch)

    @property
    def buckets(self) -> list[Bucket]:
        """All shapes that batches can have."""
        return sorted({bucket for buckets in self._order.buckets for bucket in buckets})

    @property
    def damages(self) -> list[Damage]:
        """The samples that this rank could not use so far, each once."""
        return [damage for reader in self._readers for damage in reader.damages]

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        start_s = time.perf_counter()
        self._fill()
        ready = self._pending[0].result()
        self._pending.popleft()
        self._fill()  # the next ones are in work while the trainer is busy with this one
        if ready.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready.copied)
            for tensor in (
                ready.batch.latent_BCTHW,
                ready.batch.text_BSD,
                ready.batch.condition_BC1HW,
            ):
                if tensor is not None:
                    tensor.record_stream(stream)
        if ready.last_of_global:
            self._consumed = ready.batch.index + 1
        return (
            replace(ready.batch, wait_s=time.perf_counter() - start_s),
            self._order.state(ready.batch.index + 1),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the feed stands: after the last global batch that was handed out whole."""
        return self._order.state(self._consumed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which may come from another world size. Raises OrderError if the
        sequence differs.
        """
        batches = self._order.resume(state)
        self._drop_pending()
        self._next, self._consumed = (batches, 0), batches

    def close(self) -> None:
        """Stop the threads. The feed can't be used afterwards."""
        for store in self._stores:
            store.close()
        self._drop_pending()
        self._pool.shutdown()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _drop_pending(self) -> None:
        wait([future for future in self._pending if not future.cancel()])
        self._pending.clear()

    def _fill(self) -> None:
        while len(self._pending) < self._max_ahead:
            number, step = self._next
            self._pending.append(self._pool.submit(self._job, number, step))
            self._next = (number, step + 1) if step + 1 < self._num_micro else (number + 1, 0)

    def _job(self, number: int, step: int) -> "_Ready":
        whole = self._order.batch(number)
        rows = micro_slice(step, self._rank, self._world_size, self._micro_batch)
        places = list(
            zip(whole.shard_G[rows].tolist(), whole.position_G[rows].tolist(), strict=True)
        )
        batch = self._batch(whole, places)
        return _Ready(
            batch,
            self._stream.record_event() if self._stream else None,
            step + 1 == self._num_micro,
        )

    def _batch(self, whole: GlobalBatch, places: list[tuple[int, int]]) -> Batch:
        """Read the samples at (shard, position) and place each one in the batch, on the device."""
        latent_BCTHW = self._memory.for_batch(len(places), *WAN22.latent_shape(whole.bucket))
        text_BSD, loaded = None, []
        for i, (shard, position) in enumerate(places):
            sample, latent_CTHW = self._read(whole, shard, position)
            meta, members = sample.meta, sample.members
            dropped = (
                keyed_uniform(self._seed, whole.epoch, meta.key, "caption") < self._caption_dropout
            )
            i2v = is_i2v(self._seed, whole.epoch, meta.key, meta.num_frames, self._i2v_share)
            needs_frame = i2v and self._raw is not None and latent_CTHW is None
            frame = next(
                (
                    (kind, bytes(members[kind]))
                    for kind in FRAMES
                    if kind in members and needs_frame
                ),
                None,
            )
            if text_BSD is None:
                text_BSD = self._memory.for_batch(len(places), MAX_TEXT_TOKENS, meta.text.shape[1])
            num_tokens = meta.text.shape[0]
            try:
                if latent_CTHW is None:
                    self._place(members[LATENT], meta.latent, latent_BCTHW[i])
                else:
                    latent_BCTHW[i] = latent_CTHW
                if dropped:
                    planes = torch.from_numpy(self._empty_text[whole.dataset]).view(
                        2, -1, meta.text.shape[1]
                    )
                    num_tokens = planes.shape[1]
                    merge_planes(planes.to(self._device), text_BSD[i, :num_tokens])
                else:
                    self._place(members[TEXT], meta.text, text_BSD[i, :num_tokens])
                text_BSD[i, num_tokens:] = 0
            except SampleError as error:  # its hash is right: it was written like this
                raise SampleError(
                    f"shard {sample.shard}, key {meta.key}: {error}; build the dataset anew"
                ) from error
            except RuntimeError as error:
                error.add_note(f"shard {sample.shard}, key {meta.key}")
                raise
            loaded.append(_Loaded(sample.shard, meta.key, i2v, dropped, needs_frame, frame))
        condition_BC1HW = None
        if self._raw is not None:
            # stays for the samples that are not I2V
            condition_BC1HW = latent_BCTHW[:, :, :1].clone()
            for one, stored in zip(loaded, condition_BC1HW, strict=True):
                self._encode_frame(one, stored, whole)
        assert text_BSD is not None
        return Batch(
            latent_BCTHW,
            text_BSD,
            condition_BC1HW,
            is_i2v=[one.is_i2v for one in loaded],
            caption_dropped=[one.caption_dropped for one in loaded],
            keys=[one.key for one in loaded],
            seeds=[sample_seed(self._seed, whole.epoch, one.key) for one in loaded],
            bucket=whole.bucket,
            dataset=whole.dataset,
            epoch=whole.epoch,
            index=whole.number,
            wait_s=0.0,
        )

    def _read(self, whole: GlobalBatch, shard: int, position: int) -> tuple[Sample, Tensor | None]:
        """A sample, and the latent of its clip if none is stored. Where that can't be made,
        another sample's.
        """
        reader = self._readers[whole.dataset]
        while True:
            sample = reader.read(shard, position, self._wanted)
            if LATENT in sample.members or self._raw is None:
                return sample, None
            kind = next(kind for kind in CLIPS if kind in sample.members)
            latent_CTHW = self._raw.encode_clip(kind, bytes(sample.members[kind]), whole.bucket)
            if isinstance(latent_CTHW, Tensor):
                return sample, latent_CTHW
            key = sample.meta.key
            reader.reject(Damage(sample.shard, key, f"{key}.{kind}", str(latent_CTHW)))

    def _wanted(self, extensions: Sequence[str]) -> Sequence[str]:
        """The same members every time, needed or not, so that a cache of samples has one kind of
        entry.
        """
        if self._raw and LATENT not in extensions:
            return [TEXT, *[kind for kind in CLIPS if kind in extensions][:1]]
        frame = [kind for kind in FRAMES if kind in extensions][:1]
        return [LATENT, TEXT, *(frame if self._raw else [])]

    def _place(self, member: memoryview, info: TensorInfo, out: Tensor) -> None:
        """Unpack a tensor member into `out`: on a GPU by way of pinned memory, its planes merged
        there.
        """
        if out.shape != info.shape:
            raise SampleError(
                f"a tensor member of shape {list(info.shape)}, where {list(out.shape)} has its place"
            )
        planes = self._memory.empty((2, *info.shape), torch.uint8)
        decode_planes_into(without_checksum(member), info, planes.numpy().data.cast("B"))
        merge_planes(planes.to(self._device, non_blocking=True), out)

    def _encode_frame(self, loaded: "_Loaded", stored_C1HW: Tensor, whole: GlobalBatch) -> None:
        """Overwrite the stored latent of frame 0 by the raw frame's, or report why it can't be."""
        if self._raw is None or not loaded.needs_frame:
            return
        container, data = loaded.frame or (FRAMES[0], b"")
        latent_C1HW = self._raw.encode(container, data, whole.bucket) if data else "missing"
        if isinstance(latent_C1HW, Tensor):
            stored_C1HW.copy_(latent_C1HW)
        else:
            self._readers[whole.dataset].report(
                Damage(
                    loaded.shard,
                    loaded.key,
                    f"{loaded.key}.{container}",
                    f"{latent_C1HW}; the stored latent frame is used instead",
                )
            )


@dataclass(frozen=True)
class _Loaded:
    """What is left to know of a sample whose tensors are in the batch; `frame` holds its first
    frame, in a file.
    """

    shard: str
    key: str
    is_i2v: bool
    caption_dropped: bool
    needs_frame: bool
    frame: tuple[Literal["jpg", "mp4"], bytes] | None


@dataclass(frozen=True)
class _Ready:
    batch: Batch
    copied: torch.cuda.Event | None
    last_of_global: bool


def _first_frames(vae: VAEEncoder, device: torch.device) -> "FirstFrames":
    """DALI is an extra: only the raw path needs it. Raises ValueError where it isn't installed."""
    try:
        from loader.dali import FirstFrames
    except ImportError as error:
        raise ValueError(
            f'condition "raw" needs DALI ({error}): install the extra dali-cuda12 (V100 to Hopper; works '
            f"without a GPU too) or dali-cuda13"
        ) from error
    return FirstFrames(vae, device)


def merge_planes(planes: Tensor, out: Tensor) -> None:
    """uint8 [2, ...], high bytes and low bytes, into float16 `out` [...], on whatever device both
    are.
    """
    (high, low), bits = planes.unbind(), out.view(torch.int16)
    if out.device.type == "cpu":  # torch would first make a copy of `low` in 16 bits there
        np.multiply(high.numpy(), np.int16(256), out=bits.numpy())
        np.bitwise_or(bits.numpy(), low.numpy(), out=bits.numpy())
    else:
        torch.add(low, bits.copy_(high), alpha=256, out=bits)


def _empty_text(store: Store, dataset: Path | str) -> np.ndarray[Any, Any]:
    """The byte planes of the empty prompt, flat: its width is known once a sample is. Raises
    DatasetError.
    """
    try:
        member = store.read_file(EMPTY_PROMPT_FILE)
        num_bytes = zstandard.frame_content_size(member)
        planes = np.empty(num_bytes, np.uint8)
        decode_planes_into(member, TensorInfo("float16", (num_bytes // 2,)), planes.data)
        return planes
    except (zstandard.ZstdError, ValueError, FileNotFoundError) as error:
        raise DatasetError(
            f"{dataset}: {EMPTY_PROMPT_FILE} is missing or damaged ({error}); copy it anew"
        ) from error
