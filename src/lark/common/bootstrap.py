"""Parts that every bootstrap here shares: resamples in blocks that fit in memory, and intervals from their values.

Shapes: G problems, R resamples, r of one block, X sums.
"""

from collections.abc import Iterator

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Nominal coverage of an interval."""
_CELLS = 4_000_000  # array elements at once (32 MB in float64)


def split_blocks(count: int, width: int) -> Iterator[range]:
    """Split `count` rows of `width` numbers each into blocks that fit in memory."""
    size = max(1, _CELLS // max(1, width))
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def resample_sums(*sums: np.ndarray, resamples: int, seed: int) -> list[np.ndarray]:
    """Resample problems with replacement and add up what each contributes: of every [X, G] an array [R, X].

    All of them see the same resamples.
    """
    rng, problems = np.random.default_rng(seed), sums[0].shape[1]
    parts = []
    for block in split_blocks(resamples, problems):
        times_rG = rng.multinomial(problems, np.full(problems, 1 / problems), len(block)).astype(np.float64)
        parts.append([times_rG @ sum_XG.T for sum_XG in sums])
    return [np.concatenate(of_sum) for of_sum in zip(*parts, strict=True)]


def expand_percentiles(
    values_R: np.ndarray, estimate: float, *, around: float, df: float, level: float = LEVEL, factor: float = 1.0
) -> tuple[float, float]:
    """Compute the expanded percentile interval of an estimate (Hesterberg 2015, The American Statistician 69, 371-386).

    values_R: bootstrap values, which lie around `around`. Their percentiles' distances from it are widened by t / z at
    `df` degrees of freedom, times `factor`.
    """
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    wider = factor * stats.t.ppf(tails[1], df) / stats.norm.ppf(tails[1])
    low, high = estimate + wider * (np.quantile(values_R, tails) - around)
    return float(low), float(high)
