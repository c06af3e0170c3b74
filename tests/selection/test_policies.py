import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lark.common.groups import Groups, tie_hash
from lark.selection.policies import KL, Chi2, Policy, Prior, Sample, TopB
from lark.selection.policy_weights import PolicyResult, compute_weights

NAN = float("nan")


def solve(
    policy: Policy, score: Sequence[float], prior: Sequence[float] | None = None
) -> tuple[np.ndarray, PolicyResult]:
    """Weights of one problem's candidates."""
    rows = len(score)
    groups = Groups(np.zeros(rows, np.int64), 1)
    tie_N = tie_hash(0, ["p"] * rows, range(rows))
    prior_N = np.ones(rows) if prior is None else np.array(prior, float)
    result = compute_weights(policy, np.array(score, float), groups, tie_N, prior_N, seed=0, problem_ids=["p"] * rows)
    return result.q_N, result


def water_filling(score: Sequence[float], prior: np.ndarray, tau: float) -> np.ndarray:
    """q_k = p_k max(0, 1 + (e_k - nu)/tau) with nu by bisection, in exact rational arithmetic."""
    e, p, tau_ = [Fraction(x) for x in score], [Fraction(x) for x in prior], Fraction(tau)
    total = sum(p)
    p = [x / total for x in p]

    def q(nu: Fraction) -> list[Fraction]:
        return [pk * max(Fraction(0), 1 + (ek - nu) / tau_) for ek, pk in zip(e, p, strict=True)]

    low, high = min(e), max(e) + tau_  # sum q >= 1 at low, = 0 at high
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(q(middle)) >= 1 else (low, middle)
    return np.array([float(x) for x in q(low)])


def chi2(q: np.ndarray, p: np.ndarray) -> float:
    return float(((q - p) ** 2 / p).sum())


def normal(prior: Sequence[float]) -> np.ndarray:
    return np.array(prior) / np.sum(prior)


# Scores a thousandth apart or a million apart, around any centre, often tied.
score_lists = st.builds(
    lambda steps, scale, centre: [centre + scale * step for step in steps],
    st.lists(st.integers(-6, 6), min_size=1, max_size=7),
    st.sampled_from([0.001, 1.0, 0.37, 1e6]),
    st.sampled_from([0.0, -3.0, 1e3]),
)
priors = st.lists(st.floats(0.05, 5), min_size=7, max_size=7)
policies = st.one_of(
    st.builds(Chi2, budget=st.integers(1, 5)),
    st.builds(Chi2, tau=st.sampled_from([1e-3, 0.2, 1.0, 50.0, 1e6])),
    st.builds(Chi2, radius=st.sampled_from([0.0, 0.01, 0.5, 1.3, 4.0])),
    st.builds(KL, budget=st.integers(1, 5)),
    st.builds(KL, tau=st.sampled_from([0.5, 2e6])),
    st.builds(KL, tau=st.sampled_from([0.5, 2e6]), budget=st.integers(1, 5)),
    st.builds(TopB, budget=st.integers(1, 5)),
    st.builds(Prior),
)
sampling = st.one_of(policies, st.builds(Sample, budget=st.integers(1, 5)))


@given(score_lists, priors, st.sampled_from([1e-3, 0.05, 0.7, 3.0, 1e3, 1e7]))
@settings(max_examples=150, deadline=None)
def test_chi2_by_tau_equals_exact_water_filling(score, prior, tau):
    prior = prior[: len(score)]
    q, result = solve(Chi2(tau=tau), score, prior)
    np.testing.assert_allclose(q, water_filling(score, normal(prior), tau), rtol=0, atol=1e-10)
    assert result.tau_G.tolist() == [tau]


@given(score_lists, priors, st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_chi2_by_budget_is_the_tau_solution_at_tau_b(score, prior, budget):
    prior = prior[: len(score)]
    ordered = sorted(score, reverse=True)
    assume(len(score) > budget and ordered[0] > ordered[budget])
    q, result = solve(Chi2(budget=budget), score, prior)
    tau_b = sum(pk * max(0.0, ek - ordered[budget]) for pk, ek in zip(normal(prior), score, strict=True))
    np.testing.assert_allclose(result.tau_G, [tau_b], rtol=1e-12)
    np.testing.assert_allclose(q, water_filling(score, normal(prior), tau_b), rtol=0, atol=1e-10)
    assert (q[np.array(score) <= ordered[budget]] == 0).all()
    assert np.count_nonzero(q) == budget - result.zero_weight_G[0]


@given(score_lists, priors, st.sampled_from([1e-6, 0.01, 0.3, 1.0, 2.5, 6.0]))
@settings(max_examples=150, deadline=None)
def test_chi2_by_radius_is_a_water_filling_on_the_radius(score, prior, radius):
    prior = normal(prior[: len(score)])
    q, result = solve(Chi2(radius=radius), score, prior)  # type: ignore[arg-type]
    best = np.array(score) == max(score)
    if radius >= 1 / prior[best].sum() - 1:
        np.testing.assert_allclose(q, np.where(best, prior / prior[best].sum(), 0), atol=1e-14)
        assert result.tau_G[0] == 0
    else:  # on the boundary and a water-filling: the optimality conditions of the convex problem, tau its multiplier
        assert chi2(q, prior) == pytest.approx(radius, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(q, water_filling(score, prior, result.tau_G[0]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("tau", [0.05, 0.4, 2.0])
def test_chi2_by_tau_maximises_the_penalised_score(tau):
    score, prior = np.array([0.3, -0.2, 0.5, 0.1]), np.array([0.1, 0.4, 0.2, 0.3])
    q, _ = solve(Chi2(tau=tau), score, prior)  # type: ignore[arg-type]
    found = minimize(
        lambda x: -(x @ score - tau / 2 * chi2(x, prior)),
        prior,
        method="SLSQP",
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(q, found.x, atol=1e-5)


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.6, 1.5]))
@settings(deadline=None)
def test_no_random_point_within_the_radius_scores_higher(seed, radius):
    rng = np.random.default_rng(seed)
    score, prior = rng.normal(size=6), rng.dirichlet(np.ones(6) * 3)
    q, _ = solve(Chi2(radius=radius), score, prior)  # type: ignore[arg-type]
    point_RK = rng.dirichlet(np.ones(6), 300)
    distance_R = ((point_RK - prior) ** 2 / prior).sum(1)
    shrink_R = np.minimum(1, np.sqrt(radius / distance_R))  # towards the prior, onto the radius
    point_RK = prior + shrink_R[:, None] * (point_RK - prior)
    assert (point_RK @ score).max() <= q @ score + 1e-12


@given(sampling, score_lists, priors)
@settings(max_examples=300, deadline=None)
def test_weights_are_a_distribution(policy, score, prior):
    q, result = solve(policy, [*score, NAN], [*prior[: len(score)], 1.0])
    assert q.sum() == pytest.approx(1, abs=1e-12)
    assert (q >= 0).all() and q[-1] == 0
    assert result.valid_G.tolist() == [len(score)]
    if policy.budget is not None:
        assert np.count_nonzero(q) <= policy.budget


@given(policies, score_lists, priors)
@settings(max_examples=300, deadline=None)
def test_a_higher_score_never_has_a_lower_ratio_to_the_prior(policy, score, prior):
    q, _ = solve(policy, score, prior[: len(score)])
    ratio, e = q / normal(prior[: len(score)]), np.array(score)
    assert (ratio[:, None] >= ratio[None, :] - 1e-9)[e[:, None] > e[None, :]].all()


@given(sampling, st.lists(score_lists, min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_order_of_rows_changes_nothing(policy, problems, random):
    problem_ids = [str(g) for g, score in enumerate(problems) for _ in score]
    candidate_ids = [str(k) for score in problems for k in range(len(score))]
    score_N = np.array([e for score in problems for e in score])
    prior_N = np.linspace(0.5, 2, score_N.size)

    def run(order: np.ndarray) -> np.ndarray:
        ids = [problem_ids[row] for row in order]
        tie_N = tie_hash(3, ids, [candidate_ids[row] for row in order])
        groups = Groups.from_ids(ids)
        return compute_weights(policy, score_N[order], groups, tie_N, prior_N[order], seed=3, problem_ids=ids).q_N

    order = np.arange(score_N.size)
    straight = run(order)
    random.shuffle(order)
    np.testing.assert_array_equal(run(order), straight[order])


def test_a_million_rows_do_not_disturb_each_other():
    rng = np.random.default_rng(0)
    index_N = np.sort(np.concatenate([np.arange(200_000), rng.integers(0, 200_000, 800_000)]))
    score_N = rng.normal(size=index_N.size) * 10.0 ** rng.integers(-6, 7, 200_000)[index_N]
    tie_N = np.arange(index_N.size).astype(np.uint64)
    groups = Groups(index_N, 200_000)
    for policy in (Chi2(tau=1e-6), Chi2(radius=0.7), Chi2(budget=2)):
        q_N = compute_weights(policy, score_N, groups, tie_N, np.ones(index_N.size), seed=0).q_N
        np.testing.assert_allclose(groups.sum(q_N), 1, atol=1e-12)
        for group in range(0, 200_000, 20_011):
            rows = index_N == group
            np.testing.assert_array_equal(q_N[rows], solve(policy, score_N[rows])[0])  # type: ignore[arg-type]


@given(score_lists, st.sampled_from([0.05, 0.4, 1.0]))
def test_effective_sample_size_follows_from_the_radius(score, radius):
    tied = score.count(max(score))
    assume(radius < len(score) / tied - 1)
    q, _ = solve(Chi2(radius=radius), score)
    assert 1 / (q**2).sum() == pytest.approx(len(score) / (1 + radius))


@given(score_lists, st.integers(1, 6))
def test_a_budget_costs_at_least_its_chi2(score, budget):
    q, _ = solve(Chi2(budget=budget), score)
    assert chi2(q, np.full(len(score), 1 / len(score))) >= len(score) / budget - 1 - 1e-9


def test_the_limits_of_tau_are_the_prior_and_the_best():
    score, prior = [0.1, 0.3, -2.0], [0.2, 0.3, 0.5]
    np.testing.assert_allclose(solve(Chi2(tau=1e12), score, prior)[0], prior, atol=1e-11)
    np.testing.assert_array_equal(solve(Chi2(tau=1e-9), score, prior)[0], [0, 1, 0])
    np.testing.assert_allclose(solve(Chi2(radius=0), score, prior)[0], prior, atol=1e-15)
    np.testing.assert_array_equal(solve(Chi2(radius=100), score, prior)[0], [0, 1, 0])


perturbations = st.lists(st.floats(-1, 1), min_size=7, max_size=7)


@given(score_lists, priors, perturbations, st.sampled_from([1e-3, 0.3, 2.0, 100.0]))
@settings(max_examples=300, deadline=None)
def test_weights_by_tau_move_by_at_most_the_scores_change_over_tau(score, prior, change, tau):
    # The penalty is tau-strongly convex in the 1-norm (Cauchy-Schwarz with any prior of mass 1), so its conjugate's
    # gradient, the weights, is 1/tau-Lipschitz from the maximum norm to the 1-norm.
    moved = (np.array(score) + tau * np.array(change[: len(score)])).tolist()
    prior = prior[: len(score)]
    before, after = (solve(Chi2(tau=tau), e, prior)[0] for e in (score, moved))
    assert np.abs(after - before).sum() <= np.abs(np.subtract(moved, score)).max() / tau + 1e-9


@given(
    st.lists(st.integers(-6, 6), min_size=2, max_size=7),
    perturbations,
    st.sampled_from([0.01, 0.2, 3.0]),
    st.integers(1, 5),
)
@settings(max_examples=300, deadline=None)
def test_weights_by_budget_move_by_at_most_twice_the_range_of_the_change_over_the_gap(score, change, size, budget):
    assume(len(score) > budget)
    change_K = size * np.array(change[: len(score)])
    before, result = solve(Chi2(budget=budget), score)
    after, _ = solve(Chi2(budget=budget), np.array(score) + change_K)  # type: ignore[arg-type]
    assert np.abs(after - before).sum() * result.gap_G[0] <= 2 * np.ptp(change_K) + 1e-9


# Edge cases


def test_budget_by_hand():
    q, result = solve(Chi2(budget=2), [3.0, 1.0, 2.0, 0.0])
    np.testing.assert_allclose(q, [2 / 3, 0, 1 / 3, 0])
    assert result.tau_G[0] == pytest.approx(3 / 4) and result.gap_G[0] == pytest.approx(1.5)


@pytest.mark.parametrize("policy", [Chi2(budget=3), KL(budget=3), TopB(budget=3)])
@pytest.mark.parametrize("score", [[5.0], [5.0, 1.0], [5.0, NAN, 1.0, 0.0], [1.0, 1.0, 1.0]])
def test_nothing_excluded_is_the_prior(policy, score):
    prior = np.arange(1.0, len(score) + 1)
    q, result = solve(policy, score, prior)  # type: ignore[arg-type]
    valid = np.isfinite(score)
    np.testing.assert_allclose(q, np.where(valid, prior / prior[valid].sum(), 0))
    assert result.within_budget_G[0] and not result.tied_G[0] and result.zero_weight_G[0] == 0
    assert result.gap_G[0] == np.inf


@pytest.mark.parametrize("policy", [Chi2(budget=2), KL(budget=2), TopB(budget=2)])
def test_more_than_the_budget_tied_at_the_top_are_chosen_by_hash(policy):
    prior = [1.0, 2.0, 3.0, 4.0, 9.0]
    q, result = solve(policy, [1.0, 1.0, 1.0, 1.0, 0.0], prior)
    first = np.argsort(tie_hash(0, ["p"] * 4, range(4)))[:2]
    expected = np.zeros(5)
    expected[first] = np.array(prior)[first] / np.array(prior)[first].sum()
    np.testing.assert_allclose(q, expected)
    assert result.tied_G[0] and not result.within_budget_G[0] and result.gap_G[0] == 0


def test_rows_tied_with_the_best_excluded_leave_and_are_counted():
    q, result = solve(Chi2(budget=3), [2.0, 1.0, 1.0, 1.0, 0.0])
    assert q.tolist() == [1, 0, 0, 0, 0]
    assert result.zero_weight_G.tolist() == [2] and not result.tied_G[0]


@pytest.mark.parametrize("policy", [Chi2(budget=2), Chi2(tau=1.0), Chi2(radius=0.5), KL(tau=1.0)])
def test_invalid_rows_never_get_weight(policy):
    for score, prior in (
        ([NAN, 1.0, 0.5, -np.inf, 3.0], [1, 1, 1, 1, 1]),
        ([9.0, 1.0, 0.5, 9.0, 3.0], [0, 1, 1, 0, 1]),
    ):
        q, result = solve(policy, score, prior)
        np.testing.assert_allclose(q[[1, 2, 4]], solve(policy, [1.0, 0.5, 3.0])[0])
        assert q[[0, 3]].tolist() == [0, 0] and result.valid_G.tolist() == [3]


@given(sampling)
def test_a_problem_without_valid_candidates_is_dropped_and_counted(policy):
    groups = Groups.from_ids(["a", "b", "b", "c"])
    tie_N = np.arange(4).astype(np.uint64)
    score_N, prior_N = np.array([NAN, 1.0, 2.0, 5.0]), np.array([1.0, 1.0, 1.0, 0.0])
    result = compute_weights(policy, score_N, groups, tie_N, prior_N, seed=0, problem_ids=["a", "b", "b", "c"])
    assert result.empty.tolist() == [True, False, True]
    np.testing.assert_allclose(groups.sum(result.q_N), [0, 1, 0])
    assert result.record()["problems_without_valid"] == 2
    assert np.isnan(result.tau_G[[0, 2]]).all() and np.isnan(result.gap_G[[0, 2]]).all()


@given(sampling)
def test_nothing_at_all_is_no_error(policy):
    empty = np.zeros(0)
    result = compute_weights(policy, empty, Groups.from_ids([]), empty.astype(np.uint64), empty, seed=0, problem_ids=[])
    assert result.q_N.size == 0
    assert all(value in (0, None) for value in result.record().values())


def test_record_counts_problems_and_summarises_gaps():
    groups = Groups.from_ids(["a"] * 3 + ["b"] * 3 + ["c"])
    score_N = np.array([3.0, 1.0, 0.0, 2.0, 2.0, 2.0, 1.0])
    result = compute_weights(Chi2(budget=1), score_N, groups, np.arange(7).astype(np.uint64), np.ones(7), seed=0)
    record = result.record()
    assert (record["problems_within_budget"], record["problems_tied_at_top"]) == (1, 1)
    assert record["gap"] == {"p10": pytest.approx(0.2), "p50": pytest.approx(1.0), "p90": pytest.approx(1.8)}


# Siblings


@given(score_lists, priors, st.sampled_from([0.5, 40.0, 2e6]))
def test_kl_by_tau_is_a_softmax(score, prior, tau):
    prior = normal(prior[: len(score)])
    mass = prior * np.exp((np.array(score) - max(score)) / tau)
    np.testing.assert_allclose(solve(KL(tau=tau), score, prior)[0], mass / mass.sum(), atol=1e-12)  # type: ignore[arg-type]


def test_kl_by_budget_is_a_softmax_at_tau_b_over_the_best():
    q, result = solve(KL(budget=2), [3.0, 1.0, 2.0, 0.0])
    mass = np.exp(np.array([3.0, 2.0]) / 0.75)  # tau_B = (2 + 1) / 4
    np.testing.assert_allclose(q[[0, 2]], mass / mass.sum())
    assert q[[1, 3]].tolist() == [0, 0] and result.tau_G[0] == pytest.approx(0.75)
    q, _ = solve(KL(budget=2, tau=5.0), [3.0, 1.0, 2.0, 0.0])
    np.testing.assert_allclose(q[0] / q[2], np.exp(1 / 5))


def test_top_b_is_the_prior_on_the_best():
    q, _ = solve(TopB(budget=2), [3.0, 1.0, 2.0, 0.0], [1, 5, 3, 5])
    np.testing.assert_allclose(q, [0.25, 0, 0.75, 0])


def test_sample_draws_by_hash_from_the_chi2_solution():
    score, budget = [0.1, 0.4, 0.3, 0.0, 0.25], 3
    chi2_q, _ = solve(Chi2(tau=0.3), score)
    q, _ = solve(Sample(budget=budget, tau=0.3), score)
    order = np.argsort(-np.array(score))
    expected = np.zeros(5)
    for draw in range(budget):
        digest = hashlib.sha256(f"sample\x1f0\x1fp\x1f{draw}".encode()).digest()
        unit = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
        expected[order[np.searchsorted(np.cumsum(chi2_q[order]), unit, side="right")]] += 1 / budget
    np.testing.assert_allclose(q, expected)


@pytest.mark.parametrize("tau", [None, 0.4])
def test_sample_is_unbiased(tau):
    score, budget, problems = [0.1, 0.4, 0.3, 0.0], 2, 20_000
    ids = [str(g) for g in range(problems) for _ in score]
    groups = Groups.from_ids(ids)
    policy = Sample(budget=budget, tau=tau)
    score_N, tie_N = np.tile(score, problems), np.arange(4 * problems).astype(np.uint64)
    result = compute_weights(policy, score_N, groups, tie_N, np.ones(score_N.size), seed=1, problem_ids=ids)
    expected, _ = solve(Chi2(budget=budget) if tau is None else Chi2(tau=tau), score)
    error = np.sqrt(expected * (1 - expected) / (budget * problems))
    assert (np.abs(result.q_N.reshape(problems, 4).mean(0) - expected) <= 4.5 * error).all()
    assert set(np.unique(result.q_N)) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("rows", range(2, 40))
def test_the_largest_possible_draw_hits_the_last_row_whatever_the_rounding(rows, monkeypatch):
    monkeypatch.setattr("lark.selection.policy_weights.unit_hash", lambda *args, salt: np.full(rows, 1 - 2.0**-53))
    q, _ = solve(Sample(budget=rows), -np.arange(float(rows)))  # type: ignore[arg-type]
    assert q[-1] == 1


def test_prior_takes_all_valid_candidates():
    q, _ = solve(Prior(), [0.3, NAN, 0.1], [1, 1, 3])
    np.testing.assert_allclose(q, [0.25, 0, 0.75])


def test_a_score_of_plus_infinity_is_our_error():
    with pytest.raises(AssertionError):
        solve(Chi2(budget=1), [np.inf, 0.0])
