"""Agreement of two scores, or of two choices, inside problems: a value a problem, what chance gives, and means over
problems with bootstrap intervals.

Selection happens inside a problem, so problems are what is averaged over and resampled.

Shapes: N candidates, G problems (groups), F figures, R resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from lark.common.bootstrap import LEVEL, expand_percentiles, resample_sums
from lark.common.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over problems, with its interval and what would come about by chance; NaN where it is not known.

    low, high: 95 % bootstrap interval over problems. problems: those the value is defined for. chance: its expectation
    for a random score or choice; chance_low, chance_high: where a random one would lie 95 % of the time.
    """

    mean: float
    low: float
    high: float
    problems: int
    chance: float = math.nan
    chance_low: float = math.nan
    chance_high: float = math.nan

    def __str__(self) -> str:
        interval = f" [{_format_signed(self.low)}, {_format_signed(self.high)}]" if math.isfinite(self.low) else ""
        return f"{_format_signed(self.mean)}{interval}" if math.isfinite(self.mean) else "unknown"


UNKNOWN = Mean(mean=math.nan, low=math.nan, high=math.nan, problems=0)


def _format_signed(x: float) -> str:
    return f"{round(x, 2) + 0.0:+.2f}"


def compute_midranks(x_N: np.ndarray, groups: Groups) -> np.ndarray:
    """Rank all rows by (group, x), ties sharing the middle, float64 [N]; only differences within a group matter."""
    order = np.lexsort((x_N, groups.index_N))
    new = np.ones(len(x_N), bool)
    new[1:] = (np.diff(x_N[order]) != 0) | (np.diff(groups.index_N[order]) != 0)
    block = np.cumsum(new) - 1
    middle = np.bincount(block, np.arange(len(x_N))) / np.bincount(block) if len(x_N) else np.zeros(0)
    ranks = np.empty(len(x_N))
    ranks[order] = middle[block]
    return ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class ByProblem:
    """A value a problem, NaN where it is not defined, with its expectation and variance for a random score or choice;
    float64 [G] each. bounds: the least and the largest value there can be.
    """

    value_G: np.ndarray
    chance_G: np.ndarray
    variance_G: np.ndarray
    bounds: tuple[float, float] = (0.0, 1.0)


def compute_spearman(a_N: np.ndarray, b_N: np.ndarray, groups: Groups) -> ByProblem:
    """Compute Spearman's correlation of a and b among each problem's K candidates that have both (midranks for ties);
    not defined for fewer than two, or where a or b is constant. Under a random order of a its expectation is 0 and its
    variance exactly 1 / (K - 1), ties or not.
    """
    a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    both_N = np.isfinite(a_N) & np.isfinite(b_N)
    sub = Groups(groups.index_N[both_N], groups.count)
    x, y = (compute_midranks(v_N[both_N], sub) for v_N in (a_N, b_N))
    x, y = (r - sub.spread(sub.average(r)) for r in (x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        rho_G = np.clip(sub.sum(x * y) / np.sqrt(sub.sum(x * x) * sub.sum(y * y)), -1, 1)
        variance_G = 1 / (sub.size - 1)
    return ByProblem(value_G=rho_G, chance_G=np.zeros(groups.count), variance_G=variance_G, bounds=(-1.0, 1.0))


def compute_top_overlap(
    a_N: np.ndarray, b_N: np.ndarray, groups: Groups, tie_N: np.ndarray, *, budget: int
) -> ByProblem:
    """Compute the share of the `budget` candidates of highest a that are among those of highest b, over the K
    candidates that have both; not defined where K <= budget. A random score shares budget / K (hypergeometric). Ties go
    by `tie_N`.
    """
    both_N = np.isfinite(a_N) & np.isfinite(b_N)
    top = []
    for score_N in (a_N, b_N):
        ranking = groups.rank(score_N, tie_N, both_N)
        top.append(ranking.scatter((ranking.position < budget).astype(float), len(score_N)) > 0)
    rows_G = groups.sum(both_N.astype(float))
    choice_G = rows_G > budget
    size_G = np.where(choice_G, rows_G, np.nan)
    chance_G = budget / size_G
    return ByProblem(
        value_G=np.where(choice_G, groups.sum((top[0] & top[1]).astype(float)) / budget, np.nan),
        chance_G=chance_G,
        variance_G=chance_G * (1 - chance_G) * (size_G - budget) / (size_G - 1) / budget,
    )


def compute_jaccard(a_N: np.ndarray, b_N: np.ndarray, groups: Groups) -> ByProblem:
    """Compute the Jaccard index |a and b| / |a or b| of two choices (masks) in each problem; not defined where either
    took nothing or everything, as there it had no choice. Chance: two random choices of the same sizes
    (hypergeometric).
    """
    size_G, a_G, b_G = groups.size, *(groups.sum(mask_N.astype(float)).astype(np.int64) for mask_N in (a_N, b_N))
    choice_G = (a_G > 0) & (b_G > 0) & (a_G < size_G) & (b_G < size_G)
    common_G = groups.sum((a_N & b_N).astype(float))
    index_G, chance_G, variance_G = (np.full(groups.count, np.nan) for _ in range(3))
    index_G[choice_G] = common_G[choice_G] / (a_G + b_G - common_G)[choice_G]
    sizes = np.stack([size_G, a_G, b_G], 1)[choice_G]
    if len(sizes):
        kinds, kind_of = np.unique(sizes, axis=0, return_inverse=True)
        moments = np.array([_compute_random_jaccard(*kind) for kind in kinds.tolist()])[kind_of.ravel()]
        chance_G[choice_G], variance_G[choice_G] = moments.T
    return ByProblem(value_G=index_G, chance_G=chance_G, variance_G=variance_G)


def _compute_random_jaccard(size: int, a: int, b: int) -> tuple[float, float]:
    """Compute expectation and variance over random choices of `a` and `b` of `size` candidates."""
    common = np.arange(max(0, a + b - size), min(a, b) + 1)
    p, index = stats.hypergeom.pmf(common, size, a, b), common / (a + b - common)
    mean = float(p @ index)
    return mean, float(p @ (index - mean) ** 2)


def summarise_with_chance(values: Sequence[ByProblem], *, resamples: int) -> list[Mean]:
    """Average the values over problems, and their chance over the problems where they are defined, with the range in
    which the mean of a random score or choice lies 95 % of the time (normal approximation of a sum over problems).
    """
    found = []
    for mean, one in zip(average_over_problems([v.value_G for v in values], resamples=resamples), values, strict=True):
        here_G = np.isfinite(one.value_G)
        if here_G.any():
            chance = float(one.chance_G[here_G].mean())
            spread = float(stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(one.variance_G[here_G].sum()) / here_G.sum())
            ends = np.clip([mean.low, mean.high, chance - spread, chance + spread], *one.bounds).tolist()
            low, high, chance_low, chance_high = ends
            mean = replace(mean, low=low, high=high, chance=chance, chance_low=chance_low, chance_high=chance_high)
        found.append(mean)
    return found


def average_over_problems(
    x_FG: Sequence[np.ndarray] | np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> list[Mean]:
    """Average each figure over the problems where it is not NaN, with its interval: F figures resampled with the same
    problems. `Mean.chance` is left open. One problem has no interval.
    """
    x_FG = np.atleast_2d(np.asarray(x_FG, np.float64))
    if not x_FG.size:
        return [UNKNOWN for _ in x_FG]
    here_FG = np.isfinite(x_FG)
    count_F, value_FG = here_FG.sum(1), np.where(here_FG, x_FG, 0.0)
    sum_RF, times_RF = resample_sums(value_FG, here_FG, resamples=resamples, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_F, mean_RF = value_FG.sum(1) / count_F, sum_RF / times_RF
    found = []
    for mean, n, mean_R in zip(mean_F.tolist(), count_F.tolist(), mean_RF.T, strict=True):
        low, high = _compute_interval(mean, mean_R, n)
        found.append(Mean(mean=mean, low=low, high=high, problems=n))
    return found


def estimate_from_sums(
    sum_XG: np.ndarray, resampled_RX: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]
) -> Mean:
    """Compute a statistic of sums over problems (which maps [R, X] to [R]) and its interval.

    sum_XG: what each problem adds to the X sums, the first of which counts its candidates. resampled_RX: the sums over
    resampled problems.
    """
    estimate, problems = float(statistic(sum_XG.sum(1)[None])[0]), int((sum_XG[0] > 0).sum())
    low, high = _compute_interval(estimate, statistic(resampled_RX), problems)
    return Mean(mean=estimate, low=low, high=high, problems=problems, chance=0.0)


def _compute_interval(estimate: float, values_R: np.ndarray, n: int) -> tuple[float, float]:
    """Compute the expanded percentile interval of an estimate over n problems; n - 1 in place of n in its variance."""
    values_R = values_R[np.isfinite(values_R)]
    if n < 2 or not len(values_R):
        return math.nan, math.nan
    return expand_percentiles(values_R, estimate, around=estimate, df=n - 1, factor=math.sqrt(n / (n - 1)))


def compute_pooled_spearman(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], groups: Groups, *, resamples: int = 1000, seed: int = 0
) -> list[Mean]:
    """Compute Spearman's correlation of each pair of scores over all candidates that have both, whole problems
    resampled (their candidates keep the ranks they have among all). Length and difficulty differ between problems, so
    it says little about a choice inside.
    """
    if not groups.count or not pairs:
        return [UNKNOWN for _ in pairs]
    sums = [_sum_ranks(a_N, b_N, groups) for a_N, b_N in pairs]
    (resampled_RX,) = resample_sums(np.concatenate(sums), resamples=resamples, seed=seed)
    resampled = np.split(resampled_RX, len(pairs), axis=1)
    return [estimate_from_sums(one, of, _correlate_sums) for one, of in zip(sums, resampled, strict=True)]


def _sum_ranks(a_N: np.ndarray, b_N: np.ndarray, groups: Groups) -> np.ndarray:
    """Sum by problem [6, G], over the candidates that have both: their number n, and with x, y the ranks of a and b
    about their mean x, y, x^2, y^2, x y.
    """
    both_N = np.isfinite(a_N) & np.isfinite(b_N)
    x_N, y_N = (stats.rankdata(np.asarray(v_N, np.float64)[both_N]) for v_N in (a_N, b_N))
    x_N, y_N = (v_N - (len(v_N) + 1) / 2 for v_N in (x_N, y_N))
    terms = (np.ones_like(x_N), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N)
    return np.stack([np.bincount(groups.index_N[both_N], term, groups.count) for term in terms])


def _correlate_sums(sum_R6: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = sum_R6.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return (xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))
