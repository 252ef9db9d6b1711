"""Intervals and tests of paired differences, over prompts. Pure functions.

A prompt's clips with other seeds are not independent of each other: what is drawn again is the
prompt, and its value is the mean over its seeds.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NUM_DRAWS = 4000
# below this many prompts an interval covers much less than it claims
MIN_PROMPTS = 20


class Interval(NamedTuple):
    """A mean with its 95% interval and the two-sided p-value against 0."""

    value: float
    low: float
    high: float
    p: float


def bootstrap(values: Sequence[float], seed: int = 0, num_draws: int = NUM_DRAWS) -> Interval:
    """Of the mean of `values`, one a prompt, by a percentile bootstrap."""
    values_P = np.asarray(values, np.float64)
    if not len(values_P) or not np.isfinite(values_P).all():
        raise ValueError(f"{len(values_P)} values: a bootstrap needs finite ones, at least one")
    random = np.random.default_rng(seed)
    drawn = random.integers(0, len(values_P), (num_draws, len(values_P)))
    means = values_P[drawn].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    # the share of draws beyond 0, twice; never 0, because more draws might find one
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    p = min(1.0, 2 * (beyond * num_draws + 1) / (num_draws + 1))
    return Interval(float(values_P.mean()), float(low), float(high), float(p))


def holm(p_values: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which of several hypotheses Holm's step-down procedure rejects, in the given order."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def wilson(num_yes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a share; of no answers it is [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    share, square = num_yes / n, z * z / n
    centre = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def prompt_means(prompts: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Prompt -> the mean over its seeds, in the order of the prompts' names."""
    found: dict[str, list[Any]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        found.setdefault(prompt, []).append(value)
    return {prompt: float(np.mean(found[prompt])) for prompt in sorted(found)}
