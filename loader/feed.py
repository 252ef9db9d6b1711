"""Ready batches on the device, ahead of the trainer: threads make them, a side stream copies.

A job is one micro-batch, whole: which samples (order.py), and the batch of them (batch.py). A
pool of threads works on at most `max_ahead` jobs at a time and `next()` hands them out in order;
there is no other thread, queue or process, so nothing can be lost between them, and what a job
raises is raised by `next()`. All of the work that costs time (pread, xxh3, zstd, copies) runs
without Python's lock.

Where the feed stands is one number, the global batches handed out whole: what was prefetched but
not consumed is simply read again.
"""

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch

from loader.batch import Batch, BatchMaker, Choice
from loader.batching import Batching, micro_slice
from loader.dataset import open_datasets
from loader.feed_config import FeedConfig
from loader.order import Order, describe_counts, is_i2v, keyed_uniform, sample_seed
from loader.sample import SampleMeta
from loader.shape import Bucket
from loader.shard import Damage
from loader.vae.encoder import VAEEncoder

log = logging.getLogger(__name__)
# shards per dataset and rank: a process may often have 1024 files open; beyond it they are
# reopened
MAX_OPEN = 256


class Feed:
    """Iterates over (Batch, state) for ever; `state` is what to resume from once the batch's
    global batch is done.

    `data` says which datasets and what is done with their samples, `batching` how they are cut up
    and which part is this rank's. Of global batch n, rank r gets in micro-step m the samples
    [(m*world_size + r)*micro_batch : +micro_batch]. `condition = "raw"` needs `vae`, on `device`;
    an index of foreign tars, whose latents are made on the way, needs "raw". reads_given: for a
    model that takes KEY.condition.zst. More than `max_damaged` damaged samples of a dataset, on
    this rank, raise TooManyDamagedError. Raises ValueError for sizes that don't divide and datasets
    that can't be used.
    """

    def __init__(
        self,
        data: FeedConfig,
        batching: Batching,
        device: torch.device | str,
        vae: VAEEncoder | None = None,
        reads_given: bool = False,
    ):
        batching.check()
        self._data, self._batching = data, batching
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self.datasets = open_datasets(data, batching.split)
        self._order = Order(
            [dataset.shards for dataset in self.datasets],
            seed=batching.seed,
            global_batch=batching.global_batch,
            weights=data.weights or None,
            window_shards=batching.window_shards,
            excluded=[dataset.excluded for dataset in self.datasets],
        )
        num_buckets = max(len(counts) for counts in self._order.counts)
        # a batch may straddle two windows
        max_open = min(2 * batching.window_shards * num_buckets, MAX_OPEN)
        self._readers = [
            dataset.reader(max_open=max_open, max_damaged=data.max_damaged)
            for dataset in self.datasets
        ]
        self._maker = BatchMaker(
            self.datasets,
            self._readers,
            condition=data.condition,
            device=self._device,
            vae=vae,
            reads_given=reads_given,
        )
        if batching.rank == 0:
            self._log_counts()

        self._next = (0, 0)  # (global batch, micro-step) of the next job
        self._consumed = 0
        self._pending: deque[Future[_Ready]] = deque()
        use_stream = None if self._stream is None else partial(torch.cuda.set_stream, self._stream)
        self._pool = ThreadPoolExecutor(
            data.num_threads, thread_name_prefix="feed", initializer=use_stream
        )

    @property
    def encodes_clips(self) -> bool:
        """Whether whole clips are encoded on the way, because some dataset has no latents."""
        return any(dataset.media for dataset in self.datasets)

    @property
    def num_batches_per_epoch(self) -> int:
        """Global batches in which every dataset is seen about once: exactly, for a single
        dataset.
        """
        return sum(self._order.batches_per_epoch)

    @property
    def micro_batches(self) -> dict[Bucket, set[int]]:
        """All shapes that batches can have, and the numbers of samples that their micro-batches
        then have: one for each layout among the datasets.
        """
        sizes: dict[Bucket, set[int]] = {}
        for dataset, counts in enumerate(self._order.counts):
            for count in counts:
                if count.num_batches:
                    size = self._micro_batch(dataset, count.bucket)
                    sizes.setdefault(count.bucket, set()).add(size)
        return dict(sorted(sizes.items()))

    @property
    def buckets(self) -> list[Bucket]:
        """All shapes that batches can have."""
        return list(self.micro_batches)

    @property
    def damages(self) -> list[Damage]:
        """What this rank could not use so far, each once."""
        return [damage for reader in self._readers for damage in reader.damages]

    @property
    def num_damaged(self) -> int:
        """The samples that `damages` stand for."""
        return sum(reader.num_damaged for reader in self._readers)

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        start_s = time.perf_counter()
        self._fill()
        ready = self._pending[0].result()
        self._pending.popleft()
        self._fill()  # the next ones are in work while the trainer is busy with this one
        batch = ready.batch
        if ready.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready.copied)
            for tensor in (
                batch.latent_BCTHW,
                batch.text_BSD,
                batch.condition_BC1HW,
                batch.given_BCTHW,
            ):
                if tensor is not None:
                    tensor.record_stream(stream)
        if batch.micro_step + 1 == batch.num_micro:
            self._consumed = batch.index + 1
        state = self._order.state(batch.index + 1)
        return replace(batch, wait_s=time.perf_counter() - start_s), state

    def batch_again(self, number: int, micro_step: int) -> Batch:
        """Micro-batch `micro_step` of global batch `number` of this rank, made here and now and
        beside the sequence: to look at what went wrong with it.
        """
        return self._job(number, micro_step, self._num_micro(number)).batch

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
        """Stop the threads, and repeat how many samples were damaged. The feed can't be used
        afterwards.
        """
        for dataset in self.datasets:
            dataset.store.close()
        self._drop_pending()
        self._pool.shutdown()
        for dataset, reader in zip(self.datasets, self._readers, strict=True):
            if reader.num_damaged:
                log.warning(
                    "%s: rank %d could not use %d samples (max_damaged = %d) and took others in "
                    "their place; run `shardgen verify` on it",
                    dataset.name,
                    self._batching.rank,
                    reader.num_damaged,
                    self._data.max_damaged,
                )

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _log_counts(self) -> None:
        for dataset, counts in zip(self.datasets, self._order.counts, strict=True):
            log.info("%s: %s", dataset.name, describe_counts(counts, self._batching.global_batch))

    def _micro_batch(self, dataset: int, bucket: Bucket) -> int:
        layout = self.datasets[dataset].manifest.layout
        return self._batching.micro_batch_of(layout.num_tokens(bucket))

    def _num_micro(self, number: int) -> int:
        """Micro-batches of a global batch on each rank; with `micro_tokens` by its bucket."""
        micro_batch = self._batching.micro_batch
        if self._batching.micro_tokens:
            whole = self._order.batch(number)
            micro_batch = self._micro_batch(whole.dataset, whole.bucket)
        return self._batching.global_batch // (micro_batch * self._batching.world_size)

    def _drop_pending(self) -> None:
        wait([future for future in self._pending if not future.cancel()])
        self._pending.clear()

    def _fill(self) -> None:
        while len(self._pending) < self._data.max_ahead:
            number, step = self._next
            num_micro = self._num_micro(number)
            self._pending.append(self._pool.submit(self._job, number, step, num_micro))
            self._next = (number, step + 1) if step + 1 < num_micro else (number + 1, 0)

    def _job(self, number: int, step: int, num_micro: int) -> "_Ready":
        """Make one micro-batch; in a thread of the pool."""
        whole, batching = self._order.batch(number), self._batching
        micro_batch = batching.global_batch // (num_micro * batching.world_size)
        rows = micro_slice(step, batching.rank, batching.world_size, micro_batch)
        shards, positions = whole.shard_G[rows].tolist(), whole.position_G[rows].tolist()
        batch = self._maker.make(
            whole.dataset,
            whole.bucket,
            list(zip(shards, positions, strict=True)),
            partial(self._choose, whole.epoch),
        )
        batch = replace(
            batch, epoch=whole.epoch, index=number, micro_step=step, num_micro=num_micro
        )
        return _Ready(batch, self._stream.record_event() if self._stream else None)

    def _choose(self, epoch: int, meta: SampleMeta) -> Choice:
        seed, data = self._batching.seed, self._data
        caption_draw = keyed_uniform(seed, epoch, meta.key, "caption")
        return Choice(
            is_i2v=is_i2v(seed, epoch, meta.key, meta.num_frames, data.i2v_share),
            caption_dropped=caption_draw < data.caption_dropout,
            seed=sample_seed(seed, epoch, meta.key),
        )


class _Ready(NamedTuple):
    """A batch, and on a GPU the event after which it has been copied."""

    batch: Batch
    copied: torch.cuda.Event | None
