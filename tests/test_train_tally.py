"""Losses are means over the interval and apart by task; what is not finite is counted."""

import math
from typing import Any

import pytest
import torch

from loader.batch import Batch
from loader.shape import Bucket
from tools.fake.step import random_batch
from train import optim
from train.lora.linear import AdapterParameter
from train.optim import FlatParameters
from train.tally import Faults, Sums, Tally, add_losses, sums_of

CPU = torch.device("cpu")


@pytest.fixture
def flat() -> FlatParameters:
    return optim.flatten([AdapterParameter(torch.randn(4))])


def batch(is_i2v: list[bool], num_frames: int = 9) -> Batch:
    return random_batch(Bucket(64, 64, num_frames), CPU, is_i2v=is_i2v)


def step(
    tally: Tally, flat: FlatParameters, loss: float = 1.0, grad_norm: float = 1.0, **other: Any
) -> None:
    flat.buffer.zero_()
    flat.loss.fill_(loss)
    scale = torch.tensor(other.get("loss_scale", 1.0))
    tally.step(flat, torch.tensor(grad_norm), scale, other.get("index", 0))


def read(tally: Tally) -> Sums:
    return sums_of(tally.read_later().read())


def test_losses_are_means_over_all_steps_of_the_interval(flat: FlatParameters) -> None:
    tally = Tally(CPU, scaling=False)
    for loss in (1.0, 2.0, 6.0):
        step(tally, flat, loss)
    assert read(tally).loss == 3.0
    step(tally, flat, 5.0)
    assert read(tally).loss == 5.0


def test_tasks_have_losses_of_their_own_over_their_samples(flat: FlatParameters) -> None:
    tally = Tally(CPU, scaling=False)
    add_losses(flat, torch.tensor([1.0, 4.0]), batch([False, True]), global_batch=6)
    add_losses(flat, torch.tensor([3.0, 3.0]), batch([False, False]), global_batch=6)
    add_losses(flat, torch.tensor([7.0, 9.0]), batch([False, False], num_frames=1), global_batch=6)
    tally.step(flat, torch.tensor(1.0), torch.tensor(1.0), 0)
    sums = read(tally)
    assert sums.task_losses == {"t2v": pytest.approx(7 / 3), "i2v": 4.0, "image": 8.0}
    assert sums.loss == pytest.approx(27 / 6)
    step(tally, flat)
    assert read(tally).task_losses == {"t2v": None, "i2v": None, "image": None}


@pytest.mark.parametrize(
    ("loss", "grad_norm", "loss_scale", "scaling", "counted_as"),
    [
        (1.0, 1.0, 1.0, False, None),
        (math.nan, 1.0, 1.0, False, "skipped"),
        (1.0, math.inf, 1.0, False, "skipped"),
        (1.0, math.inf, 2.0**20, True, "overflow"),
        (1.0, math.nan, 2.0**-11, True, "skipped"),
        (1.0, math.nan, 0.0, True, "skipped"),
        (math.inf, 1.0, 2.0**20, True, "skipped"),
        (1.0, 1.0, 2.0**-11, True, None),
    ],
)
def test_an_overflow_is_normal_until_no_scale_helps(
    flat: FlatParameters,
    loss: float,
    grad_norm: float,
    loss_scale: float,
    scaling: bool,
    counted_as: str | None,
) -> None:
    tally = Tally(CPU, scaling)
    step(tally, flat, loss, grad_norm, loss_scale=loss_scale, index=7)
    skipped = counted_as == "skipped"
    assert tally.faults() == Faults(
        num_overflows=int(counted_as == "overflow"),
        num_skipped=int(skipped),
        in_a_row=int(skipped),
        newest=7 if skipped else -1,
    )


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean(flat: FlatParameters) -> None:
    tally = Tally(CPU, scaling=False)
    step(tally, flat, math.nan)
    assert read(tally).loss is None
    step(tally, flat, 2.0)
    step(tally, flat, math.inf)
    assert read(tally).loss == 2.0


def test_faults_in_a_row_end_with_a_good_step_and_go_on_after_a_checkpoint(
    flat: FlatParameters,
) -> None:
    tally = Tally(CPU, scaling=False)
    for index, loss in enumerate((math.nan, 1.0, math.nan, math.nan)):
        step(tally, flat, loss, index=index)
    assert tally.faults() == Faults(0, num_skipped=3, in_a_row=2, newest=3)
    resumed = Tally(CPU, scaling=False)
    resumed.load_state(tally.state())
    assert not resumed.faults().too_many
    step(resumed, flat, math.nan, index=4)
    assert resumed.faults() == Faults(0, num_skipped=4, in_a_row=3, newest=4)
    assert resumed.faults().too_many
