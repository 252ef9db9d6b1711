"""What others load: the same samples through webdataset, litdata and mosaicml-streaming, to the
same two tensors.

Each is given its due: our fast codec for our shards in webdataset (and, as another subject, the
plain one), its own format with uncompressed float16 (nothing to decode) in the other two, written
at their defaults, and a torch DataLoader with 0, 1 or 2 workers.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor
from torch.utils.data import DataLoader

from loader.batch import merge_planes
from loader.read import Reader
from loader.sample import (
    JSON,
    LATENT,
    TEXT,
    TensorInfo,
    decode_meta,
    decode_planes_into,
    decode_tensor,
)
from loader.store import read_dataset

Pair = tuple[Tensor, Tensor]  # latent [48, T, h, w] and text [512, D], float16


_scratch = torch.empty(1 << 24, dtype=torch.uint8)


def unpack(member: bytes, info: TensorInfo, out: Tensor) -> None:
    planes = _scratch[: out.nbytes].view(2, *info.shape)
    decode_planes_into(member, info, planes.numpy().data.cast("B"))
    merge_planes(planes, out)


def pad(text: Tensor) -> Tensor:
    padded = torch.zeros((512, text.shape[1]), dtype=torch.float16)
    padded[: len(text)] = text
    return padded


def _webdataset_sample(sample: dict[str, Any]) -> Pair:
    meta = decode_meta(sample[JSON])
    latent = torch.empty(meta.latent.shape, dtype=torch.float16)
    text = torch.empty((512, meta.text.shape[1]), dtype=torch.float16)
    unpack(sample[LATENT], meta.latent, latent)
    unpack(sample[TEXT], meta.text, text[: meta.text.shape[0]])
    text[meta.text.shape[0] :] = 0
    return latent, text


def _plain_sample(sample: dict[str, Any]) -> Pair:
    """The same by what anyone would write first: unpack at once, and let numpy interleave the
    planes.
    """
    latent, text = (
        torch.from_numpy(
            np.frombuffer(zstandard.ZstdDecompressor().decompress(sample[name]), np.uint8)
            .reshape(2, -1)[::-1]
            .T.copy()
            .view(np.float16)
            .reshape(info.shape)
        )
        for meta in [decode_meta(sample[JSON])]
        for name, info in ((LATENT, meta.latent), (TEXT, meta.text))
    )
    return latent, pad(text)


def webdataset_samples(location: str, num_workers: int, plain: bool = False) -> Iterator[Pair]:
    import webdataset

    _, manifest = read_dataset(location)
    prefix = f"pipe:curl -sf {location}" if "://" in location else location
    urls = [f"{prefix}/train/{shard.name}.tar" for shard in manifest.splits["train"]]
    dataset = webdataset.WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(64)
    dataset = dataset.map(_plain_sample if plain else _webdataset_sample)
    return iter(DataLoader(dataset, batch_size=None, num_workers=num_workers))


def _arrays(dataset: Path) -> Iterator[tuple[Any, Any]]:
    store, manifest = read_dataset(dataset)
    reader = Reader(store, "train", manifest.splits["train"], max_open=4, max_damaged=0)
    for i, shard in enumerate(manifest.splits["train"]):
        for position in range(shard.num_samples):
            sample = reader.read(i, position, lambda extensions: (LATENT, TEXT))
            yield (
                decode_tensor(sample.members[LATENT], sample.meta.latent),
                decode_tensor(sample.members[TEXT], sample.meta.text),
            )


def write_litdata(dataset: Path, folder: Path) -> None:
    from litdata.streaming import Cache

    shutil.rmtree(folder, ignore_errors=True)
    cache = Cache(str(folder), chunk_bytes="64MB")
    for i, (latent, text) in enumerate(_arrays(dataset)):
        cache[i] = {"latent": torch.from_numpy(latent), "text": torch.from_numpy(text)}
    cache.done()
    cache.merge()


def litdata_samples(folder: Path, num_workers: int) -> Iterator[Pair]:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    batches = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    return ((sample["latent"], pad(sample["text"])) for sample in batches)


def write_mosaic(dataset: Path, folder: Path) -> None:
    from streaming import MDSWriter

    shutil.rmtree(folder, ignore_errors=True)
    with MDSWriter(out=str(folder), columns={"latent": "ndarray", "text": "ndarray"}) as out:
        for latent, text in _arrays(dataset):
            out.write({"latent": latent, "text": text})


def mosaic_samples(folder: Path, num_workers: int) -> Iterator[Pair]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # what a killed run of it leaves stops its next one
    dataset = StreamingDataset(local=str(folder), batch_size=1, shuffle=True)
    batches = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    return (
        (torch.as_tensor(sample["latent"]), pad(torch.as_tensor(sample["text"])))
        for sample in batches
    )
