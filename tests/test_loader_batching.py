"""batching.py: ranks and micro-batches only share a global batch out."""

import pytest

from loader.batching import Batching, micro_batch_for, micro_slice


def test_world_sizes_and_micro_batches_only_share_the_batch_out() -> None:
    whole = list(range(24))
    for world_size in (1, 2, 3, 4, 8):
        for micro_batch in (1, 24 // world_size):
            parts = [
                whole[micro_slice(step, rank, world_size, micro_batch)]
                for step in range(24 // (world_size * micro_batch))
                for rank in range(world_size)
            ]
            assert [sample for part in parts for sample in part] == whole


@pytest.mark.parametrize(
    ("share", "num_tokens", "micro_tokens", "expected"),
    [
        (8, 1170, 11440, 8),
        (8, 1170, 9359, 4),
        (8, 1170, 1170, 1),
        (8, 11440, 8000, 1),  # a single sample is computed whatever it takes
        (12, 100, 599, 4),  # 5 is no divisor
        (12, 100, 600, 6),
        (7, 100, 650, 1),
        (1, 5, 10**9, 1),
    ],
)
def test_a_micro_batch_is_the_largest_divisor_whose_tokens_fit(
    share: int, num_tokens: int, micro_tokens: int, expected: int
) -> None:
    assert micro_batch_for(share, num_tokens, micro_tokens) == expected


def test_sizes_that_do_not_divide_are_refused() -> None:
    Batching(global_batch=24, micro_batch=3, world_size=4).check()
    Batching(global_batch=24, micro_batch=5, micro_tokens=100, world_size=4).check()
    with pytest.raises(ValueError, match="24 is not a multiple of micro-batch 5 x world size 1"):
        Batching(global_batch=24, micro_batch=5).check()
    with pytest.raises(ValueError, match="24 is not a multiple of micro-batch 1 x world size 5"):
        Batching(global_batch=24, micro_tokens=100, world_size=5).check()
