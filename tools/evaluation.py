"""What validation and samples add to a run, and what its evaluation takes at the end, counted in
forward passes and modelled with a card's rates as the step is (tools/budget.py); tools.plan prints
it.

Left out: the base's losses and clips of samples, made once; reading; the VAE's decoder, for which
there is no rate; the networks that score.
"""

from collections.abc import Mapping
from typing import NamedTuple

from loader.models import kind_of
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import Bucket, LatentLayout
from tools.budget import CardBudget, Span, seconds
from tools.cards import Rates
from tools.counts import forward_of
from tools.evaluate.config import SamplingConfig, SetConfig
from train.activations.sizes import Shape, kernels_by_tag
from train.base import layout_of
from train.config import TrainConfig
from train.flow import unshifted
from train.model.wan import WanConfig
from train.validate import LEVELS_U, TRAIN_LEVELS


class Evaluation(NamedTuple):
    """Seconds of one validation and of one event of samples, and what they are of the run's time;
    shares are those of the slow rates.
    """

    validation_s: Span
    samples_s: Span
    # of a step with its part of both
    with_both_s: Span
    validation_share: float
    samples_share: float


def evaluation(
    config: TrainConfig,
    wan: WanConfig,
    shares: Mapping[Bucket, float],
    num_gpus: int,
    one: CardBudget,
) -> Evaluation | None:
    """On the card of `one`; None where its step has no time. `shares`: how often each shape comes,
    in training and, it is assumed, among the windows of validation.
    """
    if one.step_s is None:
        return None
    both = [
        _on_rates(config, wan, shares, num_gpus, one, rates, step_s)
        for rates, step_s in ((one.card.fast, one.step_s.fast), (one.card.slow, one.step_s.slow))
    ]
    fast, slow = both
    return Evaluation(
        validation_s=Span(fast.validation_s, slow.validation_s),
        samples_s=Span(fast.samples_s, slow.samples_s),
        with_both_s=Span(fast.with_both_s, slow.with_both_s),
        validation_share=slow.validation_a_step_s / slow.with_both_s,
        samples_share=slow.samples_a_step_s / slow.with_both_s,
    )


class _Seconds(NamedTuple):
    validation_s: float
    samples_s: float
    validation_a_step_s: float
    samples_a_step_s: float
    with_both_s: float


def _on_rates(
    config: TrainConfig,
    wan: WanConfig,
    shares: Mapping[Bucket, float],
    num_gpus: int,
    one: CardBudget,
    rates: Rates,
    step_s: float,
) -> _Seconds:
    validation, samples = config.validation, config.samples
    # windows and clips are shared by the ranks, whole ones
    windows, train_windows = (
        -(-number // num_gpus) for number in (validation.num_windows, validation.num_train_windows)
    )
    num_passes = windows * len(LEVELS_U) + train_windows * len(LEVELS_U[TRAIN_LEVELS])
    validation_s = num_passes * _forward_s(config, wan, shares, one, rates)
    clips = -(-(len(samples.keys) or samples.num_clips) // num_gpus)
    passes = sampled_steps(config, wan) * (1 if samples.guidance == 1.0 else 2)
    sampled = _sampled(config, shares, layout_of(wan))
    samples_s = clips * passes * _forward_s(config, wan, sampled, one, rates)
    validation_a_step_s = validation_s / validation.every if validation.every else 0.0
    samples_a_step_s = samples_s / samples.every if samples.every else 0.0
    return _Seconds(
        validation_s,
        samples_s,
        validation_a_step_s,
        samples_a_step_s,
        step_s + validation_a_step_s + samples_a_step_s,
    )


def _forward_s(
    config: TrainConfig,
    wan: WanConfig,
    weights: Mapping[Bucket, float],
    one: CardBudget,
    rates: Rates,
) -> float:
    """One pass of one sample with the adapters, the mean over shapes."""
    dtype_bytes = 4 if config.model.dtype == "float32" else 2
    total_s = 0.0
    for bucket, weight in weights.items():
        num_tokens = layout_of(wan).num_tokens(bucket)
        passes = forward_of(wan, num_tokens, config.lora.targets, config.lora.rank, dtype_bytes)
        kernels = kernels_by_tag(Shape(1, num_tokens, MAX_TEXT_TOKENS), one.kernels)
        total_s += weight * seconds(passes, rates, kernels)
    return total_s / sum(weights.values())


class FinalEvaluation(NamedTuple):
    """What `tools.evaluate final` draws after a run, of each variant; see tools/evaluate."""

    num_clips: int
    num_steps: int
    guidance: float

    def clip_s(
        self, config: TrainConfig, wan: WanConfig, shares: Mapping[Bucket, float], one: CardBudget
    ) -> Span | None:
        """Denoising one clip on the card of `one`, of the videos among `shares`; None where its
        step has no time.
        """
        if one.step_s is None:
            return None
        passes = self.num_steps * (1 if self.guidance == 1.0 else 2)
        videos = _videos(shares)
        return Span(*(passes * _forward_s(config, wan, videos, one, r) for r in one.card.rates))

    def seconds(self, clip_s: Span, num_gpus: int, num_variants: int) -> Span:
        """Of all clips: the cards share those of each variant, whole ones."""
        num_clips = num_variants * -(-self.num_clips // num_gpus)
        return Span(*(num_clips * each for each in clip_s))


def final_evaluation(config: TrainConfig) -> FinalEvaluation:
    """That of `config`'s run, its set the one of EvaluateConfig."""
    usual, samples = SetConfig(), config.samples
    return FinalEvaluation(
        num_clips=usual.num_prompts * usual.num_seeds,
        num_steps=samples.num_steps,
        guidance=samples.guidance or SamplingConfig().guidance,
    )


def sampled_steps(config: TrainConfig, wan: WanConfig) -> float:
    """How many steps a clip takes: of a model of two experts those of the one that is trained."""
    num_steps, expert = config.samples.num_steps, config.model.expert
    kind = kind_of(wan.in_channels, wan.out_channels, has_experts=expert is not None)
    if kind is None or kind.boundary is None:
        return num_steps
    share_low = unshifted(kind.boundary, config.flow.shift or kind.shift)
    return num_steps * (share_low if expert == "low" else 1 - share_low)


def _sampled(
    config: TrainConfig, shares: Mapping[Bucket, float], layout: LatentLayout
) -> Mapping[Bucket, float]:
    """The shapes of the clips: `samples.shape`, or those of videos where there are any."""
    if config.samples.shape:
        return {layout.parse(config.samples.shape): 1.0}
    return _videos(shares)


def _videos(shares: Mapping[Bucket, float]) -> Mapping[Bucket, float]:
    """Those of videos where there are any."""
    return {bucket: share for bucket, share in shares.items() if bucket.num_frames > 1} or shares
