"""Agreement within problems: against scipy and plain loops, and chance values against every random order there is.

Shapes: N candidates, G problems, K candidates of one.
"""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import stats

from lark.common.groups import Groups
from lark.selection.within_problem import (
    Mean,
    average_over_problems,
    compute_jaccard,
    compute_midranks,
    compute_pooled_spearman,
    compute_spearman,
    compute_top_overlap,
    summarise_with_chance,
)

SIZES = [1, 2, 5, 7, 3, 6]


def problems(sizes=SIZES):
    """Groups of the given sizes, their rows mixed."""
    index_N = np.repeat(np.arange(len(sizes)), sizes)
    return Groups(np.random.default_rng(7).permutation(index_N), len(sizes))


def ties(groups):
    return np.random.default_rng(8).permutation(len(groups.index_N)).astype(np.uint64)


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_is_scipys_in_each_problem(levels):
    rng, groups = np.random.default_rng(levels), problems()
    a_N, b_N = (rng.integers(levels, size=len(groups.index_N)).astype(float) for _ in range(2))
    a_N[2], b_N[5] = np.nan, -np.inf
    found = compute_spearman(a_N, b_N, groups)
    for rows, rho in zip(groups.split(), found.value_G, strict=True):
        rows = rows[np.isfinite(a_N[rows]) & np.isfinite(b_N[rows])]
        x, y = a_N[rows], b_N[rows]
        if len(rows) < 2 or len(set(x)) == 1 or len(set(y)) == 1:
            assert math.isnan(rho)
        else:
            assert rho == pytest.approx(stats.spearmanr(x, y)[0])


@pytest.mark.parametrize("b_K", [[0.1, 0.4, 0.2, 0.9], [1.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 2.0]])
def test_spearman_by_chance_over_every_order(b_K):
    groups = Groups(np.zeros(4, np.int64), 1)
    found = [compute_spearman(np.array(order, float), np.array(b_K), groups) for order in permutations(range(4))]
    values = [float(one.value_G[0]) for one in found]
    assert np.mean(values) == pytest.approx(found[0].chance_G[0], abs=1e-12)
    assert np.var(values) == pytest.approx(found[0].variance_G[0])


def test_midranks_are_scipys_up_to_a_constant():
    x_N = np.array([3.0, 1.0, 3.0, 2.0, 1.0])
    ranks = compute_midranks(x_N, Groups(np.zeros(5, np.int64), 1))
    assert ranks - ranks.min() == pytest.approx(stats.rankdata(x_N) - stats.rankdata(x_N).min())


def test_top_overlap_by_plain_sets():
    rng, groups = np.random.default_rng(0), problems()
    a_N, b_N = rng.normal(size=(2, len(groups.index_N)))
    a_N[3] = np.nan
    found = compute_top_overlap(a_N, b_N, groups, ties(groups), budget=2)
    for rows, value, chance in zip(groups.split(), found.value_G, found.chance_G, strict=True):
        rows = [row for row in rows if np.isfinite(a_N[row])]
        if len(rows) <= 2:
            assert math.isnan(value) and math.isnan(chance)
        else:
            top = [set(sorted(rows, key=lambda row: -x_N[row])[:2]) for x_N in (a_N, b_N)]
            assert value == len(top[0] & top[1]) / 2
            assert chance == pytest.approx(2 / len(rows))


def test_top_overlap_by_chance_over_every_order():
    groups, tie_N, b_K = Groups(np.zeros(5, np.int64), 1), np.arange(5).astype(np.uint64), np.arange(5.0)
    found = [
        compute_top_overlap(np.array(order, float), b_K, groups, tie_N, budget=2) for order in permutations(range(5))
    ]
    values = [float(one.value_G[0]) for one in found]
    assert np.mean(values) == pytest.approx(found[0].chance_G[0])
    assert np.var(values) == pytest.approx(found[0].variance_G[0])


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 3), (4, 4), (1, 4)])
def test_jaccard_by_chance_over_every_choice(a, b):
    groups = Groups(np.zeros(5, np.int64), 1)
    fixed = np.isin(np.arange(5), range(b))
    found = [compute_jaccard(np.isin(np.arange(5), chosen), fixed, groups) for chosen in combinations(range(5), a)]
    values = [len(set(c) & set(range(b))) / len(set(c) | set(range(b))) for c in combinations(range(5), a)]
    assert [float(one.value_G[0]) for one in found] == pytest.approx(values)
    assert np.mean(values) == pytest.approx(found[0].chance_G[0])
    assert np.var(values) == pytest.approx(found[0].variance_G[0])


def test_jaccard_leaves_out_problems_without_a_choice():
    groups = Groups.from_ids(list("aabbcc"))
    everything, one_each = np.array([1, 1, 1, 0, 0, 0], bool), np.array([1, 0, 1, 0, 1, 0], bool)
    found = compute_jaccard(everything, one_each, groups)
    assert np.isnan(found.value_G).tolist() == [True, False, True]  # all of a taken, nothing of c
    assert found.value_G[1] == 1.0
    assert np.isnan(found.chance_G).tolist() == [True, False, True]


def test_figures_average_chance_over_the_problems_that_count():
    groups = problems([3, 4, 10, 2])
    a_N, b_N = np.random.default_rng(0).normal(size=(2, 19))
    (mean,) = summarise_with_chance([compute_top_overlap(a_N, b_N, groups, ties(groups), budget=2)], resamples=100)
    assert mean.problems == 3
    assert mean.chance == pytest.approx((2 / 3 + 2 / 4 + 2 / 10) / 3)


def test_random_scores_lie_in_the_range_of_chance_as_often_as_it_says():
    groups, rng, inside = problems([4, 6, 5, 7] * 10), np.random.default_rng(0), []
    b_N = rng.normal(size=220)
    for _ in range(400):
        a_N = rng.normal(size=220)
        both = [compute_spearman(a_N, b_N, groups), compute_top_overlap(a_N, b_N, groups, ties(groups), budget=2)]
        inside.append(
            [one.chance_low <= one.mean <= one.chance_high for one in summarise_with_chance(both, resamples=1)]
        )
    assert np.mean(inside, axis=0) == pytest.approx([0.95, 0.95], abs=0.035)


def test_intervals_are_near_those_of_students_t():
    x_G = np.random.default_rng(0).normal(2.0, 3.0, 60)
    (mean,) = average_over_problems([x_G], resamples=4000)
    low, high = stats.t.interval(0.95, 59, x_G.mean(), x_G.std(ddof=1) / np.sqrt(60))
    assert (mean.mean, mean.problems) == (pytest.approx(x_G.mean()), 60)
    assert (mean.low, mean.high) == (pytest.approx(low, abs=0.1), pytest.approx(high, abs=0.1))


def test_a_figure_counts_the_problems_that_have_it():
    x_G = np.array([1.0, np.nan, 3.0, 5.0])
    alone, padded = average_over_problems([x_G[np.isfinite(x_G)]])[0], average_over_problems([x_G, np.ones(4)])[0]
    assert (padded.mean, padded.problems) == (3.0, 3) == (alone.mean, alone.problems)
    assert padded.low < 3.0 < padded.high


def test_nothing_and_one_problem_have_no_interval():
    nothing, one = average_over_problems([np.array([np.nan, np.nan]), np.array([2.0, np.nan])])
    assert math.isnan(nothing.mean) and nothing.problems == 0
    assert one.mean == 2.0 and one.problems == 1 and math.isnan(one.low)
    assert average_over_problems(np.zeros((2, 0)))[1].problems == 0
    assert str(nothing) == "unknown" and str(one) == "+2.00"
    assert str(Mean(mean=-0.001, low=-0.5, high=0.25, problems=9)) == "+0.00 [-0.50, +0.25]"


def test_pooled_spearman_is_scipys_and_resamples_problems():
    rng, groups = np.random.default_rng(0), problems([6] * 30)
    level_N = groups.spread(rng.normal(size=30))  # what problems differ by
    a_N, b_N = (level_N + 0.1 * rng.normal(size=180) for _ in range(2))
    a_N[4] = np.nan
    found, opposite = compute_pooled_spearman([(a_N, b_N), (a_N, -b_N)], groups)
    assert opposite.mean == pytest.approx(-found.mean) and opposite.high == pytest.approx(-found.low)
    assert found.mean == pytest.approx(stats.spearmanr(a_N, b_N, nan_policy="omit")[0])
    assert found.low < found.mean < found.high and found.problems == 30
    within = summarise_with_chance([compute_spearman(a_N, b_N, groups)], resamples=100)[0]
    assert found.mean > 0.9 > 0.5 > within.mean  # pooled correlations are of problems, not of choices
