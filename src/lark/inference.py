"""Statistical inference about the difference between two arms, from accuracies per seed and problem.

Shapes: S seeds, P problems, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MIN_SEEDS = 3
"""With fewer seeds their variance is not estimated."""

_CELLS = 4_000_000  # array elements at once (32 MB in float64)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean difference with its bootstrap percentile interval, in the units of the input."""

    estimate: float
    low: float
    high: float
    level: float
    """Nominal coverage of [low, high]."""
    standard_error: float
    """Standard deviation of the bootstrap means."""
    seeds: int
    problems: int
    label: str
    """What the interval does not cover; empty if it covers problems and seeds."""


def paired_difference(
    a_SP: np.ndarray, b_SP: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of a - b over seeds and problems with a crossed bootstrap interval.

    Row s of both arrays is the same seed, column p the same problem; values are avg@k per problem. Problems and seeds
    are resampled independently, the same problems in every seed, since all seeds answer the same problems (the
    pigeonhole bootstrap; Owen 2007, Annals of Applied Statistics 1, 386-411). With fewer than 3 seeds only problems are
    resampled and the label says so. One problem gives no interval: low, high and standard_error are NaN.

    Raises:
        ValueError: shapes differ or are not [S, P], a value is NaN or infinite, or level or resamples out of range.
    """
    a_SP, b_SP = np.asarray(a_SP, np.float64), np.asarray(b_SP, np.float64)
    if a_SP.ndim != 2 or a_SP.shape != b_SP.shape or a_SP.size == 0:
        raise ValueError(
            f"paired_difference needs two arrays [seeds, problems] of one shape, got {a_SP.shape} and {b_SP.shape}; "
            "evaluate both arms with the same seeds on the same problems."
        )
    difference_SP = a_SP - b_SP
    _require_finite("paired_difference", difference_SP)
    if not 0 < level < 1:
        raise ValueError(f"paired_difference: level={level} is not between 0 and 1; set 0.95, say.")
    if resamples < 100:
        raise ValueError(f"paired_difference: resamples={resamples} is too few for quantiles; set at least 100.")

    seeds, problems = difference_SP.shape
    estimate = float(difference_SP.mean())
    label = "" if seeds >= MIN_SEEDS else "seed variance not estimated"
    low = high = standard_error = float("nan")
    if problems == 1:
        label = "one problem, no interval"
    else:
        rows_SP = difference_SP if seeds >= MIN_SEEDS else difference_SP.mean(0, keepdims=True)
        mean_R = _bootstrap_means(rows_SP, resamples, np.random.default_rng(seed))
        low, high = (float(x) for x in np.quantile(mean_R, [(1 - level) / 2, (1 + level) / 2]))
        standard_error = float(mean_R.std(ddof=1))
    return Interval(
        estimate=estimate,
        low=low,
        high=high,
        level=level,
        standard_error=standard_error,
        seeds=seeds,
        problems=problems,
        label=label,
    )


def _bootstrap_means(x_SP: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of x over resampled seeds and resampled problems, [R], from how often each is drawn."""
    seeds, problems = x_SP.shape
    chunk = max(1, _CELLS // problems)
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        times_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        times_RP = rng.multinomial(problems, np.full(problems, 1 / problems), size)
        parts.append(((times_RS @ x_SP) * times_RP).sum(1) / x_SP.size)
    return np.concatenate(parts)


def sign_flip_p(difference_P: np.ndarray, *, resamples: int = 9_999, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference of 0, by flipping the sign of each problem's difference.

    difference_P is a - b per problem, averaged over seeds. Exact where 2^P <= resamples, else from random flips with
    the observed one counted, so never 0 (Phipson and Smyth 2010).

    Raises:
        ValueError: difference_P is not [P] with P >= 1, or has a NaN or infinite value.
    """
    difference_P = np.asarray(difference_P, np.float64)
    if difference_P.ndim != 1 or difference_P.size == 0:
        raise ValueError(
            f"sign_flip_p needs one difference per problem, got shape {difference_P.shape}; average over seeds first."
        )
    _require_finite("sign_flip_p", difference_P)
    if difference_P.size == 1:
        return 1.0  # both signs are equally far from 0, and scipy wants at least two observations
    result = stats.permutation_test(
        (difference_P,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CELLS // difference_P.size),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values [M], in the order given; family-wise error control (Holm 1979).

    Raises:
        ValueError: not a list of numbers between 0 and 1.
    """
    p_M = np.asarray(p_values, np.float64)
    if p_M.ndim != 1 or not ((p_M >= 0) & (p_M <= 1)).all():
        raise ValueError(f"holm needs a list of p-values between 0 and 1, got {p_values}; leave failed tests out.")
    order_M = np.argsort(p_M, kind="stable")
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order_M] = np.maximum.accumulate(p_M[order_M] * np.arange(p_M.size, 0, -1))
    return np.minimum(adjusted_M, 1.0)


def smallest_detectable_difference(standard_error: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true difference that a two-sided test at level alpha finds with the given power, by the normal approximation.

    standard_error is an Interval's; the result has its units.

    Raises:
        ValueError: power or alpha is not between 0 and 1.
    """
    if not (0 < power < 1 and 0 < alpha < 1):
        raise ValueError(f"power={power} and alpha={alpha} must lie between 0 and 1; set 0.8 and 0.05, say.")
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * standard_error)


def _require_finite(name: str, x: np.ndarray) -> None:
    wrong = int((~np.isfinite(x)).sum())
    if wrong:
        raise ValueError(
            f"{name}: {wrong} of {x.size} differences are NaN or infinite; leave problems without an accuracy out."
        )
