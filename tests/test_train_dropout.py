"""Which elements dropout drops follows from the sample's seed, the layer and the place alone."""

import pytest
import torch

from train.kernels.dropout import dropout_keys, dropout_survivors

KEYS_NB = dropout_keys(torch.tensor([2**62 + 5, 77]), 5)


def test_dropout_follows_the_sample_and_the_layer_not_the_batch() -> None:
    both = dropout_survivors(KEYS_NB[3], 50, 64, 0.1)
    assert torch.equal(both[1:], dropout_survivors(KEYS_NB[3, 1:], 50, 64, 0.1))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, dropout_survivors(KEYS_NB[4], 50, 64, 0.1))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_its_share_of_every_row_and_column(p: float) -> None:
    survivors_LK = dropout_survivors(dropout_keys(torch.tensor([123456789]), 1)[0], 1000, 1000, p)[
        0
    ].float()
    five_sigma = 5 * (p * (1 - p)) ** 0.5
    assert abs(survivors_LK.mean() - (1 - p)) < five_sigma / 1000
    assert (survivors_LK.mean(0) - (1 - p)).abs().max() < five_sigma / 1000**0.5
    assert (survivors_LK.mean(1) - (1 - p)).abs().max() < five_sigma / 1000**0.5
