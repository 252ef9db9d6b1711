"""The bytes that there are for activations: as asked for, or as the card has left."""

import pytest
import torch

from loader.shape import Bucket
from train.activations import budget


def test_a_wrong_budget_is_named() -> None:
    assert budget.parse_activation_memory("6.5GiB") == 6.5 * 2**30
    with pytest.raises(
        ValueError, match=r'activation_memory = "6GB": use "auto", "all", "block" or'
    ):
        budget.parse_activation_memory("6GB")


def test_the_allowance_of_the_raw_path_is_of_the_largest_picture_and_larger_for_clips() -> None:
    small, wide = Bucket(832, 480, 9), Bucket(1280, 704, 1)
    assert budget.raw_bytes([small], False) < budget.raw_bytes([wide, small], False) < 2 * 2**30
    assert budget.raw_bytes([wide, small], True) > 8 * 2**30


def test_auto_asks_for_a_gpu() -> None:
    with pytest.raises(ValueError, match='on a CPU set activation_memory to "block" or "all"'):
        budget.room_bytes(torch.device("cpu"))
