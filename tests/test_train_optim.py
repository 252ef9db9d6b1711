"""The flat vector, the schedule and clipping."""

import pytest
import torch

from train import optim
from train.lora.linear import AdapterParameter
from train.optim import OptimConfig


def make(seed: int = 0) -> list[AdapterParameter]:
    torch.manual_seed(seed)
    return [AdapterParameter(torch.randn(4, 3)), AdapterParameter(torch.randn(5))]


def test_parameters_and_gradients_are_views_of_one_vector() -> None:
    parameters = make()
    values = torch.cat([p.detach().flatten() for p in parameters])
    flat = optim.flatten(parameters)
    torch.testing.assert_close(flat.vector.detach(), values)
    sum((p**2).sum() for p in parameters).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(flat.gradient, 2 * values)
    flat.loss.add_(7.0)
    assert flat.buffer[flat.vector.numel()] == 7.0 and flat.vector.grad is not None
    assert flat.losses.tolist() == [7.0] + 2 * optim.NUM_TASKS * [0.0]
    torch.testing.assert_close(flat.vector.grad, 2 * values)
    flat.vector.data.zero_()
    assert all(not p.any() for p in parameters)


@pytest.mark.parametrize(
    "step, expected", [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.5), (110, 0.0)]
)
def test_warm_up_is_linear_and_the_cosine_ends_at_zero(step: int, expected: float) -> None:
    cosine = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=10)
    assert optim.learning_rate(step, 110, cosine) == pytest.approx(expected)
    if step >= 10:
        constant = OptimConfig(lr=1.0, schedule="constant", warmup_steps=10)
        assert optim.learning_rate(step, 110, constant) == 1.0


def test_clipping_scales_the_whole_gradient_and_reports_the_norm_before() -> None:
    gradient = torch.tensor([3.0, 4.0])
    assert optim.clip_gradient(gradient, 1.0) == 5.0
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)
    small = torch.tensor([0.3, 0.4])
    optim.clip_gradient(small, 1.0)
    torch.testing.assert_close(small, torch.tensor([0.3, 0.4]))
    large = torch.tensor([30.0, 40.0])
    optim.clip_gradient(large, 0.0)
    assert large.tolist() == [30.0, 40.0]
