"""Flow matching: the formulas of the design, and what each sample's randomness depends on."""

import pytest
import torch

from loader.shape import Bucket
from train import flow
from train.flow import FlowConfig


def test_shift_moves_the_middle_and_keeps_the_ends() -> None:
    assert flow.shifted_sigma(0.0, 5) == 0.0 and flow.shifted_sigma(1.0, 5) == 1.0
    assert flow.shifted_sigma(0.5, 5) == pytest.approx(5 / 6)
    assert flow.shifted_sigma(0.3, 1) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("distribution", "median_share"), [("uniform", 0.1), ("logit_normal", 0.1586)]
)
def test_sigmas_follow_their_distribution(
    distribution: flow.TimestepDistribution, median_share: float
) -> None:
    """u below 0.1, or logit(u) below -1 (u < 0.2689), has this probability; five sigma of 20,000
    draws.
    """
    bound = 0.1 if distribution == "uniform" else 0.26894
    law = flow.NoiseLaw(1.0, distribution)
    sigmas = [flow.sample_sigma(seed, law) for seed in range(20_000)]
    share = sum(sigma < bound for sigma in sigmas) / len(sigmas)
    assert abs(share - median_share) < 5 * (median_share * (1 - median_share) / 20_000) ** 0.5
    assert all(0 < sigma < 1 for sigma in sigmas)


SMALL, LARGE = Bucket(832, 480, 9), Bucket(1280, 704, 49)


def test_a_shape_can_have_a_shift_of_its_own() -> None:
    config = FlowConfig(shift=5.0, shifts={"832x480x9": 3.0}, timesteps="logit_normal")
    assert flow.NoiseLaws(config).of(SMALL) == flow.NoiseLaw(3.0, "logit_normal")
    assert flow.NoiseLaws(config).of(LARGE) == flow.NoiseLaw(5.0, "logit_normal")
    flow.check_shifts(config, [SMALL, LARGE])
    with pytest.raises(ValueError, match=r"832x480x9 is no shape .* which are 1280x704x49; name"):
        flow.check_shifts(config, [LARGE])


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_bell_is_that_of_diffsynth_studio(shift: float) -> None:
    """Its table over 1,000 levels from 1 downwards: a bell around t = 500 less its lowest value,
    over its mean.
    """
    u = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)[:-1]
    sigmas = shift * u / (1 + (shift - 1) * u)
    bell = (-2 * (sigmas - 0.5).square()).exp()
    table = (bell - bell.min()) / (bell - bell.min()).mean()
    law = flow.NoiseLaw(shift, "uniform", "bell")
    ours = torch.tensor([flow.loss_weight(float(sigma), law) for sigma in sigmas])
    torch.testing.assert_close(ours.double(), table, rtol=0, atol=2e-3)
    assert flow.loss_weight(1.0, law) == 0.0 and max(ours) > 1.2


def test_the_bell_weighs_one_on_average_and_nothing_weighs_without_it() -> None:
    law = flow.NoiseLaw(3.0, "logit_normal", "bell")
    weights = [flow.loss_weight(flow.sample_sigma(seed, law), law) for seed in range(20_000)]
    assert sum(weights) / len(weights) == pytest.approx(1.0, abs=0.01)
    plain = law._replace(weighting="none")
    assert {flow.loss_weight(sigma, plain) for sigma in (0.0, 0.3, 1.0)} == {1.0}


def test_noise_depends_on_the_seed_alone() -> None:
    both = flow.sample_noise([5, 6], (48, 2, 4, 4), torch.device("cpu"))
    torch.testing.assert_close(
        flow.sample_noise([6], (48, 2, 4, 4), torch.device("cpu")), both[1:], atol=0, rtol=0
    )
    assert not torch.equal(both[0], both[1])
    assert abs(both.mean()) < 0.1 and abs(both.std() - 1) < 0.1


def test_i2v_keeps_the_first_frame_clean_and_out_of_the_loss() -> None:
    latent, noise = torch.randn(2, 48, 3, 4, 4), torch.randn(2, 48, 3, 4, 4)
    noised = flow.noise_latent(latent, noise, [0.4, 0.4], is_i2v=[True, False])
    torch.testing.assert_close(noised.latent_BCThw[0, :, 0], latent[0, :, 0])
    torch.testing.assert_close(
        noised.latent_BCThw[0, :, 1:], 0.6 * latent[0, :, 1:] + 0.4 * noise[0, :, 1:]
    )
    torch.testing.assert_close(noised.latent_BCThw[1], 0.6 * latent[1] + 0.4 * noise[1])
    assert noised.t_BR.tolist() == [
        [0.0, 400.0],
        [0.0, 400.0],
    ] and noised.num_clean_frames_B.tolist() == [1, 0]
    wrong = noised.target_BCThw.clone()
    wrong[:, :, 0] += 3
    losses = flow.sample_losses(wrong, noised.target_BCThw, noised.num_clean_frames_B)
    torch.testing.assert_close(losses, torch.tensor([0.0, 9 / 3]))


def test_a_raw_condition_replaces_the_first_frame_of_i2v_samples_only() -> None:
    latent, noise, condition = (
        torch.randn(2, 48, 3, 4, 4),
        torch.randn(2, 48, 3, 4, 4),
        torch.randn(2, 48, 1, 4, 4),
    )
    noised = flow.noise_latent(latent, noise, [0.4, 0.4], [True, False], condition)
    torch.testing.assert_close(noised.latent_BCThw[0, :, :1], condition[0])
    torch.testing.assert_close(noised.latent_BCThw[1], 0.6 * latent[1] + 0.4 * noise[1])


def test_the_loss_of_a_sample_is_its_own_mean() -> None:
    velocity, target = torch.zeros(2, 48, 3, 4, 4), torch.ones(2, 48, 3, 4, 4)
    target[1] *= 2
    assert flow.sample_losses(velocity, target, torch.tensor([1, 0])).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize(("boundary", "shift"), [(0.875, 12.0), (0.9, 5.0), (0.875, 3.0)])
def test_each_expert_draws_from_its_side_of_the_boundary_and_the_law_inside_is_the_whole_ones(
    distribution: flow.TimestepDistribution, boundary: float, shift: float
) -> None:
    whole = flow.NoiseLaw(shift, distribution)
    high = flow.NoiseLaw(shift, distribution, expert="high", boundary=boundary)
    low = high._replace(expert="low")
    quantiles = [(i + 0.5) / 4000 for i in range(4000)]
    sigmas = [flow.sigma_at(q, whole) for q in quantiles]
    below = [sigma for sigma in sigmas if sigma < boundary]
    share = flow.boundary_quantile(high)
    assert abs(len(below) / len(sigmas) - share) < 1e-3
    for law, part in ((low, below), (high, sigmas[len(below) :])):
        drawn = [flow.sigma_at(q, law) for q in quantiles]
        assert all((sigma >= boundary) == (law is high) for sigma in drawn)
        # quantiles of the part's draws are those of the whole law inside of it
        for q in (0.1, 0.5, 0.9):
            expected = part[int(q * len(part))]
            assert flow.sigma_at(q, law) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("boundary", "shift", "high_share"),
    [(0.875, 12.0, 0.632), (0.875, 5.0, 0.417), (0.9, 5.0, 0.357), (0.9, 3.0, 0.25)],
)
def test_the_share_of_u_above_the_boundary_follows_the_shift(
    boundary: float, shift: float, high_share: float
) -> None:
    law = flow.NoiseLaw(shift, expert="high", boundary=boundary)
    assert 1 - flow.boundary_quantile(law) == pytest.approx(high_share, abs=5e-4)
    assert flow.shifted_sigma(flow.unshifted(0.3, shift), shift) == pytest.approx(0.3)


def test_both_experts_see_the_same_draws() -> None:
    """One seed is as far into either part of the law."""
    high = flow.NoiseLaw(12.0, expert="high", boundary=0.875)
    low = high._replace(expert="low")
    u_b = flow.boundary_quantile(high)
    for seed in range(50):
        into_high = (flow.unshifted(flow.sample_sigma(seed, high), 12.0) - u_b) / (1 - u_b)
        into_low = flow.unshifted(flow.sample_sigma(seed, low), 12.0) / u_b
        assert into_high == pytest.approx(into_low, abs=1e-9)


def test_what_is_given_follows_the_mask_of_the_first_latent_frame() -> None:
    noised, given = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 16, 3, 4, 6).half()
    latent = flow.with_given(noised, given)
    assert latent.shape == (2, 36, 3, 4, 6) and latent.dtype == torch.float32
    assert torch.equal(latent[:, :16], noised) and torch.equal(latent[:, 20:], given.float())
    assert bool((latent[:, 16:20, 0] == 1).all()) and not latent[:, 16:20, 1:].any()


def test_the_experts_part_of_u_follows_the_shift_of_each_shape() -> None:
    config = FlowConfig(shift=12.0, shifts={str(SMALL): 3.0})
    laws = flow.NoiseLaws(config, expert="high", boundary=0.875)
    assert 1 - flow.boundary_quantile(laws.of(LARGE)) == pytest.approx(0.632, abs=5e-4)
    assert 1 - flow.boundary_quantile(laws.of(SMALL)) == pytest.approx(0.300, abs=5e-4)
    assert flow.sigma_at(0.0, laws.of(SMALL)) == pytest.approx(0.875)
