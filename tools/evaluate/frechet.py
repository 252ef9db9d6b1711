"""Distances between two sets of features: Frechet (FVD is this on I3D's logits) and the unbiased
kernel distance (KVD). Pure functions of float64 arrays [N, D].

A Frechet distance of N samples is too large by about c / N, so it has a meaning only beside its
floor, the distance of one half of the real clips from the other: of N / 2 clips, so about twice
what it would be at N. A percentile bootstrap does not contain the estimate, because samples that
are drawn twice look like a smaller N: intervals come from halves that are drawn without
replacement.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Features = np.ndarray[Any, Any]
# below this many clips on either side no verdict is given
MIN_CLIPS = 64
NUM_HALVES = 100


class Estimate(NamedTuple):
    """A distance with a 95% interval. extrapolated: to an infinite N, by the 1 / N law."""

    value: float
    low: float
    high: float
    extrapolated: float


def frechet_distance(x_ND: Features, y_MD: Features) -> float:
    """|mean_x - mean_y|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)), with unbiased covariances.

    Of tr (Sx Sy)^(1/2), two forms are exact, and no epsilon is added: with fewer samples than
    features it is the nuclear norm of X Y^T over sqrt((N - 1) (M - 1)), X and Y centred; else the
    sum of the roots of the eigenvalues of Sx^(1/2) Sy Sx^(1/2).
    """
    return _frechet_of_subsets(x_ND, y_MD)(np.arange(len(x_ND)), np.arange(len(y_MD)))


# which samples of the one side and of the other -> their distance
OfSubsets = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], float]


def _frechet_of_subsets(x_ND: Features, y_MD: Features) -> OfSubsets:
    """The products of all pairs of samples are taken once: a subset's, centred, follow from them.
    They are what costs most where features are many.
    """
    x_ND, y_MD = np.asarray(x_ND, np.float64), np.asarray(y_MD, np.float64)
    for features in (x_ND, y_MD):
        if not np.isfinite(features).all():
            raise ValueError(f"features of shape {features.shape} hold NaN or infinity")
    # a distance does not change with what all have in common, rounding does
    common_D = y_MD.mean(0)
    x_ND, y_MD = x_ND - common_D, y_MD - common_D
    width = x_ND.shape[1]
    products_NM = x_ND @ y_MD.T if min(len(x_ND), len(y_MD)) <= 2 * width else None

    def distance(rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]) -> float:
        n, m = len(rows), len(columns)
        if min(n, m) < 2:
            raise ValueError(f"{n} and {m} samples: a distance needs two on each side")
        some_nD, other_mD = x_ND[rows], y_MD[columns]
        mean_x_D, mean_y_D = some_nD.mean(0), other_mD.mean(0)
        some_nD -= mean_x_D
        other_mD -= mean_y_D
        trace_x, trace_y = (
            np.vdot(some_nD, some_nD) / (n - 1),
            np.vdot(other_mD, other_mD) / (m - 1),
        )
        if products_NM is not None and min(n, m) <= width:
            of_rows_nM = products_NM[rows]
            cross_nm = of_rows_nM[:, columns]
            cross_nm -= cross_nm.mean(0)
            cross_nm -= cross_nm.mean(1, keepdims=True)
            root_trace = np.linalg.svd(cross_nm, compute_uv=False).sum() / np.sqrt(
                (n - 1) * (m - 1)
            )
        else:
            values_D, vectors_DD = np.linalg.eigh(some_nD.T @ some_nD / (n - 1))
            root_DD = (vectors_DD * np.sqrt(np.clip(values_D, 0, None))) @ vectors_DD.T
            inner_DD = root_DD @ (other_mD.T @ other_mD / (m - 1)) @ root_DD
            root_trace = np.sqrt(np.clip(np.linalg.eigvalsh(inner_DD), 0, None)).sum()
        means = np.square(mean_x_D - mean_y_D).sum()
        return float(means + trace_x + trace_y - 2 * root_trace)

    return distance


def _of_subsets(
    distance: Callable[[Features, Features], float], x_ND: Features, y_MD: Features
) -> OfSubsets:
    if distance is frechet_distance:
        return _frechet_of_subsets(x_ND, y_MD)
    return lambda rows, columns: distance(x_ND[rows], y_MD[columns])


def kernel_distance(x_ND: Features, y_MD: Features) -> float:
    """The unbiased squared MMD with k(x, y) = (x . y / D + 1)^3; zero in the mean for equal
    distributions, and negative half of the time then.
    """
    x_ND, y_MD = np.asarray(x_ND, np.float64), np.asarray(y_MD, np.float64)
    n, m, width = len(x_ND), len(y_MD), x_ND.shape[1]
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} samples: a kernel distance needs two on each side")
    xx_NN, yy_MM, xy_NM = (
        (a @ b.T / width + 1) ** 3 for a, b in ((x_ND, x_ND), (y_MD, y_MD), (x_ND, y_MD))
    )
    within_x = (xx_NN.sum() - np.trace(xx_NN)) / (n * (n - 1))
    within_y = (yy_MM.sum() - np.trace(yy_MM)) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy_NM.mean())


def estimate(
    real_ND: Features,
    other_MD: Features,
    groups_M: np.ndarray[Any, Any] | None = None,
    *,
    distance: Callable[[Features, Features], float] = frechet_distance,
    seed: int = 0,
    num_halves: int = NUM_HALVES,
) -> Estimate:
    """The distance of `other_MD` from `real_ND`; its interval from halves of both sides.

    groups_M: what is drawn together, the number of each sample's prompt. A half's deviation around
    the mean of halves is that of the estimate itself: of n things, m = n / 2 drawn without
    replacement vary by sigma^2 (1 / m - 1 / n) = sigma^2 / n.
    """
    value = distance(real_ND, other_MD)
    halves = half_distances(
        real_ND, [other_MD], groups_M, distance=distance, seed=seed, num_halves=num_halves
    )[:, 0]
    spread = 1.96 * float(halves.std(ddof=1))
    return Estimate(
        value=value,
        low=value - spread,
        high=value + spread,
        extrapolated=2 * value - float(halves.mean()),
    )


def half_distances(
    real_ND: Features,
    others: list[Features],
    groups_M: np.ndarray[Any, Any] | None = None,
    *,
    distance: Callable[[Features, Features], float] = frechet_distance,
    seed: int = 0,
    num_halves: int = NUM_HALVES,
) -> Features:
    """[num_halves, len(others)]: distances of random halves. All of `others` are paired, so they
    are cut alike, and differences between columns are paired too.
    """
    random = np.random.default_rng(seed)
    groups_M = np.arange(len(others[0])) if groups_M is None else np.asarray(groups_M)
    names = np.unique(groups_M)
    measures = [_of_subsets(distance, real_ND, other_MD) for other_MD in others]
    found = []
    for _ in range(num_halves):
        some_N = random.permutation(len(real_ND))[: max(2, len(real_ND) // 2)]
        drawn = random.permutation(names)[: max(1, len(names) // 2)]
        some_M = np.flatnonzero(np.isin(groups_M, drawn))
        found.append([measure(some_N, some_M) for measure in measures])
    return np.asarray(found)


def floor(
    real_ND: Features, *, distance: Callable[[Features, Features], float] = frechet_distance
) -> float | None:
    """Real against other real clips, N / 2 on a side: the mean over 20 random splits. None below
    four clips.
    """
    if len(real_ND) < 4:
        return None
    random, measure = np.random.default_rng(0), _of_subsets(distance, real_ND, real_ND)
    found = []
    for _ in range(20):
        order = random.permutation(len(real_ND))
        half = len(order) // 2
        found.append(measure(order[:half], order[half:]))
    return float(np.mean(found))
