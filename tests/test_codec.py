"""The tensor codec: what is merged anywhere, with or without zstd's checksum, are the numbers
that were packed.
"""

import numpy as np
import torch
import zstandard

from loader.feed import merge_planes
from loader.sample import TensorInfo, decode_planes, decode_tensor, encode_tensor, without_checksum


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
