"""Inference against textbook formulas, enumeration and simulation. S seeds, P problems, T trials, R resamples."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from lark.comparison.inference import (
    Interval,
    adjust_holm,
    compute_mean_interval,
    compute_paired_difference,
    compute_sign_flip_p,
    compute_smallest_detectable,
)

ANY = (-math.inf, math.inf)
"""Bounds of values that are no accuracies."""


def simulated_accuracies(
    rng: np.random.Generator, *, trials: int, seeds: int, problems: int, seed_sd: float
) -> np.ndarray:
    """avg@4 of two arms that are equally good on average, [T, 2, S, P].

    Log-odds of a right answer: problems vary in difficulty (standard deviation 1.6), in what an arm gains (.6 an arm),
    in what a seed does to a single problem (.35 an arm), and a seed shifts all problems of an arm by `seed_sd` (.12 is
    2 points of accuracy an arm, 2.8 of the difference; .25 twice that).
    """
    difficulty = 1.6 * rng.normal(size=(trials, 1, 1, problems))
    gain = 0.6 * rng.normal(size=(trials, 2, 1, problems))
    shift = seed_sd * rng.normal(size=(trials, 2, seeds, 1))
    interaction = 0.35 * rng.normal(size=(trials, 2, seeds, problems))
    return rng.binomial(4, expit(difficulty + gain + shift + interaction)) / 4


def intervals(accuracy_T2SP: np.ndarray) -> list[Interval]:
    return [compute_paired_difference(a, b, resamples=400, seed=i) for i, (a, b) in enumerate(accuracy_T2SP)]


def coverage(found: list[Interval], truth: float = 0.0) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in found]))


def test_estimate_is_the_mean_difference():
    a_SP, b_SP = np.array([[1.0, 0.5, 0.0]] * 3), np.array([[0.5, 0.5, 0.25]] * 3)
    interval = compute_paired_difference(a_SP, b_SP, resamples=200)
    assert interval.estimate == pytest.approx(0.25 / 3)
    assert interval.low <= interval.estimate <= interval.high
    assert (interval.seeds, interval.problems, interval.level, interval.label) == (3, 3, 0.95, "")


def test_resampling_is_crossed():
    """For x = seed effect + problem effect both variances of a mean add up, whatever the other dimension's size."""
    rng = np.random.default_rng(0)
    seed_S, problem_P = rng.normal(size=8), rng.normal(size=40)
    a_SP = seed_S[:, None] + problem_P
    interval = compute_paired_difference(a_SP, np.zeros_like(a_SP), bounds=ANY, resamples=40_000)
    of_seeds, of_problems = seed_S.var(ddof=1) / 8, problem_P.var(ddof=1) / 40
    assert interval.standard_error == pytest.approx(np.sqrt(of_seeds + of_problems))
    df = (of_seeds + of_problems) ** 2 / (of_seeds**2 / 7 + of_problems**2 / 39)  # Welch and Satterthwaite
    assert interval.df == pytest.approx(df)
    expected = stats.t.interval(0.95, df, interval.estimate, interval.standard_error)
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.15 * interval.standard_error)


def test_the_interval_is_the_bootstrap_s_and_not_only_its_standard_error_s():
    """The resampled means have the variance stated, and their skewness reaches the interval."""
    rng = np.random.default_rng(7)
    a_SP = rng.exponential(size=(1, 30)) ** 2 + 0.3 * rng.normal(size=(6, 30)) + 0.3 * rng.normal(size=(6, 1))
    narrow = compute_paired_difference(a_SP, np.zeros_like(a_SP), bounds=ANY, resamples=40_000, level=0.02)
    wide = compute_paired_difference(a_SP, np.zeros_like(a_SP), bounds=ANY, resamples=40_000)
    assert wide.high - wide.estimate > 1.15 * (wide.estimate - wide.low)
    for one in (narrow, wide):
        half = stats.t.ppf((1 + one.level) / 2, one.df) * one.standard_error
        assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.1)


def test_standard_error_is_unbiased():
    """Its square against the variance of the mean over trials; seeds, problems and residuals all matter here."""
    rng = np.random.default_rng(8)
    accuracy = simulated_accuracies(rng, trials=1200, seeds=6, problems=40, seed_sd=0.25)
    found = [compute_paired_difference(a, b, resamples=100) for a, b in accuracy]
    variance = np.var([one.estimate for one in found])
    assert np.mean([one.standard_error**2 for one in found]) == pytest.approx(variance, rel=0.12)


def test_the_same_seed_gives_the_same_interval():
    a_SP, b_SP = np.random.default_rng(1).random((2, 4, 30))
    first = compute_paired_difference(a_SP, b_SP, resamples=500, seed=3)
    assert compute_paired_difference(a_SP, b_SP, resamples=500, seed=3) == first
    assert compute_paired_difference(a_SP, b_SP, resamples=500, seed=4) != first
    wider = compute_paired_difference(a_SP, b_SP, resamples=500, seed=3, level=0.99)
    assert wider.low < first.low and wider.high > first.high


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_resample_problems_only(seeds):
    rng = np.random.default_rng(2)
    problem_P, seed_S = rng.normal(size=50), 100.0 * np.arange(seeds)
    a_SP = problem_P + seed_S[:, None]
    interval = compute_paired_difference(a_SP, np.zeros_like(a_SP), bounds=ANY, resamples=20_000)
    assert interval.label == "seed variance not estimated"
    assert interval.standard_error == pytest.approx(stats.sem(problem_P))
    assert interval.df == 49


def test_one_problem_gives_no_interval():
    interval = compute_paired_difference(np.ones((3, 1)), np.zeros((3, 1)))
    assert interval.estimate == 1
    assert np.isnan([interval.low, interval.high, interval.standard_error, interval.df]).all()
    assert interval.label == "one problem, no interval"


@pytest.mark.parametrize("problems", [2, 3, 5, 30])
@pytest.mark.parametrize("seeds", [1, 3])
def test_no_interval_leaves_what_accuracies_can_be(problems, seeds):
    rng = np.random.default_rng(problems)
    for _ in range(20):
        a_SP, b_SP = rng.integers(4, 5, (seeds, problems)) / 4, rng.integers(0, 2, (seeds, problems)) / 4
        interval = compute_paired_difference(a_SP, b_SP, resamples=200)
        assert -1 <= interval.low <= interval.estimate <= interval.high <= 1


def test_problems_that_all_differ_alike_have_an_interval_of_the_unseen():
    """Exact for the rarest case, that another problem differs by as much as can be; wider with fewer problems."""
    for problems in (3, 40, 200):
        third = compute_paired_difference(np.full((3, problems), 1 / 3), np.zeros((3, problems)))
        share = stats.beta.ppf(0.975, 1, problems)  # Clopper-Pearson of 0 in P
        assert third.low == pytest.approx(1 / 3 - share * 4 / 3) and third.high == pytest.approx(1 / 3 + share * 2 / 3)
        assert np.isnan([third.standard_error, compute_smallest_detectable(third.standard_error, df=third.df)]).all()


@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.0), (3, 0.25), (5, 0.12), (10, 0.0), (10, 0.25)])
def test_coverage_of_avg_at_4_with_seed_problem_and_residual_variance(seeds, seed_sd):
    """Nominal .95; 400 trials tell it to within .022."""
    rng = np.random.default_rng(3)
    accuracy = simulated_accuracies(rng, trials=400, seeds=seeds, problems=100, seed_sd=seed_sd)
    assert 0.92 <= coverage(intervals(accuracy)) <= 0.985


def test_coverage_of_a_true_difference():
    """The second arm is better by one in log-odds; the truth comes from many problems and seeds."""
    rng = np.random.default_rng(10)

    def better(trials: int, seeds: int, problems: int) -> np.ndarray:
        logit = 1.6 * rng.normal(size=(trials, 1, 1, problems)) + 0.2 * rng.normal(size=(trials, 2, seeds, 1))
        return rng.binomial(4, expit(logit + np.array([0.0, 1.0])[:, None, None])) / 4

    a, b = better(1, 2000, 2000)[0]
    found = intervals(better(400, 4, 80))
    assert 0.92 <= coverage(found, a.mean() - b.mean()) <= 0.985
    assert coverage(found, 0.0) < 0.1


@pytest.mark.parametrize("problems", [30, 200])
def test_coverage_over_problems_with_one_seed(problems):
    """Where seeds do not differ; where they do, the label says that this interval does not cover them."""
    accuracy = simulated_accuracies(np.random.default_rng(4), trials=500, seeds=1, problems=problems, seed_sd=0.0)
    assert 0.925 <= coverage(intervals(accuracy)) <= 0.975


@pytest.mark.parametrize("problems", [1, 4, 9])
def test_sign_flip_equals_enumeration(problems):
    difference_P = np.random.default_rng(problems).normal(0.4, 1, problems).round(1)
    flips = np.array(list(itertools.product([-1, 1], repeat=problems)))
    mean_F = (flips * difference_P).mean(1)
    expected = (np.abs(mean_F) >= abs(difference_P.mean()) - 1e-12).mean()
    assert compute_sign_flip_p(difference_P) == pytest.approx(expected)


def test_sign_flip_of_many_problems():
    rng = np.random.default_rng(5)
    assert compute_sign_flip_p(np.zeros(40)) == 1
    difference_P = rng.normal(0.3, 1, 60)
    normal = 2 * stats.norm.sf(abs(difference_P.sum()) / np.sqrt((difference_P**2).sum()))
    assert compute_sign_flip_p(difference_P) == pytest.approx(normal, abs=0.02)
    assert compute_sign_flip_p(np.ones(40), resamples=999) == 1 / 1000  # never 0
    assert (
        compute_sign_flip_p(difference_P, seed=1)
        == compute_sign_flip_p(difference_P, seed=1)
        != compute_sign_flip_p(difference_P, seed=2)
    )


@pytest.mark.parametrize("samples", [1, 3, 12])
def test_sums_that_are_equal_but_for_rounding_are_ties(samples):
    """Accuracies are multiples of 1 / samples; convolving over problems gives the exact null distribution of sums."""
    count_P = np.random.default_rng(12).integers(-2, 4, 60)
    null = np.ones(1)  # of the sum plus the magnitudes' so far
    for count in np.abs(count_P):
        null = (np.pad(null, (0, 2 * count)) + np.pad(null, (2 * count, 0))) / 2
    total = np.abs(count_P).sum()
    exact = null[np.abs(np.arange(-total, total + 1)) >= abs(count_P.sum())].sum()
    p = compute_sign_flip_p(count_P / samples, resamples=99_999)
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 99_999))
    assert p == compute_sign_flip_p(count_P.astype(float), resamples=99_999)


def test_all_sign_flips_are_as_far_from_a_mean_of_0_as_rounding_puts_it():
    difference_P = np.array([0.1, 0.2, -0.3])
    assert difference_P.sum() != 0
    assert compute_sign_flip_p(difference_P) == compute_sign_flip_p(np.repeat(difference_P, 10)) == 1


def test_blocks_of_sign_flips_are_all_counted(monkeypatch):
    """Of 12 problems every flip by itself, of 40 at least one in each of many blocks."""
    difference_P = np.random.default_rng(13).normal(0.2, 1, 40)
    exact, drawn = compute_sign_flip_p(difference_P[:12]), compute_sign_flip_p(difference_P)
    monkeypatch.setattr("lark.common.bootstrap._CELLS", 1000)
    assert compute_sign_flip_p(difference_P[:12]) == exact
    assert compute_sign_flip_p(difference_P) == pytest.approx(drawn, abs=0.02)


def test_problems_without_a_difference_do_not_change_the_sign_flip_p():
    difference_P = np.array([0.25, -0.5, 0.75, 0.25, 0.5])
    assert compute_sign_flip_p(np.concatenate([difference_P, np.zeros(100)])) == compute_sign_flip_p(difference_P)
    assert compute_sign_flip_p(np.array([0.25, *np.zeros(20)])) == 1
    rounded_P = np.full(100, 0.1 + 0.2 - 0.3)  # not 0
    assert compute_sign_flip_p(np.concatenate([difference_P, rounded_P])) == compute_sign_flip_p(difference_P)


def test_holm_by_hand():
    np.testing.assert_allclose(adjust_holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(adjust_holm([0.2, 0.5, 0.9]), [0.6, 1, 1])
    np.testing.assert_allclose(adjust_holm([0.3]), [0.3])
    assert adjust_holm([]).size == 0


def test_smallest_detectable_difference_is_found_with_its_power():
    assert compute_smallest_detectable(1.0) == pytest.approx(1.959964 + 0.841621, abs=1e-6)
    rng = np.random.default_rng(6)
    difference = compute_smallest_detectable(0.25, power=0.7, alpha=0.1)
    found = np.abs(rng.normal(difference, 0.25, 40_000)) > stats.norm.ppf(0.95) * 0.25
    assert found.mean() == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("df", [4.0, 12.5])
def test_smallest_detectable_difference_of_a_t_test(df):
    """Against the exact power, which the non-central t distribution gives."""
    difference = compute_smallest_detectable(1.0, df=df)
    critical = stats.t.ppf(0.975, df)
    power = stats.nct.sf(critical, df, difference) + stats.nct.cdf(-critical, df, difference)
    assert power == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "least", "most"),
    [(1, 0.0, 0.75, 0.85), (3, 0.12, 0.66, 0.85), (10, 0.12, 0.75, 0.85)],
)
def test_the_interval_excludes_0_at_the_smallest_detectable_difference(seeds, seed_sd, least, most):
    """The whole procedure: what one experiment calls detectable is, on average, what further ones detect. With 3 seeds
    less often: how seeds differ is then known too roughly."""
    rng = np.random.default_rng(11)
    found = intervals(simulated_accuracies(rng, trials=400, seeds=seeds, problems=100, seed_sd=seed_sd))
    true = np.mean([compute_smallest_detectable(one.standard_error, df=one.df) for one in found])
    detected = np.mean([one.low + true > 0 or one.high + true < 0 for one in found])  # all values shift by `true`
    assert least <= detected <= most


def test_interval_of_a_mean_is_that_of_a_difference_from_0_within_0_and_1():
    rng = np.random.default_rng(0)
    value_P = rng.binomial(4, rng.beta(0.3, 0.3, 60)) / 4
    found, difference = compute_mean_interval(value_P), compute_paired_difference(value_P[None], np.zeros((1, 60)))
    assert (found.estimate, found.low, found.high) == (value_P.mean(), difference.low, difference.high)
    assert found.label == ""
    rare = np.zeros(40)
    rare[0] = 0.25
    assert compute_mean_interval(rare).low == 0 < compute_mean_interval(rare).high
    assert compute_mean_interval(1 - rare).high == 1
    all_right = compute_mean_interval(np.ones(30))
    assert (all_right.low, all_right.high) == (pytest.approx(stats.beta.ppf(0.025, 30, 1)), 1)
    assert compute_mean_interval(np.ones(1)).label == "one problem, no interval"


@pytest.mark.parametrize(("a", "b", "least"), [(0.3, 0.3, 0.92), (0.3, 2.7, 0.89)])
def test_coverage_of_the_mean_of_30_problems(a, b, least):
    rng, trials = np.random.default_rng(1), 300
    found = [compute_mean_interval(rng.binomial(4, rng.beta(a, b, 30)) / 4, resamples=500) for _ in range(trials)]
    assert np.mean([one.low <= a / (a + b) <= one.high for one in found]) >= least
