"""The flat vector, the schedule and clipping."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from train import optim
from train.average import Average, decay_after
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


@pytest.mark.parametrize("step, expected", [(4, 0.5), (10, 1.0), (35, 0.75), (110, 0.0)])
def test_a_line_ends_at_zero_too(step: int, expected: float) -> None:
    linear = OptimConfig(lr=1.0, schedule="linear", warmup_steps=10)
    assert optim.learning_rate(step, 110, linear) == pytest.approx(expected)


def test_b_learns_at_a_multiple_of_the_rate_of_a() -> None:
    """As two optimizers would; and the two groups are views of the one vector."""
    first, second = make(), make(seed=1)
    config = OptimConfig(lr=0.1, lora_plus_ratio=16.0, schedule="linear", weight_decay=0.0)
    theirs = [
        nn.Parameter(torch.cat([p.detach().flatten() for p in part])) for part in (first, second)
    ]
    each = [
        torch.optim.AdamW([parameter], lr=1.0, eps=config.eps, weight_decay=0.0)
        for parameter in theirs
    ]
    flat = optim.flatten(first, second)
    ours = optim.make_optimizer(flat.groups, config)
    assert [len(group) for group in flat.groups] == [17, 17] and flat.vector.numel() == 34
    for step in range(4):
        flat.gradient.copy_(torch.randn(34, generator=torch.Generator().manual_seed(step)))
        lr = optim.learning_rate(step, 10, config)
        optim.set_learning_rate(ours, lr, config)
        assert [group["lr"] for group in ours.param_groups] == [lr, 16.0 * lr]
        ours.step()
        for number, (parameter, optimizer) in enumerate(zip(theirs, each, strict=True)):
            parameter.grad = flat.gradient[17 * number : 17 * (number + 1)].clone()
            optimizer.param_groups[0]["lr"] = lr * config.lora_plus_ratio**number
            optimizer.step()
    torch.testing.assert_close(
        flat.vector.detach(), torch.cat([parameter.detach() for parameter in theirs])
    )
    assert torch.equal(second[1].detach(), flat.vector[-5:].detach())


def test_the_average_is_that_of_diffusers() -> None:
    parameter = nn.Parameter(torch.randn(7))
    theirs, ours = EMAModel([parameter], decay=0.6), Average(parameter, decay=0.6)
    for step in range(1, 21):
        parameter.data.add_(torch.randn(7, generator=torch.Generator().manual_seed(step)))
        theirs.step([parameter])
        ours.update(parameter, step)
        torch.testing.assert_close(ours.vector, theirs.shadow_params[0].detach())
    assert [decay_after(step, 0.6) for step in (1, 2, 20)] == [0.0, 2 / 11, 0.6]


def test_the_average_is_shown_for_a_while_and_changes_nothing() -> None:
    parameter = nn.Parameter(torch.randn(7))
    before, seen = parameter.detach().clone(), []
    average = Average(torch.zeros(7), decay=0.5)
    with (
        pytest.raises(OSError),
        average.shown(parameter, lambda: seen.append(parameter.detach().clone())),
    ):
        raise OSError
    assert torch.equal(seen[0], torch.zeros(7)) and torch.equal(seen[1], before)
    assert torch.equal(parameter.detach(), before)


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
