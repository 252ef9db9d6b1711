"""From places in shards to a batch on the device: read, choose what is done with each sample,
unpack, pad, and where asked for make latents of raw frames.

The compressed tensors go by zstd straight into pinned memory and in one copy to the device, where
the byte planes are merged and the text padded. With `condition = "raw"` the first frame of an I2V
sample is decoded by DALI and encoded by the VAE, one at a time, so that its latent does not
depend on what shares its batch.

Suffixes of names: B batch, C channels, T latent frames, H and W latent rows and columns, S text
tokens, D text features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor

from loader.dataset import Dataset
from loader.files import cause_of
from loader.manifest import DatasetError
from loader.pinned import HostMemory
from loader.read import Reader
from loader.sample import (
    CONDITION,
    EMPTY_PROMPT_FILE,
    LATENT,
    MAX_TEXT_TOKENS,
    TEXT,
    SampleError,
    SampleMeta,
    TensorInfo,
    condition_info,
    decode_planes_into,
    without_checksum,
)
from loader.shape import Bucket
from loader.shard import Damage, Sample
from loader.vae.encoder import VAEEncoder

if TYPE_CHECKING:
    from loader.dali import FirstFrames

Kind = Literal["jpg", "mp4"]
FRAMES: tuple[Kind, ...] = ("jpg", "mp4")  # members that hold the first frame, the better one first
CLIPS = FRAMES[::-1]  # members to make a latent of where none is stored


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device. B samples of one bucket and one dataset.

    latent_BCTHW: float16, normalised. text_BSD: float16 [B, 512, D], zeros after each caption's
    last row. condition_BC1HW: float16 latent of frame 0 as the raw path made it (for samples that
    are not I2V the stored one), or None with condition="latent", where it is `latent_BCTHW[:, :,
    :1]`. given_BCTHW: float16 [B, Cc, T, H, W], KEY.condition.zst, for a model that takes it.
    seeds: 63 bits from (seed, epoch, key). epoch: the dataset's own. index: the number of the
    global batch, of which this is micro-step `micro_step` of `num_micro` on each rank. wait_s: how
    long `next()` waited for it.
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
    micro_step: int = 0
    num_micro: int = 1
    given_BCTHW: Tensor | None = None


class Choice(NamedTuple):
    """What is done with a sample this time."""

    is_i2v: bool
    caption_dropped: bool
    seed: int


Choose = Callable[[SampleMeta], Choice]


class _Placed(NamedTuple):
    """A sample whose tensors are in the batch. `frame` is the file with its first frame, where
    the raw path needs one, b"" if the sample has none.
    """

    shard: str
    key: str
    choice: Choice
    frame: tuple[Kind, bytes] | None


class BatchMaker:
    """Makes batches of the samples of some datasets; safe to use from several threads.

    `condition="raw"` needs `vae`, on `device`. reads_given: KEY.condition.zst is part of a batch.
    What can't be used is replaced by the reader of its dataset (read.py). Raises ValueError or
    DatasetError for what can never work.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        readers: Sequence[Reader],
        *,
        condition: Literal["latent", "raw"],
        device: torch.device,
        vae: VAEEncoder | None,
        reads_given: bool = False,
    ):
        if condition == "raw" and vae is None:
            raise ValueError('condition "raw" encodes first frames with the VAE: pass one')
        self._readers, self._device, self._reads_given = readers, device, reads_given
        self._layouts = [dataset.manifest.layout for dataset in datasets]
        self._empty_texts = [_empty_text(dataset) for dataset in datasets]
        self._memory = HostMemory(device)
        use_raw = condition == "raw" and vae is not None
        self._first_frames = _first_frames(vae, device) if use_raw and vae else None

    def make(
        self, dataset: int, bucket: Bucket, places: Sequence[tuple[int, int]], choose: Choose
    ) -> Batch:
        """The samples of `dataset` at these (shard, position), all of one bucket, as a batch with
        epoch, index and wait_s 0. Raises SampleError and TooManyDamagedError.
        """
        latent_shape = self._layouts[dataset].latent_shape(bucket)
        latent_BCTHW = self._memory.for_batch(len(places), *latent_shape)
        text_BSD: Tensor | None = None
        given_BCTHW: Tensor | None = None
        placed: list[_Placed] = []
        for i, (shard, position) in enumerate(places):
            sample, made_CTHW = self._read(dataset, bucket, shard, position)
            choice = choose(sample.meta)
            needs_frame = self._first_frames is not None and choice.is_i2v and made_CTHW is None
            # copied, because the members are valid until this thread's next read
            frame = _first_frame_of(sample) if needs_frame else None
            placed.append(_Placed(sample.shard, sample.meta.key, choice, frame))
            if text_BSD is None:
                text_dim = sample.meta.text.shape[1]
                text_BSD = self._memory.for_batch(len(places), MAX_TEXT_TOKENS, text_dim)
            with _naming(sample):
                if made_CTHW is None:
                    latent_info = sample.meta.latent
                    self._place(sample.members[LATENT], latent_info, latent_BCTHW[i])
                else:
                    latent_BCTHW[i] = made_CTHW
                if self._reads_given:
                    given_info = condition_info(sample.members[CONDITION], sample.meta.latent)
                    if given_BCTHW is None:
                        given_BCTHW = self._memory.for_batch(len(places), *given_info.shape)
                    self._place(sample.members[CONDITION], given_info, given_BCTHW[i])
                if choice.caption_dropped:
                    self._place_empty_text(dataset, text_BSD[i])
                else:
                    self._place_text(sample, text_BSD[i])
        assert text_BSD is not None, "a batch has samples"

        condition_BC1HW = None
        if self._first_frames is not None:
            # the stored latent stays for the samples that are not I2V
            condition_BC1HW = latent_BCTHW[:, :, :1].clone()
            for one, condition_C1HW in zip(placed, condition_BC1HW, strict=True):
                self._place_first_frame(one, dataset, bucket, condition_C1HW)
        return Batch(
            latent_BCTHW,
            text_BSD,
            condition_BC1HW,
            is_i2v=[one.choice.is_i2v for one in placed],
            caption_dropped=[one.choice.caption_dropped for one in placed],
            seeds=[one.choice.seed for one in placed],
            keys=[one.key for one in placed],
            bucket=bucket,
            dataset=dataset,
            epoch=0,
            index=0,
            wait_s=0.0,
            given_BCTHW=given_BCTHW,
        )

    def _read(
        self, dataset: int, bucket: Bucket, shard: int, position: int
    ) -> tuple[Sample, Tensor | None]:
        """A sample, and the latent of its clip if none is stored. Where that can't be made,
        another sample's.
        """
        reader = self._readers[dataset]
        while True:
            sample = reader.read(shard, position, self._wanted)
            if LATENT in sample.members or self._first_frames is None:
                return sample, None
            kind = next(kind for kind in CLIPS if kind in sample.members)
            made_CTHW = self._first_frames.encode_clip(kind, bytes(sample.members[kind]), bucket)
            if isinstance(made_CTHW, Tensor):
                return sample, made_CTHW
            key = sample.meta.key
            reader.reject(Damage(sample.shard, key, f"{key}.{kind}", str(made_CTHW)))

    def _wanted(self, extensions: Sequence[str]) -> Sequence[str]:
        """The same members every time, needed or not, so that a cache of samples has one kind of
        entry.
        """
        if self._reads_given:
            return [LATENT, CONDITION, TEXT]
        if self._first_frames is None:
            return [LATENT, TEXT]
        if LATENT not in extensions:
            return [TEXT, *[kind for kind in CLIPS if kind in extensions][:1]]
        return [LATENT, TEXT, *[kind for kind in FRAMES if kind in extensions][:1]]

    def _place(self, member: memoryview, info: TensorInfo, out: Tensor) -> None:
        """Unpack a tensor member into `out`: on a GPU by way of pinned memory, its planes merged
        there.
        """
        if out.shape != info.shape:
            raise SampleError(
                f"a tensor member of shape {list(info.shape)}, where {list(out.shape)} has its "
                f"place"
            )
        planes = self._memory.empty((2, *info.shape), torch.uint8)
        decode_planes_into(without_checksum(member), info, planes.numpy().data.cast("B"))
        merge_planes(planes.to(self._device, non_blocking=True), out)

    def _place_text(self, sample: Sample, text_SD: Tensor) -> None:
        num_tokens = sample.meta.text.shape[0]
        self._place(sample.members[TEXT], sample.meta.text, text_SD[:num_tokens])
        text_SD[num_tokens:] = 0

    def _place_empty_text(self, dataset: int, text_SD: Tensor) -> None:
        planes = torch.from_numpy(self._empty_texts[dataset]).view(2, -1, text_SD.shape[1])
        num_tokens = planes.shape[1]
        merge_planes(planes.to(self._device), text_SD[:num_tokens])
        text_SD[num_tokens:] = 0

    def _place_first_frame(
        self, one: _Placed, dataset: int, bucket: Bucket, condition_C1HW: Tensor
    ) -> None:
        """Overwrite the stored latent of frame 0 by the raw frame's, or report why it can't be."""
        if self._first_frames is None or one.frame is None:
            return
        kind, file = one.frame
        made_C1HW = self._first_frames.encode(kind, file, bucket) if file else "missing"
        if isinstance(made_C1HW, Tensor):
            condition_C1HW.copy_(made_C1HW)
            return
        reason = f"{made_C1HW}; the stored latent frame is used instead"
        damage = Damage(one.shard, one.key, f"{one.key}.{kind}", reason)
        self._readers[dataset].report(damage)


def _first_frame_of(sample: Sample) -> tuple[Kind, bytes]:
    for kind in FRAMES:
        if kind in sample.members:
            return kind, bytes(sample.members[kind])
    return FRAMES[0], b""


@contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Errors inside the block name the sample."""
    where = f"shard {sample.shard}, key {sample.meta.key}"
    try:
        yield
    except SampleError as error:
        # its hash is right: it was written like this
        raise SampleError(f"{where}: {error}; build the dataset anew") from error
    except RuntimeError as error:
        error.add_note(where)
        raise


def _first_frames(vae: VAEEncoder, device: torch.device) -> "FirstFrames":
    """DALI is an extra: only the raw path needs it. Raises ValueError where it isn't installed."""
    try:
        from loader.dali import FirstFrames
    except ImportError as error:
        raise ValueError(
            f'condition "raw" needs DALI ({error}): install the extra dali-cuda12 (V100 to '
            f"Hopper; works without a GPU too) or dali-cuda13"
        ) from error
    return FirstFrames(vae, device)


def merge_planes(planes: Tensor, out: Tensor) -> None:
    """uint8 [2, ...], high bytes and low bytes, into float16 `out` [...], on whatever device both
    are.
    """
    (high, low), bits = planes.unbind(), out.view(torch.int16)
    if out.device.type == "cpu":
        # torch would first make a copy of `low` in 16 bits
        np.multiply(high.numpy(), np.int16(256), out=bits.numpy())
        np.bitwise_or(bits.numpy(), low.numpy(), out=bits.numpy())
    else:
        torch.add(low, bits.copy_(high), alpha=256, out=bits)


def _empty_text(dataset: Dataset) -> np.ndarray[Any, Any]:
    """The byte planes of the empty prompt, flat: its width is known once a sample is. Raises
    DatasetError.
    """
    try:
        member = dataset.store.read_file(EMPTY_PROMPT_FILE)
        num_bytes = zstandard.frame_content_size(member)
        planes = np.empty(num_bytes, np.uint8)
        decode_planes_into(member, TensorInfo("float16", (num_bytes // 2,)), planes.data)
        return planes
    except (zstandard.ZstdError, ValueError, FileNotFoundError) as error:
        raise DatasetError(
            f"{dataset.name}: {EMPTY_PROMPT_FILE} is missing or damaged ({cause_of(error)}); copy "
            f"it anew"
        ) from error
