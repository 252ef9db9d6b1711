"""sample.py: tensors are the numbers that were packed, and KEY.json is read strictly, but for a
newer version's sake.
"""

import msgspec
import numpy as np
import pytest
import torch
import zstandard

from loader.batch import merge_planes
from loader.sample import (
    SampleError,
    SampleMeta,
    TensorInfo,
    condition_info,
    decode_meta,
    decode_planes,
    decode_tensor,
    encode_meta,
    encode_tensor,
    without_checksum,
)


def test_merged_planes_are_the_numbers() -> None:
    array = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float16)
    info = TensorInfo("float16", array.shape)
    planes = torch.frombuffer(decode_planes(encode_tensor(array), info), dtype=torch.uint8).view(
        2, *array.shape
    )
    merged = torch.empty(array.shape, dtype=torch.float16)
    merge_planes(planes, merged)
    assert (merged.numpy() == array).all()


def test_a_frame_without_its_checksum_holds_the_same_numbers() -> None:
    array = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float16)
    stored = encode_tensor(array)
    frame = without_checksum(memoryview(bytearray(stored)))
    assert len(frame) == len(stored) - 4
    assert not zstandard.get_frame_parameters(frame).has_checksum
    assert (decode_tensor(frame, TensorInfo("float16", array.shape)) == array).all()
    assert without_checksum(frame) is frame  # has none
    assert bytes(without_checksum(memoryview(stored))) == stored  # can't be written to


def test_a_conditions_channels_follow_from_its_bytes() -> None:
    latent = TensorInfo("float16", (16, 2, 4, 6))
    stored = encode_tensor(np.ones((20, 2, 4, 6), np.float16))
    info = condition_info(stored, latent)
    assert info == TensorInfo("float16", (20, 2, 4, 6))
    assert decode_tensor(stored, info).shape == info.shape
    with pytest.raises(SampleError, match=r"condition\.zst holds 10 bytes"):
        condition_info(encode_tensor(np.ones(5, np.float16)), latent)
    with pytest.raises(SampleError, match="does not decompress"):
        condition_info(b"no frame", latent)


META = SampleMeta(
    key="0" * 32,
    clip_id="1",
    label="l.json",
    media_type="video",
    category="",
    programme="",
    split="train",
    prompt="",
    width_px=96,
    height_px=64,
    num_frames=5,
    fps=24.0,
    start_ms=0,
    shot=0,
    media_xxh3="",
    latent=TensorInfo("float16", (48, 2, 4, 6)),
    text=TensorInfo("float16", (2, 8)),
)


def test_metadata_of_a_newer_version_is_refused_with_advice_whatever_else_it_holds() -> None:
    fields = msgspec.json.decode(encode_meta(META))
    for newer in (fields | {"format_version": 2}, {"format_version": 2, "weather": "fine"}):
        with pytest.raises(SampleError, match=r"format_version 2.*update newsreel"):
            decode_meta(msgspec.json.encode(newer))
    with pytest.raises(SampleError, match="unknown field `weather`"):
        decode_meta(msgspec.json.encode(fields | {"weather": "fine"}))
    with pytest.raises(SampleError, match=r"json member: .*truncated"):
        decode_meta(b"{")
    with pytest.raises(SampleError, match="key 'a' is not 32 hexadecimal digits"):
        decode_meta(msgspec.json.encode(fields | {"key": "a"}))
