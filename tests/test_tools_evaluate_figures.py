"""From scores to verdicts: direction, error bars, Holm, and what has too few samples."""

import numpy as np
import pytest

from tools.evaluate.figures import (
    BETTER,
    TOO_FEW,
    UNDECIDED,
    WORSE,
    Samples,
    distance_comparison,
    distance_metric,
    grade,
    mean_comparisons,
    mean_metric,
    nearest_category,
    retrieved,
)
from tools.evaluate.result import NOT_MEASURED, Comparison, Metric


def samples(values: np.ndarray, num_seeds: int = 1, num_categories: int = 1) -> Samples:
    prompts = [f"p{i // num_seeds:03d}" for i in range(len(values))]
    categories = [f"c{(i // num_seeds) % num_categories}" for i in range(len(values))]
    return Samples(values, prompts, categories)


def drawn(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 6)) + shift


@pytest.mark.parametrize(
    ("name", "shift", "word"),
    [
        ("clip_cosine", 0.05, BETTER),
        ("clip_cosine", -0.05, WORSE),
        ("motion", -0.05, BETTER),
        ("motion", 0.05, WORSE),
        ("motion", 0.0, UNDECIDED),
    ],
)
def test_a_paired_difference_is_found_below_the_spread_of_prompts(
    name: str, shift: float, word: str
) -> None:
    random = np.random.default_rng(0)
    # prompts differ by ten times what the LoRA changes
    base = 0.5 * random.standard_normal(40)
    noise = 0.02 * random.standard_normal(40)
    noise -= noise.mean()
    (row,) = mean_comparisons(name, "lora", samples(base + shift + noise), samples(base), [])
    assert row.verdict == word and row.n == 40
    assert row.low is not None and row.high is not None and row.low < shift + 1e-3 < row.high + 1e-2


def test_nineteen_prompts_are_too_few_whatever_the_seeds() -> None:
    values = np.ones(19 * 4)
    (row,) = mean_comparisons("clip_cosine", "lora", samples(values, 4), samples(0 * values, 4), [])
    assert row.verdict == TOO_FEW and row.low is None and row.difference == 1.0
    metric = mean_metric("clip_cosine", "lora", samples(values, 4), "")
    assert metric.low is None and metric.why == "too few prompts for an interval: 19"


def test_one_of_many_categories_is_not_called_better_by_chance() -> None:
    random = np.random.default_rng(0)
    categories = [f"c{i}" for i in range(20)]
    base = samples(np.zeros(20 * 25), num_categories=20)
    found = samples(random.standard_normal(20 * 25), num_categories=20)
    rows = mean_comparisons("clip_cosine", "lora", found, base, categories)
    alone = [r for r in rows if r.category and r.low is not None and (r.low > 0 or r.high < 0)]  # type: ignore[operator]
    assert alone, "an interval of twenty that misses 0 by chance is what Holm is for"
    assert all(row.verdict == UNDECIDED for row in rows if row.category)


def test_a_distance_says_its_number_floor_and_extrapolation() -> None:
    real = drawn(80, 1)
    metric = distance_metric("latent_frechet", "lora", real, samples(drawn(80, 2, 1.0), 4), "")
    assert metric.n == 80 and metric.floor is not None
    assert isinstance(metric.value, float) and metric.value > metric.floor
    assert metric.why.startswith("extrapolated") and "no verdict" not in metric.why
    few = distance_metric("latent_frechet", "lora", real, samples(drawn(63, 2)), "")
    assert "no verdict below 64" in few.why
    none = distance_metric("latent_frechet", "lora", real, samples(drawn(3, 2)), "")
    assert none.value == NOT_MEASURED and "too few" in none.why


@pytest.mark.parametrize(("shifts", "word"), [((0.2, 1.0), BETTER), ((1.0, 0.2), WORSE)])
def test_a_distance_that_falls_is_better(shifts: tuple[float, float], word: str) -> None:
    real = drawn(80, 1)
    tuned, base = (samples(drawn(80, 2 + i, shift), 4) for i, shift in enumerate(shifts))
    assert distance_comparison("fvd", "lora", real, tuned, base, "").verdict == word
    few, few_base = (
        Samples(s.values[:60], s.prompts[:60], s.categories[:60]) for s in (tuned, base)
    )
    assert distance_comparison("fvd", "lora", real, few, few_base, "").verdict == TOO_FEW


def test_equal_variants_are_not_told_apart() -> None:
    real, base = drawn(80, 1), samples(drawn(80, 2, 0.5), 4)
    other = samples(drawn(80, 3, 0.5), 4)
    assert distance_comparison("fvd", "lora", real, other, base, "").verdict == UNDECIDED


def test_the_nearest_real_latent_and_the_own_caption_are_found() -> None:
    real = np.array([[0.0, 0.0], [10.0, 0.0]])
    found = nearest_category(np.array([[1.0, 1.0], [9.0, 2.0]]), real, ["cat", "rocket"])
    assert found == ["cat", "rocket"]
    table = np.array([[0.3, 0.1], [0.4, 0.2]])
    assert retrieved(table, [0, 1]).tolist() == [1.0, 0.0]


def target(reached: bool | None) -> Metric:
    return Metric("fvd", "lora", value=1.0, target="<= 2", reached=reached)


def test_the_grade_follows_its_rule() -> None:
    worse = Comparison("motion", "lora", verdict=WORSE)
    assert grade([target(True)], [], "lora") == "reached"
    assert grade([target(True), target(None)], [], "lora") == NOT_MEASURED
    assert grade([target(None), target(False)], [], "lora") == "missed"
    assert grade([target(True)], [worse], "lora") == "missed"
    assert grade([target(True)], [worse], "other") == NOT_MEASURED
    assert grade([], [], "lora") == NOT_MEASURED
