import itertools

import numpy as np
import pytest
from scipy import stats

from lark.inference import holm, paired_difference, sign_flip_p, smallest_detectable_difference


def test_estimate_is_the_mean_difference():
    a_SP, b_SP = np.array([[1.0, 0.5, 0.0]] * 3), np.array([[0.5, 0.5, 0.25]] * 3)
    interval = paired_difference(a_SP, b_SP, resamples=200)
    assert interval.estimate == pytest.approx(0.25 / 3)
    assert interval.low <= interval.estimate <= interval.high
    assert (interval.seeds, interval.problems, interval.level, interval.label) == (3, 3, 0.95, "")


def test_resampling_is_crossed():
    # With x = seed effect + problem effect the bootstrap variance is exactly the sum of both resampling variances.
    rng = np.random.default_rng(0)
    seed_S, problem_P = rng.normal(size=5), rng.normal(size=40)
    a_SP = seed_S[:, None] + problem_P
    interval = paired_difference(a_SP, np.zeros_like(a_SP), resamples=40_000)
    expected = np.sqrt(seed_S.var() / 5 + problem_P.var() / 40)
    assert interval.standard_error == pytest.approx(expected, rel=0.02)
    normal = stats.norm.interval(0.95, interval.estimate, expected)
    np.testing.assert_allclose([interval.low, interval.high], normal, atol=0.2 * expected)


def test_the_same_seed_gives_the_same_interval():
    a_SP, b_SP = np.random.default_rng(1).random((2, 4, 30))
    first = paired_difference(a_SP, b_SP, resamples=500, seed=3)
    assert paired_difference(a_SP, b_SP, resamples=500, seed=3) == first
    assert paired_difference(a_SP, b_SP, resamples=500, seed=4) != first
    wider = paired_difference(a_SP, b_SP, resamples=500, seed=3, level=0.99)
    assert wider.low < first.low and wider.high > first.high


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_resample_problems_only(seeds):
    rng = np.random.default_rng(2)
    problem_P, seed_S = rng.normal(size=50), 100.0 * np.arange(seeds)
    a_SP = problem_P + seed_S[:, None]
    interval = paired_difference(a_SP, np.zeros_like(a_SP), resamples=20_000)
    assert interval.label == "seed variance not estimated"
    assert interval.standard_error == pytest.approx(problem_P.std() / np.sqrt(50), rel=0.03)


def test_one_problem_gives_no_interval():
    interval = paired_difference(np.ones((3, 1)), np.zeros((3, 1)))
    assert interval.estimate == 1
    assert np.isnan([interval.low, interval.high, interval.standard_error]).all()
    assert interval.label == "one problem, no interval"


def test_coverage_with_seed_problem_and_residual_variance():
    rng = np.random.default_rng(3)
    seeds, problems, trials, covered = 5, 60, 400, 0
    for trial in range(trials):
        effects = 0.02 * rng.normal(size=(seeds, 1)) + 0.2 * rng.normal(size=(1, problems))
        difference_SP = 0.1 + effects + 0.2 * rng.normal(size=(seeds, problems))
        interval = paired_difference(difference_SP, np.zeros_like(difference_SP), resamples=500, seed=trial)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.91 <= covered / trials <= 0.99


def test_coverage_over_problems_with_one_seed():
    rng = np.random.default_rng(4)
    trials = 400
    covered = 0
    for trial in range(trials):
        difference_SP = 0.1 + 0.3 * rng.normal(size=(1, 80))
        interval = paired_difference(difference_SP, np.zeros_like(difference_SP), resamples=500, seed=trial)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.91 <= covered / trials <= 0.98


@pytest.mark.parametrize("problems", [1, 4, 9])
def test_sign_flip_equals_enumeration(problems):
    difference_P = np.random.default_rng(problems).normal(0.4, 1, problems).round(1)
    flips = np.array(list(itertools.product([-1, 1], repeat=problems)))
    mean_F = (flips * difference_P).mean(1)
    expected = (np.abs(mean_F) >= abs(difference_P.mean()) - 1e-12).mean()
    assert sign_flip_p(difference_P) == pytest.approx(expected)


def test_sign_flip_of_many_problems():
    rng = np.random.default_rng(5)
    assert sign_flip_p(np.zeros(40)) == 1
    difference_P = rng.normal(0.3, 1, 60)
    normal = 2 * stats.norm.sf(abs(difference_P.sum()) / np.sqrt((difference_P**2).sum()))
    assert sign_flip_p(difference_P) == pytest.approx(normal, abs=0.02)
    assert sign_flip_p(np.ones(40), resamples=999) == pytest.approx(2 / 1000)  # twice one tail, never 0


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.2, 0.5, 0.9]), [0.6, 1, 1])
    np.testing.assert_allclose(holm([0.3]), [0.3])
    assert holm([]).size == 0


def test_smallest_detectable_difference_is_found_with_its_power():
    assert smallest_detectable_difference(1.0) == pytest.approx(1.959964 + 0.841621, abs=1e-6)
    rng = np.random.default_rng(6)
    difference = smallest_detectable_difference(0.25, power=0.7, alpha=0.1)
    found = np.abs(rng.normal(difference, 0.25, 40_000)) > stats.norm.ppf(0.95) * 0.25
    assert found.mean() == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    ("a", "b", "settings", "message"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), {}, r"got \(3, 4\) and \(3, 5\)"),
        (np.zeros(4), np.zeros(4), {}, r"got \(4,\) and \(4,\)"),
        (np.zeros((3, 0)), np.zeros((3, 0)), {}, r"got \(3, 0\)"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), {}, "12 of 12 differences are NaN"),
        (np.zeros((3, 4)), np.zeros((3, 4)), {"level": 95}, "level=95 is not between 0 and 1"),
        (np.zeros((3, 4)), np.zeros((3, 4)), {"resamples": 5}, "resamples=5 is too few"),
    ],
)
def test_bad_input_of_paired_difference(a, b, settings, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b, **settings)


def test_bad_input_of_the_tests():
    with pytest.raises(ValueError, match="1 of 2 differences are NaN"):
        sign_flip_p(np.array([np.nan, 1.0]))
    with pytest.raises(ValueError, match=r"shape \(2, 2\); average over seeds first"):
        sign_flip_p(np.zeros((2, 2)))
    for wrong in ([0.5, 1.5], [np.nan], [[0.1]]):
        with pytest.raises(ValueError, match="p-values between 0 and 1"):
            holm(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"power=1\.0"):
        smallest_detectable_difference(1.0, power=1.0)
