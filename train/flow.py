"""Flow matching as Wan2.2 is trained: timesteps, noising, target and loss, as pure functions.

    x_s = (1 - s) x0 + s eps      target v = eps - x0
    s = shift u / (1 + (shift - 1) u)                     t = 1000 s
    loss = weight(s) |v - model|^2                        weight 1, or a bell

Image-to-video of TI2V-5B: latent frame 0 is the clean one, its tokens have t = 0, and it is left
out of the loss. Everything that is random about a sample follows from its seed, so a run on another
number of GPUs sees the same noise.

A model of two experts has one for the high noise levels, s >= boundary, and one for the low ones. A
run that trains one of them draws from its part of the law: the draws of a sample are mapped onto
that part of u, so the law inside of it is the same as before, and runs of both experts see the same
draws.

Shapes: B samples, C latent channels, T/h/w latent frames, rows and columns, R = 2 modulation rows.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from loader.models import Expert
from loader.shape import Bucket

TimestepDistribution = Literal["uniform", "logit_normal"]
Weighting = Literal["none", "bell"]
Positive = Annotated[float, Meta(gt=0.0)]


class FlowConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[flow]` table: from which noise levels the model learns."""

    # More noise for larger pictures, because neighbours tell more of each other there (SD3, arXiv
    # 2403.03206, section 5.3.2). Unset: the model's own, the sample_shift of its repository, 5 for
    # TI2V-5B (at 480p it has 3), 12 and 5 for T2V-A14B and I2V-A14B, 5 for Wan2.1.
    shift: Positive | None = None
    # of single shapes, where a run has small and large ones: {"832x480x9" = 3.0}
    shifts: dict[str, Positive] = {}
    # of u, before the shift: "uniform", or "logit_normal", u = sigmoid of a standard normal, more
    # of the middle (SD3, section 3.1)
    timesteps: TimestepDistribution = "uniform"
    # of a sample's loss: "none", or "bell", exp(-2 (s - 1/2)^2) less its value at s = 0 and 1, over
    # its mean, so that the middle counts more and pure noise nothing (DiffSynth-Studio,
    # FlowMatchScheduler.set_training_weight). Validation is not weighted.
    weighting: Weighting = "none"


class NoiseLaw(NamedTuple):
    """From which noise levels samples of one shape are drawn, and what their losses weigh. Of a
    model of two experts the part of one of them, on its side of the sigma `boundary`.
    """

    shift: float = 5.0
    timesteps: TimestepDistribution = "uniform"
    weighting: Weighting = "none"
    expert: Expert | None = None
    boundary: float = 0.0


class NoiseLaws(NamedTuple):
    """Of a run: `config` with its shift set, and the expert that is trained, if there are two."""

    config: FlowConfig = FlowConfig(shift=5.0)
    expert: Expert | None = None
    boundary: float = 0.0

    def of(self, bucket: Bucket) -> NoiseLaw:
        """Of samples of this shape. The boundary is a sigma, so the part of u that an expert has
        follows the shape's shift.
        """
        config = self.config
        shift = config.shifts.get(str(bucket), config.shift)
        assert shift is not None, "the run's configuration is resolved"
        return NoiseLaw(
            shift, config.timesteps, config.weighting, expert=self.expert, boundary=self.boundary
        )


class Noised(NamedTuple):
    """What the model gets and what it must predict, float32; see train.model.wan.Wan.forward for
    the first three.
    """

    latent_BCThw: Tensor
    t_BR: Tensor
    num_clean_frames_B: Tensor
    target_BCThw: Tensor


def shifted_sigma(u: float, shift: float) -> float:
    """Noise level in [0, 1] for u in [0, 1]; shift > 1 moves weight to the noisy end."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(sigma: float, shift: float) -> float:
    """The u of which `shifted_sigma` makes `sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def sample_sigma(seed: int, law: NoiseLaw) -> float:
    """The noise level of the sample with this 63-bit seed, in Python floats: the same on every
    device.
    """
    return sigma_at((_splitmix64(seed) + 0.5) / 2**64, law)


def sigma_at(quantile: float, law: NoiseLaw) -> float:
    """The noise level at a quantile of the law that levels are drawn from."""
    if law.expert is not None:
        below = boundary_quantile(law)
        high = law.expert == "high"
        quantile = below + (1 - below) * quantile if high else below * quantile
    u = quantile
    if law.timesteps == "logit_normal":
        u = 1 / (1 + math.exp(-statistics.NormalDist().inv_cdf(quantile)))
    return shifted_sigma(u, law.shift)


def boundary_quantile(law: NoiseLaw) -> float:
    """The share of the whole law that lies below the boundary."""
    u = unshifted(law.boundary, law.shift)
    if law.timesteps == "logit_normal":
        return statistics.NormalDist().cdf(math.log(u / (1 - u)))
    return u


def check_shifts(config: FlowConfig, buckets: Iterable[Bucket]) -> None:
    """Raises ValueError if a shape in `shifts` is none of `buckets`: it would change nothing."""
    shapes = {str(bucket) for bucket in buckets}
    unknown = sorted(config.shifts.keys() - shapes)
    if unknown:
        raise ValueError(
            f"flow.shifts: {', '.join(unknown)} is no shape of the datasets or of the samples, "
            f"which are {', '.join(sorted(shapes))}; name one of these"
        )


def loss_weight(sigma: float, law: NoiseLaw) -> float:
    """What the loss of a sample at this noise level is multiplied by; 1 on average over the levels
    of the law.
    """
    return 1.0 if law.weighting == "none" else _bell(sigma) / _mean_bell(law)


def _bell(sigma: float) -> float:
    return math.exp(-2 * (sigma - 0.5) ** 2) - math.exp(-0.5)


@cache
def _mean_bell(law: NoiseLaw) -> float:
    quantiles = [(i + 0.5) / 1000 for i in range(1000)]
    return statistics.fmean(_bell(sigma_at(quantile, law)) for quantile in quantiles)


def _splitmix64(x: int) -> int:
    """One step of the SplitMix64 generator: decorrelates the timestep from the noise, which uses
    the seed as it is.
    """
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def to_device(
    values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of Python numbers, through pinned memory: an ordinary copy would wait for all work
    on the GPU.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def sample_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal float32 [B, *shape], sample by sample from its seed. CPU and GPU draw
    different numbers.
    """
    generator = torch.Generator(device)
    return torch.stack(
        [
            torch.randn(*shape, generator=generator.manual_seed(seed), device=device)
            for seed in seeds
        ]
    )


def noise_latent(
    latent_BCThw: Tensor,
    noise_BCThw: Tensor,
    sigmas: Sequence[float],
    is_i2v: Sequence[bool],
    condition_BC1hw: Tensor | None = None,
) -> Noised:
    """Noise a batch of clean latents. `condition_BC1hw` replaces the clean first frame of I2V
    samples if given.
    """
    device = latent_BCThw.device
    x0_BCThw = latent_BCThw.float()
    sigma_B = to_device(sigmas, torch.float32, device)
    i2v_B = to_device(is_i2v, torch.bool, device)

    sigma_B1111 = sigma_B.view(-1, 1, 1, 1, 1)
    noised_BCThw = (1 - sigma_B1111) * x0_BCThw + sigma_B1111 * noise_BCThw
    # image-to-video: latent frame 0 stays clean
    first_BC1hw = x0_BCThw[:, :, :1] if condition_BC1hw is None else condition_BC1hw.float()
    noised_BCThw[:, :, :1] = torch.where(
        i2v_B.view(-1, 1, 1, 1, 1), first_BC1hw, noised_BCThw[:, :, :1]
    )
    # row 0 of the modulation is for clean tokens, row 1 for noised ones
    t_BR = torch.stack([torch.zeros_like(sigma_B), 1000 * sigma_B], dim=1)
    return Noised(
        latent_BCThw=noised_BCThw,
        t_BR=t_BR,
        num_clean_frames_B=i2v_B.long(),
        target_BCThw=noise_BCThw - x0_BCThw,
    )


def with_given(noised_BCThw: Tensor, given_BCThw: Tensor, stride_t: int = 4) -> Tensor:
    """What I2V-A14B takes: the noised latent, a mask and what is given, as float32 [B, C + 4 + Cc,
    T, h, w]. The mask says which of the `stride_t` frames of each latent frame are known: those of
    the first latent frame, as diffusers repeats its single frame.
    """
    batch, _, num_frames, height, width = noised_BCThw.shape
    mask_BCThw = noised_BCThw.new_zeros(batch, stride_t, num_frames, height, width)
    mask_BCThw[:, :, 0] = 1
    return torch.cat([noised_BCThw, mask_BCThw, given_BCThw.float()], dim=1)


def sample_losses(
    velocity_BCThw: Tensor, target_BCThw: Tensor, num_clean_frames_B: Tensor
) -> Tensor:
    """Per sample the mean squared error over the frames that were noised: float32 [B]."""
    error_BT = (velocity_BCThw - target_BCThw).square().mean(dim=(1, 3, 4))
    frames_T = torch.arange(error_BT.shape[1], device=error_BT.device)
    noised_BT = frames_T >= num_clean_frames_B[:, None]
    return (error_BT * noised_BT).sum(1) / noised_BT.sum(1)


def token_losses(
    velocity_BLP: Tensor,
    target_BLP: Tensor,
    clean_tokens_B: Tensor,
    first_token: int,
    num_tokens: int,
) -> Tensor:
    """What the tokens from `first_token` on contribute to each of `sample_losses`: float32 [B]; the
    sum over all parts of a sample is its loss. Both cut up as train.model.wan.velocity_tokens does;
    clean_tokens_B, num_tokens: of the whole sample.
    """
    error_BL = (velocity_BLP - target_BLP).square().mean(dim=2)
    token_L = torch.arange(first_token, first_token + error_BL.shape[1], device=error_BL.device)
    noised_BL = token_L >= clean_tokens_B[:, None]
    return (error_BL * noised_BL).sum(1) / (num_tokens - clean_tokens_B)
