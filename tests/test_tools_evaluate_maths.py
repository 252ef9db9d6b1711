"""Distances, intervals and votes: against closed forms, scipy and each other."""

import csv
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image import fid

from tools.evaluate.__main__ import say_votes
from tools.evaluate.frechet import (
    estimate,
    floor,
    frechet_distance,
    half_distances,
    kernel_distance,
)
from tools.evaluate.intervals import bootstrap, holm, prompt_means, wilson
from tools.evaluate.votes import (
    Vote,
    agreement,
    bradley_terry,
    krippendorff_alpha,
    self_consistency,
    votes_of_rows,
    win_rate,
)


def drawn(n: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Correlated normal features with a falling spectrum, as logits have."""
    mixing = np.random.default_rng(99).standard_normal((width, width))
    mixing *= np.exp(-np.arange(width) / (width / 4))
    normal = np.random.default_rng(seed).standard_normal((n, width))
    return scale * normal @ mixing.T + shift


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    covariances = [np.cov(each, rowvar=False) for each in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    means = np.square(x.mean(0) - y.mean(0)).sum()
    traces = sum(np.trace(each) for each in covariances)
    return float(means + traces - 2 * np.real(np.trace(root)))


@pytest.mark.parametrize("n", [12, 24, 200])
def test_the_frechet_distance_is_scipys_with_more_and_fewer_samples_than_features(n: int) -> None:
    x, y = drawn(n, 24, 1), drawn(n + 5, 24, 2, shift=0.3, scale=1.2)
    assert frechet_distance(x, y) == pytest.approx(by_scipy(x, y), rel=2e-3)


def test_the_frechet_distance_is_torchmetrics() -> None:
    x, y = drawn(300, 24, 1), drawn(300, 24, 2, shift=0.5)
    moments = [f(each) for each in (x, y) for f in (lambda a: a.mean(0), lambda a: np.cov(a.T))]
    expected = float(fid._compute_fid(*(torch.from_numpy(each) for each in moments)))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_of_one_feature_the_closed_form_holds() -> None:
    x, y = drawn(50, 1, 1), drawn(60, 1, 2, shift=2.0, scale=3.0)
    deviations = x.std(ddof=1), y.std(ddof=1)
    expected = (x.mean() - y.mean()) ** 2 + (deviations[0] - deviations[1]) ** 2
    assert frechet_distance(x, y) == pytest.approx(expected)


def test_the_distance_does_not_depend_on_the_order_and_is_zero_to_itself() -> None:
    x, y = drawn(40, 8, 1), drawn(40, 8, 2, shift=1.0)
    shuffled = y[np.random.default_rng(0).permutation(40)]
    assert frechet_distance(x, shuffled) == pytest.approx(frechet_distance(x, y))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(x, np.full((4, 8), np.nan))


def test_the_bias_falls_as_one_over_n_and_the_extrapolation_removes_it() -> None:
    found: dict[int, list[float]] = {n: [] for n in (64, 128, 256)}
    for n, values in found.items():
        for seed in range(8):
            values.append(frechet_distance(drawn(n, 16, 2 * seed), drawn(n, 16, 2 * seed + 1)))
    means = {n: float(np.mean(values)) for n, values in found.items()}
    assert means[64] / means[128] == pytest.approx(2, rel=0.15)
    assert means[128] / means[256] == pytest.approx(2, rel=0.15)
    rest = [estimate(drawn(128, 16, s), drawn(128, 16, s + 50)).extrapolated for s in range(6)]
    assert abs(np.mean(rest)) < 0.25 * means[128]


def test_the_interval_of_a_distance_contains_its_value_and_that_of_a_bootstrap_does_not() -> None:
    x, y = drawn(100, 16, 1), drawn(100, 16, 2, shift=0.2)
    found = estimate(x, y)
    assert found.low < found.value < found.high
    random = np.random.default_rng(0)
    resampled = [
        frechet_distance(x[random.integers(0, 100, 100)], y[random.integers(0, 100, 100)])
        for _ in range(60)
    ]
    assert np.quantile(resampled, 0.025) > found.value


def test_the_interval_covers_what_other_draws_find() -> None:
    values = [frechet_distance(drawn(96, 8, s), drawn(96, 8, s + 99, shift=0.4)) for s in range(30)]
    found = estimate(drawn(96, 8, 1), drawn(96, 8, 100, shift=0.4))
    assert 0.5 < (found.high - found.low) / (2 * 1.96 * np.std(values)) < 2


def test_halves_of_two_variants_are_cut_alike_and_by_prompt() -> None:
    real, base = drawn(40, 6, 1), drawn(40, 6, 2)
    groups = np.repeat(np.arange(10), 4)
    halves = half_distances(real, [base, base.copy()], groups, num_halves=10)
    assert np.array_equal(halves[:, 0], halves[:, 1]) and halves.std(0)[0] > 0


def test_the_floor_is_that_of_real_against_real() -> None:
    assert floor(drawn(3, 4, 1)) is None
    real = drawn(200, 8, 1)
    value = floor(real)
    assert value is not None and 0 < value < frechet_distance(real, drawn(200, 8, 2, shift=1.0))


def test_the_kernel_distance_is_unbiased_and_follows_its_definition() -> None:
    x, y = drawn(6, 3, 1), drawn(5, 3, 2, shift=0.5)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [
        np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
        for z in (x, y)
    ]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * across)
    equal = [kernel_distance(drawn(30, 4, s), drawn(30, 4, s + 500)) for s in range(60)]
    error = np.std(equal) / np.sqrt(60)
    assert abs(np.mean(equal)) < 3 * error and min(equal) < 0


def test_a_bootstrap_finds_a_difference_and_none() -> None:
    random = np.random.default_rng(0)
    clear = bootstrap((0.5 + random.standard_normal(40)).tolist())
    assert 0 < clear.low < clear.value < clear.high and clear.p < 0.05
    none = bootstrap(random.standard_normal(40).tolist())
    assert none.low < 0 < none.high and none.p > 0.05
    with pytest.raises(ValueError, match="finite"):
        bootstrap([])


def test_holm_rejects_fewer_than_single_tests_and_no_more_than_the_smallest() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.04, 0.04]) == [False, False]
    assert holm([]) == []


def test_wilsons_interval_has_its_published_values() -> None:
    assert wilson(12, 20) == pytest.approx((0.387, 0.781), abs=1e-3)
    assert wilson(120, 200) == pytest.approx((0.531, 0.665), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0) and wilson(5, 5)[1] == 1.0


def test_prompts_weigh_the_same_whatever_their_number_of_clips() -> None:
    assert prompt_means(["b", "a", "b"], [1.0, 5.0, 3.0]) == {"a": 5.0, "b": 2.0}


def vote(number: int, answer: str, *, left: str = "base", right: str = "lora", **more: str) -> Vote:
    rater, again = more.get("rater", "kim"), bool(more.get("again"))
    return Vote(f"p{number}", "overall", f"{number}", left, right, answer, again, rater)


def test_a_win_rate_does_not_depend_on_the_sides() -> None:
    one = [vote(i, "right") for i in range(30)] + [vote(i, "same") for i in range(30, 40)]
    other = [vote(i, "left" if i < 30 else "same", left="lora", right="base") for i in range(40)]
    found = win_rate(one, "lora", "base", "overall")
    assert found is not None and found == win_rate(other, "lora", "base", "overall")
    assert found.interval.value == pytest.approx(0.875) and found.advice == "better at 40 votes"
    assert found.wilson[0] < 0.875 < found.wilson[1]
    assert win_rate([vote(0, "unusable")], "lora", "base", "overall") is None


@pytest.mark.parametrize("num_prompts", [1, 19])
def test_few_prompts_decide_nothing_however_clear_they_are(num_prompts: int) -> None:
    found = win_rate([vote(i, "right") for i in range(num_prompts)], "lora", "base", "overall")
    assert found is not None and found.interval.value == 1.0
    assert found.advice == f"no verdict below 20 prompts, at {num_prompts} votes"


def test_repeated_pairs_say_how_consistent_a_rater_is() -> None:
    votes = [vote(0, "left"), vote(1, "left")]
    votes += [vote(0, "right", left="lora", right="base", again="x"), vote(1, "right", again="x")]
    assert self_consistency(votes) == (0.5, 2)
    assert self_consistency([vote(0, "left")]) == (None, 0)


def test_krippendorffs_alpha_has_its_published_value() -> None:
    # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", example C
    raters = [
        "*  *  *  *  *  3  4  1  2  1  1  3  3  *  3".split(),
        "1  *  2  1  3  3  4  3  *  *  *  *  *  *  *".split(),
        "*  *  2  1  3  4  4  *  2  1  1  3  3  *  4".split(),
    ]
    units = [[answer for answer in unit if answer != "*"] for unit in zip(*raters, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.691, abs=1e-3)
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1.0


def test_agreement_is_of_pairs_that_several_raters_saw() -> None:
    votes = [vote(0, "left"), vote(0, "left", rater="lee"), vote(1, "left")]
    assert agreement(votes, "overall") == (1.0, None, 1)


def test_bradley_terry_finds_the_strengths_that_votes_were_drawn_from() -> None:
    names, strengths = ["a", "b", "c", "d"], np.array([-0.9, -0.2, 0.3, 0.8])
    random = np.random.default_rng(0)
    votes = []
    for number in range(3000):
        i, j = random.choice(4, 2, replace=False)
        wins = random.random() < 1 / (1 + np.exp(strengths[j] - strengths[i]))
        votes.append(vote(number, "left" if wins else "right", left=names[i], right=names[j]))
    found = bradley_terry(votes, "overall")
    assert np.allclose([found[name] for name in names], strengths, atol=0.15)
    with pytest.raises(ValueError, match="four or more"):
        bradley_terry(votes[:0], "overall")
    never = [v for v in votes if "d" not in (v.left_variant, v.right_variant)]
    with pytest.raises(ValueError, match="never lost"):
        bradley_terry([*never, vote(0, "left", left="d", right="a")], "overall")


def test_what_votes_are_too_few_for_is_not_measured_and_the_rest_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = [vote(0, "left", left=one, right="d") for one in "abc"]
    votes += [each._replace(question="text") for each in votes]
    rows = [each._asdict() | {"repeated": int(each.repeated)} for each in votes]
    with (tmp_path / "votes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, Vote._fields)
        writer.writeheader()
        writer.writerows(rows)
    say_votes(tmp_path / "votes.csv")
    told = capsys.readouterr().out
    assert "self-consistency: not measured of 0 pairs" in told
    assert told.count("not measured: some variants never lost") == 2
    assert told.count("a over d") + told.count("d over a") == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no vote in it"),
        ("pair,question\na,b,c\n", "line 2: has more cells than the first line"),
        ("pair,question\na,b\n", "line 2: .* not a CSV of votes that the dashboard wrote"),
        ("\x00", "not a CSV|there is no vote"),
    ],
)
def test_a_file_without_votes_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"votes\.csv: .*(?:{said})"):
        say_votes(path)


def test_votes_come_from_the_dashboards_columns_alone() -> None:
    row = vote(3, "left")._asdict() | {"repeated": "1", "evaluation": "x"}
    assert votes_of_rows([row])[0].repeated
    with pytest.raises(ValueError, match="line 2"):
        votes_of_rows([{"answer": "left"}])
