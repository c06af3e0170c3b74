"""Infer the difference between two arms from accuracies per seed and problem.

Shapes: S seeds, P problems, R resamples, F sign flips.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from lark.common.bootstrap import expand_percentiles, split_blocks

MIN_SEEDS = 3
"""With fewer seeds their variance is not estimated."""
FEW_SEEDS = "seed variance not estimated"

_ROUNDING = 1e-12  # means over seeds of equal accuracies may differ by as much
_TIE = 1e-10  # sums of as much, relative to the sum of magnitudes, are equal: rounding again


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Hold a mean difference with its confidence interval, in the units of the input."""

    estimate: float
    low: float
    high: float
    level: float
    """Nominal coverage of [low, high]."""
    standard_error: float
    """Of the estimate."""
    df: float
    """Degrees of freedom of the standard error (Satterthwaite): near 2 where 3 seeds that differ decide it."""
    seeds: int
    problems: int
    label: str
    """What the interval does not cover; empty if it covers problems and seeds."""


def compute_paired_difference(
    a_SP: np.ndarray,
    b_SP: np.ndarray,
    *,
    bounds: tuple[float, float] = (-1.0, 1.0),
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Compute the mean of a - b over seeds and problems with a crossed bootstrap interval.

    Row s of both arrays is the same seed, column p the same problem; values are avg@k per problem. Problems and seeds
    are resampled independently, the same problems in every seed, since all seeds answer the same problems (the
    pigeonhole bootstrap; Owen 2007, Annals of Applied Statistics 1, 386-411). With fewer than 3 seeds only problems are
    resampled and the label says so. One problem gives no interval: low, high, standard_error and df are NaN.
    The interval stays within `bounds`, the least and the greatest difference that a problem can have. Where all
    problems differ alike there is no spread to resample: it then covers what the unseen problems may do, see
    `_bound_unseen`, and standard_error and df are NaN.

    Two corrections make the interval honest. What is resampled is a_s + b_p + r_sp, with seed effects, problem effects
    and residuals rescaled to their estimated variances (reflated; Carpenter, Goldstein and Rasbash 2003, Applied
    Statistics 52, 431-443): unscaled, S seed effects vary by (S - 1) / S too little and residuals count three times.
    And the percentiles are widened about the estimate by t / z at the degrees of freedom of the standard error (the
    expanded percentile interval; Hesterberg 2015, The American Statistician 69, 371-386), since three seeds tell little
    about how seeds vary. Simulated coverage of nominal 95 % intervals (avg@4 of 200 problems, 2,000 trials, the model
    of tests/comparison/test_inference.py), beside that of plain percentiles and of nested resampling, and the mean
    width relative to an interval that knows the true variance:

        seeds differ by (points, s.d.)  seeds  coverage  width  plain  nested
                   0                      3      .97     1.31    .99    .94
                   0                      5      .96     1.08    .99    .93
                   0                     10      .95     1.01    .98    .86
                   2.8                    3      .94     1.42    .95    .88
                   2.8                    5      .94     1.11    .96    .90
                   2.8                   10      .94     1.00    .97    .87
                   5.7                    3      .92     1.61    .88    .82
                   5.7                    5      .94     1.18    .92    .87
                   5.7                   10      .94     1.05    .94    .90

    So what 3 seeds cost is width, and at most .03 of the coverage where seeds decide. All values must be finite.
    """
    difference_SP = np.asarray(a_SP, np.float64) - np.asarray(b_SP, np.float64)
    assert np.shape(a_SP) == np.shape(b_SP) == difference_SP.shape and difference_SP.ndim == 2 and difference_SP.size
    assert np.isfinite(difference_SP).all() and 0 < level < 1 and resamples >= 100  # fewer tell no quantiles

    seeds, problems = difference_SP.shape
    estimate = float(difference_SP.mean())
    label = "" if seeds >= MIN_SEEDS else FEW_SEEDS
    low = high = standard_error = df = float("nan")
    if problems == 1:
        label = "one problem, no interval"
    else:
        rows_SP = difference_SP if seeds >= MIN_SEEDS else difference_SP.mean(0, keepdims=True)
        if np.ptp(rows_SP) <= _ROUNDING:
            low, high = _bound_unseen(estimate, problems, bounds=bounds, level=level)
        else:
            deviation_SP, standard_error, df = _reflate(rows_SP)
            mean_R = _resample_means(deviation_SP, resamples, np.random.default_rng(seed))
            low, high = expand_percentiles(mean_R, estimate, around=0.0, df=df, level=level)
            low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(
        estimate=estimate,
        low=low,
        high=high,
        level=level,
        standard_error=standard_error,
        df=df,
        seeds=seeds,
        problems=problems,
        label=label,
    )


def compute_mean_interval(
    value_P: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Compute the mean over problems of values from 0 to 1, such as avg@k, with its interval, cut to [0, 1].

    The bootstrap is that of `compute_paired_difference` over problems, against 0. Problems are resampled with the
    samples that were drawn for them, so the interval covers which problems were asked and the noise of sampling.
    Simulated coverage of nominal 95 % intervals, and half their mean width in
    points, for problems with chances that are Beta(0.3, 0.3), Beta(0.3, 2.7) and Beta(0.1, 3) distributed (600 trials):

        problems  k   mean .50      mean .10     mean .03
           30     4   .96 (15.7)    .93 (7.1)    .86 (3.9)
           30    32   .97 (14.8)    .93 (5.7)    .82 (2.9)
          100     4   .95 (8.3)     .94 (3.9)    .95 (2.2)
          500     4   .95 (3.7)     .96 (1.7)    .94 (1.0)
    """
    value_1P = np.asarray(value_P, np.float64)[None]
    zero_1P = np.zeros_like(value_1P)
    found = compute_paired_difference(value_1P, zero_1P, bounds=(0.0, 1.0), level=level, resamples=resamples, seed=seed)
    return found if found.problems == 1 else replace(found, label="")


def _bound_unseen(estimate: float, problems: int, *, bounds: tuple[float, float], level: float) -> tuple[float, float]:
    """Bound a mean of which all problems seen have the same value.

    None of P problems was another, so up to 1 - ((1 - level) / 2)^(1 / P) of all may be (Clopper and Pearson 1934,
    Biometrika 26, 404-413; 3.7 / P at level .95), and these may have any value within `bounds`.
    """
    share = 1 - ((1 - level) / 2) ** (1 / problems)
    low, high = bounds
    return estimate + share * (low - estimate), estimate + share * (high - estimate)


def _reflate(x_SP: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Rescale deviations of x from its mean so that their crossed bootstrap means vary as the mean of x does.

    x_sp = mean + a_s + b_p + r_sp with random seed and problem effects; the expected mean squares of seeds, problems
    and residual are P var_a + var_r, S var_b + var_r and var_r, and the variance of the mean is
    var_a / S + var_b / P + var_r / (S P) (Searle, Casella and McCulloch 1992, Variance Components, chapter 4).
    A variance estimated below 0 is 0. Returns the deviations, the root of that variance and its degrees of freedom.
    """
    seeds, problems = x_SP.shape
    deviation_SP = x_SP - x_SP.mean()
    seed_S1, problem_1P = deviation_SP.mean(1, keepdims=True), deviation_SP.mean(0, keepdims=True)
    residual_SP = deviation_SP - seed_S1 - problem_1P
    df_seed, df_problem = max(seeds - 1, 1), problems - 1  # a single row has no seed effect and no residual
    ms_seed = problems * float(np.square(seed_S1).sum()) / df_seed
    ms_problem = seeds * float(np.square(problem_1P).sum()) / df_problem
    ms_residual = float(np.square(residual_SP).sum()) / (df_seed * df_problem)
    excess_seed, excess_problem = max(ms_seed - ms_residual, 0.0), max(ms_problem - ms_residual, 0.0)

    total = excess_seed + excess_problem + ms_residual
    if total == 0:
        return deviation_SP, 0.0, float(df_problem)
    in_seed, in_problem = excess_seed > 0, excess_problem > 0
    share = (1 - in_seed - in_problem) * ms_residual
    df = total**2 / (
        (in_seed * ms_seed) ** 2 / df_seed
        + (in_problem * ms_problem) ** 2 / df_problem
        + share**2 / (df_seed * df_problem)
    )
    reflated_SP = residual_SP * np.sqrt(seeds * problems / (df_seed * df_problem))
    if in_seed:
        reflated_SP = reflated_SP + seed_S1 * np.sqrt(excess_seed / ms_seed * seeds / df_seed)
    if in_problem:
        reflated_SP = reflated_SP + problem_1P * np.sqrt(excess_problem / ms_problem * problems / df_problem)
    return reflated_SP, float(np.sqrt(total / x_SP.size)), float(df)


def _resample_means(x_SP: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Compute means of x over resampled seeds and resampled problems, the same problems in every seed, [R]."""
    seeds, problems = x_SP.shape
    parts = []
    for block in split_blocks(resamples, problems):
        times_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), len(block))
        problem_RP = rng.integers(problems, size=(len(block), problems))
        parts.append(np.take_along_axis(times_RS @ x_SP / seeds, problem_RP, 1).mean(1))
    return np.concatenate(parts)


def compute_sign_flip_p(difference_P: np.ndarray, *, resamples: int = 9_999, seed: int = 0) -> float:
    """Compute the two-sided p-value of a mean difference of 0 by flipping the sign of each problem's difference.

    difference_P is a - b per problem, averaged over seeds: the test is about further problems, for the seeds at hand.
    The share of sign flips whose mean is at least as far from 0 as the observed one: of all 2^P where these are at most
    `resamples`, P counting the problems that differ by more than rounding, else of random ones and the observed one, so
    never 0 (Phipson and Smyth 2010, Statistical Applications in Genetics and Molecular Biology 9, 39).
    """
    difference_P = np.asarray(difference_P, np.float64)
    assert difference_P.ndim == 1 and difference_P.size and np.isfinite(difference_P).all()
    difference_P = difference_P[np.abs(difference_P) > _ROUNDING]  # the others are the same under both signs
    problems = difference_P.size
    observed, tie = abs(difference_P.sum()), _TIE * np.abs(difference_P).sum()
    exact = 2**problems <= resamples
    flips = 2**problems if exact else resamples
    rng, as_far = np.random.default_rng(seed), 0
    for block in split_blocks(flips, problems):
        number_F = np.array(block)
        if exact:  # the binary digits of a flip's number say which differences keep their sign
            kept_FP = (number_F[:, None] >> np.arange(problems) & 1).astype(np.int8)
        else:
            kept_FP = rng.integers(2, size=(len(number_F), problems), dtype=np.int8)
        sum_F = kept_FP @ (2 * difference_P) - difference_P.sum()
        as_far += int((np.abs(sum_F) >= observed - tie).sum())
    return as_far / flips if exact else (as_far + 1) / (flips + 1)


def adjust_holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjust p-values [M] by Holm's step-down method, in the order given; family-wise error control (Holm 1979)."""
    p_M = np.asarray(p_values, np.float64)
    assert p_M.ndim == 1 and ((p_M >= 0) & (p_M <= 1)).all()
    order_M = np.argsort(p_M, kind="stable")
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order_M] = np.maximum.accumulate(p_M[order_M] * np.arange(p_M.size, 0, -1))
    return np.minimum(adjusted_M, 1.0)


def compute_smallest_detectable(
    standard_error: float, *, df: float = math.inf, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Compute the true difference that a two-sided test at level alpha finds with the given power.

    (t_(1 - alpha/2) + t_power) standard errors at `df` degrees of freedom (Bloom 1995, Evaluation Review 19, 547-556).
    standard_error and df are an Interval's; the result has the standard error's units. Simulated power of the interval
    to exclude 0 at the mean of this figure, .80 wanted (as in `compute_paired_difference`): .78 to .81 with 10 seeds,
    .76 to .80 with 5, .72 to .78 with 3, whose standard errors are themselves uncertain.
    """
    assert 0 < power < 1 and 0 < alpha < 1
    return float((stats.t.ppf(1 - alpha / 2, df) + stats.t.ppf(power, df)) * standard_error)
