"""Scores against the truth: on gradients made up by hand, where everything can be worked out.

Shapes: N candidates, G problems, d parameters.
"""

import numpy as np
import pytest
from scipy import stats
from selection.scores.test_gradients import gains_by_derivative

from lark.common.groups import Groups
from lark.diagnostics import fidelity
from lark.diagnostics.exact_gradients import ExactGradients, add_exact_columns
from lark.scoring.passes import HeadGradients
from lark.selection.candidates import Candidates
from lark.selection.scores.statistics import Lark

WANTED = ExactGradients()


def arrays(values):
    column = np.empty(len(values), object)
    column[:] = [np.asarray(value, float) for value in values]
    return column


def sample(problems=6, seed=0, d=5):
    """Candidates whose passes are those of random gradients. Loss drops are those of a quadratic: twice the step, a
    little less drop."""
    rng, sizes = np.random.default_rng(seed), [4 + i % 3 for i in range(problems)]
    index_N = rng.permutation(np.repeat(np.arange(problems), sizes))
    n = len(index_N)
    vector_Nd, loss_N = rng.normal(size=(n, d)) + 0.5, rng.uniform(0.2, 2.0, n)
    norm_N = np.square(vector_Nd).sum(1)
    mates = [np.flatnonzero(index_N == index_N[i]) for i in range(n)]
    gram = arrays([vector_Nd[mates[i]] @ vector_Nd[i] for i in range(n)])
    gram_rows = np.empty(n, object)
    gram_rows[:] = [10 + rows for rows in mates]
    columns = {
        "squared_norm": norm_N,
        "gram": gram,
        "gram_rows": gram_rows,
        "loss_before": loss_N,
        "drop": norm_N * 0.98,
        "drop_half": norm_N * 0.99,
    }
    own = Candidates(
        problem_id=np.array([f"p{i}" for i in index_N], object),
        candidate_id=np.array([str(i) for i in range(n)], object),
        row_N=10 + np.arange(n),
        statistics={"loss": loss_N, "brier": rng.uniform(0.1, 1, n), "num_tokens": rng.integers(5, 90, n)},
        read_column=lambda name, row_N: np.array([f"t{row % 3}" for row in row_N], object),
        passes={HeadGradients(): {"gram": gram, "gram_rows": gram_rows}},
    )
    return add_exact_columns(own, WANTED, columns), vector_Nd


def test_truths_by_their_definitions():
    own, vector_Nd = sample()
    found = fidelity.compute_truths(own, WANTED, average="trajectory")
    norm_N, loss_N = np.square(vector_Nd).sum(1), own["loss"]
    assert found["rho"] == pytest.approx(norm_N / loss_N)
    assert found["loss_drop"] == pytest.approx(0.98 * norm_N / loss_N)
    for rows in own.groups.split():  # the derivative of ||sum w grad L||^2 / sum w L at w = 1
        total, sum_d = loss_N[rows].sum(), vector_Nd[rows].sum(0)
        gain = 2 * vector_Nd[rows] @ sum_d / total - loss_N[rows] * (sum_d @ sum_d) / total**2
        assert found["g"][rows] == pytest.approx(gain)


def test_proxies_by_their_definitions():
    own, vector_Nd = sample()
    found = fidelity.compute_proxies(own, average="trajectory")
    assert found["rho_length"] == pytest.approx(own["brier"] / own["num_tokens"] / own["loss"])
    for name, brier_N in (("lark", own["brier"]), ("lark_length", own["brier"] / own["num_tokens"])):
        for rows in own.groups.split():  # gradients orthogonal, their squared norms the Brier scores
            total, loss_K = own["loss"][rows].sum(), own["loss"][rows]
            gain = 2 * brier_N[rows] / total - loss_K * brier_N[rows].sum() / total**2
            assert found[name][rows] == pytest.approx(gain)
    assert found["rho_head"] == pytest.approx(np.square(vector_Nd).sum(1) / own["loss"])  # the head's are all here
    assert found["lark_head"] == pytest.approx(fidelity.compute_truths(own, WANTED, average="trajectory")["g"])
    assert (found["minus_length"] == -own["num_tokens"]).all()


def test_the_gain_is_that_of_the_average_which_is_trained():
    own, vector_Nd = sample()
    truth, found = fidelity.compute_truths(own, WANTED, average="token"), fidelity.compute_proxies(own, average="token")
    for rows in own.groups.split():
        expected_K = gains_by_derivative(vector_Nd[rows], own["loss"][rows], own["num_tokens"][rows])
        assert truth["g"][rows] == pytest.approx(expected_K, rel=1e-6)
    assert found["lark_head"] == pytest.approx(truth["g"])  # the head's gradients are all here
    for name, score in (("lark", Lark()), ("lark_length", Lark(length_exponent=1.0))):  # of no average but their own
        assert found[name] == pytest.approx(score(own))


def test_the_truth_agrees_with_itself_and_noise_only_by_chance():
    own, _ = sample(problems=60)
    truth = fidelity.compute_truths(own, WANTED, average="trajectory")
    noise_N = np.random.default_rng(1).normal(size=len(own))
    scores = {"truth": truth["rho"], "minus": -truth["rho"], "noise": noise_N}
    found = fidelity.compare_scores(scores, truth, own, budget=2, seed=0, resamples=200)
    assert found["truth"]["rho"]["spearman"].mean == pytest.approx(1)
    assert found["truth"]["loss_drop"]["overlap"].mean == 1
    assert found["minus"]["rho"]["spearman"].mean == pytest.approx(-1)
    for kind in ("spearman", "overlap"):
        noise = found["noise"]["rho"][kind]
        assert noise.chance_low < noise.mean < noise.chance_high and noise.problems == 60
    assert found["noise"]["g"]["overlap"].chance == pytest.approx(np.mean([2 / k for k in (4, 5, 6)]))


def test_the_step_is_checked_by_halving_it():
    own, _ = sample()
    found = fidelity.check_step(own, WANTED)
    assert found["median_change"] == pytest.approx(0.99 / 0.98 - 1) and found["passed"] and found["rises"] == 0
    own.of(WANTED)["drop_half"][:] *= 1.1
    assert not fidelity.check_step(own, WANTED)["passed"]


def test_kappa_of_a_sample():
    own, vector_Nd = sample()
    norm_N, tokens_N = np.square(vector_Nd).sum(1), own["num_tokens"].astype(float)
    found = fidelity.summarise_kappa(norm_N, own["brier"], tokens_N, own.groups, resamples=100)
    kappa_N = norm_N / own["brier"]
    assert found["mean"] == pytest.approx(kappa_N.mean())
    assert found["cv"] == pytest.approx(kappa_N.std() / kappa_N.mean())
    assert found["quantiles"]["p50"] == pytest.approx(np.median(kappa_N))
    within = [kappa_N[rows].std() / kappa_N[rows].mean() for rows in own.groups.split()]
    assert found["cv_within_problems"].mean == pytest.approx(np.mean(within))


def test_candidates_without_a_gradient_have_no_kappa():
    found = fidelity.summarise_kappa(
        np.array([0.0, 2.0, 4.0]),
        np.array([1.0, 1.0, 0.0]),
        np.array([3.0, 3.0, 3.0]),
        Groups.from_ids("aab"),
        resamples=9,
    )
    assert (found["candidates"], found["left_out"], found["mean"]) == (1, 2, 2.0)


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.7])
def test_the_length_exponent_is_found_within_problems(power):
    """Problems with long trajectories have high constants, which pooled would be taken for an effect of length."""
    rng, groups = np.random.default_rng(0), Groups(np.repeat(np.arange(80), 5), 80)
    size_G = rng.uniform(20, 400, 80)
    tokens_N = groups.spread(size_G) * rng.uniform(0.5, 2, 400)
    kappa_N = groups.spread(size_G**1.5) * tokens_N**power
    exact = fidelity.fit_length_exponent(kappa_N, tokens_N, groups, resamples=200)
    assert (exact.mean, exact.low, exact.high) == (pytest.approx(power),) * 3
    noisy = fidelity.fit_length_exponent(kappa_N * np.exp(0.5 * rng.normal(size=400)), tokens_N, groups, resamples=1000)
    assert noisy.low < power < noisy.high and noisy.high - noisy.low < 0.4


def test_the_interval_covers_the_exponent_as_often_as_it_says():
    rng, groups, covered = np.random.default_rng(0), Groups(np.repeat(np.arange(30), 6), 30), 0
    for _ in range(150):
        tokens_N = rng.uniform(20, 400, 180)
        kappa_N = np.exp(rng.normal(size=180) + groups.spread(rng.normal(size=30))) / tokens_N
        found = fidelity.fit_length_exponent(kappa_N, tokens_N, groups, resamples=200)
        covered += found.low < -1 < found.high
    assert stats.binomtest(covered, 150, 0.95).pvalue > 0.001


def test_cosines_between_a_problems_gradients():
    own, vector_Nd = sample()
    unit_Nd = vector_Nd / np.linalg.norm(vector_Nd, axis=1, keepdims=True)
    by_problem = [
        [unit_Nd[a] @ unit_Nd[b] for i, a in enumerate(rows) for b in rows[i + 1 :]] for rows in own.groups.split()
    ]
    found = fidelity.measure_cosines(own, own.of(WANTED), resamples=100)
    every = np.concatenate(by_problem)
    assert found["mean"].mean == pytest.approx(np.mean([np.mean(one) for one in by_problem]))
    assert found["pairs"] == len(every)
    assert found["quantiles"]["p95"] == pytest.approx(np.quantile(every, 0.95))
