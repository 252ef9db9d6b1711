"""From scores to the rows of result.json: metrics of each variant, and paired differences. Pure
functions of what score.py has kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tools.evaluate.frechet import (
    MIN_CLIPS,
    Features,
    estimate,
    floor,
    frechet_distance,
    half_distances,
    kernel_distance,
)
from tools.evaluate.intervals import MIN_PROMPTS, Interval, bootstrap, holm, prompt_means
from tools.evaluate.result import NOT_MEASURED, Comparison, Metric, not_measured

# what a smaller value of a metric means; of all others a larger one is better
SMALLER_IS_BETTER = ("fvd", "kvd", "latent_frechet", "motion", "flicker", "sharpness")
BETTER, WORSE, UNDECIDED, TOO_FEW = "better", "worse", "undecided", "too_few"


class Samples(NamedTuple):
    """Values or features of a variant's clips, in one order for all variants but the real one."""

    values: Features
    prompts: list[str]
    categories: list[str]

    def of(self, category: str) -> "Samples":
        """Those of one category; of "" all."""
        chosen = [i for i, each in enumerate(self.categories) if category in ("", each)]
        return Samples(
            self.values[chosen],
            [self.prompts[i] for i in chosen],
            [self.categories[i] for i in chosen],
        )


def mean_metric(name: str, variant: str, samples: Samples, category: str, **texts: Any) -> Metric:
    """The mean over prompts of a number of each clip, with its interval."""
    some = samples.of(category)
    if not len(some.values):
        return not_measured(name, variant, "no clip of this category was decoded", category)
    by_prompt = prompt_means(some.prompts, some.values.tolist())
    interval = bootstrap(list(by_prompt.values()))
    enough = len(by_prompt) >= MIN_PROMPTS
    return Metric(
        name,
        variant,
        category,
        value=interval.value,
        low=interval.low if enough else None,
        high=interval.high if enough else None,
        n=len(some.values),
        why="" if enough else f"too few prompts for an interval: {len(by_prompt)}",
        **texts,
    )


def verdict(name: str, interval: Interval, significant: bool) -> str:
    if not significant or interval.low <= 0 <= interval.high:
        return UNDECIDED
    falls = interval.value < 0
    return BETTER if falls == (name in SMALLER_IS_BETTER) else WORSE


def mean_comparisons(
    name: str, variant: str, candidate: Samples, base: Samples, categories: Sequence[str]
) -> list[Comparison]:
    """Paired by prompt and seed, bootstrapped over prompts: in all, then by category, where only
    what Holm's procedure rejects is called better or worse.
    """
    assert candidate.prompts == base.prompts
    differences = Samples(candidate.values - base.values, base.prompts, base.categories)
    rows, tests = [], []
    for category in ("", *categories):
        some = differences.of(category)
        by_prompt = prompt_means(some.prompts, some.values.tolist())
        if by_prompt:
            tests.append((category, len(by_prompt), bootstrap(list(by_prompt.values()))))
    # the overall question is asked once; the categories are many
    enough = [test for test in tests if test[0] and test[1] >= MIN_PROMPTS]
    kept = dict(zip((test[0] for test in enough), holm([t[2].p for t in enough]), strict=True))
    for category, num_prompts, interval in tests:
        if num_prompts < MIN_PROMPTS:
            rows.append(
                Comparison(
                    name,
                    variant,
                    category=category,
                    difference=interval.value,
                    n=num_prompts,
                    verdict=TOO_FEW,
                )
            )
            continue
        significant = kept.get(category, True)
        rows.append(
            Comparison(
                name,
                variant,
                category=category,
                difference=interval.value,
                low=interval.low,
                high=interval.high,
                n=num_prompts,
                verdict=verdict(name, interval, significant),
            )
        )
    return rows


def distance_metric(
    name: str, variant: str, real_ND: Features, samples: Samples, category: str, **texts: Any
) -> Metric:
    """A Frechet distance to real clips with its floor; `why` holds its extrapolation, or says that
    there are too few clips for a verdict.
    """
    some = samples.of(category)
    if min(len(real_ND), len(some.values)) < 4:
        why = f"{len(real_ND)} real and {len(some.values)} other clips are too few"
        return not_measured(name, variant, why, category)
    found = estimate(real_ND, some.values, _numbers(some.prompts))
    few = min(len(real_ND), len(some.values)) < MIN_CLIPS
    extrapolated = f"extrapolated to infinitely many clips: {found.extrapolated:.4g}"
    note = f"; no verdict below {MIN_CLIPS} clips on each side" if few else ""
    return Metric(
        name,
        variant,
        category,
        value=found.value,
        low=found.low,
        high=found.high,
        n=len(some.values),
        why=extrapolated + note,
        floor=floor(real_ND),
        **texts,
    )


def kernel_metric(
    name: str, variant: str, real_ND: Features, samples: Samples, **texts: Any
) -> Metric:
    found = estimate(real_ND, samples.values, _numbers(samples.prompts), distance=kernel_distance)
    return Metric(
        name,
        variant,
        value=found.value,
        low=found.low,
        high=found.high,
        n=len(samples.values),
        floor=floor(real_ND, distance=kernel_distance),
        **texts,
    )


def distance_comparison(
    name: str, variant: str, real_ND: Features, candidate: Samples, base: Samples, category: str
) -> Comparison:
    """The difference of two distances to the same real clips; its interval from paired halves."""
    one, other = candidate.of(category), base.of(category)
    if min(len(real_ND), len(one.values)) < 4:
        return Comparison(name, variant, category=category, difference=NOT_MEASURED)
    numbers = _numbers(one.prompts)
    difference = frechet_distance(real_ND, one.values) - frechet_distance(real_ND, other.values)
    halves = half_distances(real_ND, [one.values, other.values], numbers)
    spread = 1.96 * float((halves[:, 0] - halves[:, 1]).std(ddof=1))
    interval = Interval(difference, difference - spread, difference + spread, 0.0)
    few = min(len(real_ND), len(one.values)) < MIN_CLIPS
    return Comparison(
        name,
        variant,
        category=category,
        difference=difference,
        low=interval.low,
        high=interval.high,
        n=len(one.values),
        verdict=TOO_FEW if few else verdict(name, interval, True),
    )


def _numbers(prompts: Sequence[str]) -> np.ndarray[Any, Any]:
    names = sorted(set(prompts))
    return np.array([names.index(prompt) for prompt in prompts])


def nearest_category(
    latents_ND: Features, real_ND: Features, real_categories: Sequence[str]
) -> list[str]:
    """Of each latent the category of the nearest real one."""
    squares_N, squares_M = np.square(latents_ND).sum(1), np.square(real_ND).sum(1)
    distances_NM = squares_N[:, None] + squares_M[None] - 2 * latents_ND @ real_ND.T
    return [real_categories[i] for i in distances_NM.argmin(1).tolist()]


def retrieved(table: Features, own: Sequence[int]) -> Features:
    """1 where a clip's own caption has the highest of its cosines [clips, captions], else 0."""
    return (table.argmax(1) == np.asarray(own)).astype(np.float64)


def grade(metrics: Sequence[Metric], comparisons: Sequence[Comparison], candidate: str) -> str:
    """By RULE: reached, missed, or not measured."""
    targets = [m for m in metrics if m.variant == candidate and m.target and not m.category]
    against_base = [c for c in comparisons if c.variant == candidate and not c.category]
    if any(m.reached is False for m in targets) or any(c.verdict == WORSE for c in against_base):
        return "missed"
    if not targets or any(m.reached is None for m in targets):
        return NOT_MEASURED
    return "reached"


RULE = (
    "reached: every target is reached and nothing is worse than the base beyond its error; missed: "
    "a target is missed or something is worse; not measured: a target's figure is missing, or has "
    "too few clips for a verdict"
)
