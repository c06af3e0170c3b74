"""Policies at scores as large and as small as floats are, against exact rational arithmetic."""

import math
from fractions import Fraction
from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lark.common.errors import LarkError
from lark.common.groups import Groups, tie_hash
from lark.selection.candidates import Candidates
from lark.selection.policies import KL, Chi2, Policy
from lark.selection.policy_weights import compute_weights
from lark.selection.rule import Rule

ZERO = Fraction(0)


def fill_to_tau(score: list[Fraction], prior: list[Fraction], tau: Fraction) -> list[Fraction]:
    """p max(0, 1 + (e - nu) / tau), nu from the m best, for the largest m that leaves none of them below 0."""
    order = sorted(range(len(score)), key=lambda k: -score[k])
    for m in range(len(score), 0, -1):
        active = order[:m]
        mass = sum((prior[k] for k in active), ZERO)
        nu = (sum(prior[k] * score[k] for k in active) + tau * (mass - 1)) / mass
        if score[active[-1]] - nu + tau >= 0:
            break
    return [prior[k] * max(ZERO, 1 + (score[k] - nu) / tau) if k in active else ZERO for k in range(len(score))]


def fill_to_radius(score: list[Fraction], prior: list[Fraction], radius: Fraction) -> list[Fraction]:
    """The solution of chi2(q || p) = radius among those with the m best active, for the m at which it is feasible."""
    best = [k for k in range(len(score)) if score[k] == max(score)]
    mass = sum((prior[k] for k in best), ZERO)
    if radius >= 1 / mass - 1:
        return [prior[k] / mass if k in best else ZERO for k in range(len(score))]
    order = sorted(range(len(score)), key=lambda k: -score[k])
    for m in range(len(score), len(best) - 1, -1):
        active = order[:m]
        mass = sum((prior[k] for k in active), ZERO)
        mean = sum(prior[k] * score[k] for k in active) / mass
        variance = sum(prior[k] * (score[k] - mean) ** 2 for k in active) / mass
        room = mass * (1 + radius) - 1
        if variance == 0 or room < 0:
            continue
        widest = max(abs(score[k] - mean) for k in active)
        slope = Fraction(isqrt(int(room / variance * widest**2 * 2**400)), 2**200) / widest
        if 1 + slope * (score[active[-1]] - mean) >= 0:
            return [
                prior[k] / mass * (1 + slope * (score[k] - mean)) if k in active else ZERO for k in range(len(score))
            ]
    return prior


any_scale = st.sampled_from([1e300, 1e160, 1.0, 1e-200, 1e-310, 5e-324])
steps = st.lists(st.integers(-6, 6), min_size=1, max_size=6)
score_lists = st.one_of(
    st.builds(lambda steps, scale: [scale * one for one in steps], steps, any_scale),
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=6),
    st.lists(st.sampled_from([0.0, 5e-324, 1e-310, 1e-200, 1e-155, 2e-200, -1.0, -1e300]), min_size=1, max_size=6),
    st.lists(st.integers(-5, 5).map(lambda step: 1e150 + 1e135 * step), min_size=1, max_size=6),
)
priors = st.lists(st.floats(0.05, 5), min_size=6, max_size=6)


def solve(policy: Policy, score: list[float], prior: list[float]) -> np.ndarray:
    rows = len(score)
    groups, tie_N = Groups(np.zeros(rows, np.int64), 1), tie_hash(0, ["p"] * rows, range(rows))
    return compute_weights(policy, np.array(score), groups, tie_N, np.array(prior), seed=0).q_N


@given(score_lists, priors, st.sampled_from([5e-324, 1e-310, 0.3, 1.0, 1e160]), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_by_tau_and_by_budget(score, prior, tau, budget):
    prior = prior[: len(score)]
    e, p = [Fraction(x) for x in score], [Fraction(x) / sum(map(Fraction, prior)) for x in prior]
    wanted = fill_to_tau(e, p, Fraction(tau))
    np.testing.assert_allclose(solve(Chi2(tau=tau), score, prior), np.array(wanted, float), rtol=0, atol=1e-13)
    ordered = sorted(e, reverse=True)
    if len(e) > budget and ordered[0] > ordered[budget]:
        over = [pk * max(ZERO, ek - ordered[budget]) for pk, ek in zip(p, e, strict=True)]
        q = [x / sum(over) for x in over]
        np.testing.assert_allclose(solve(Chi2(budget=budget), score, prior), np.array(q, float), rtol=0, atol=1e-13)
        if ordered[budget - 1] > ordered[budget]:  # no tie decides which are the best
            units = [float(max(Fraction(-1000), (ek - ordered[0]) / sum(over))) for ek in e]
            kept = [float(pk) * math.exp(x) * (ek > ordered[budget]) for pk, ek, x in zip(p, e, units, strict=True)]
            q_kl = solve(KL(budget=budget), score, prior)
            np.testing.assert_allclose(q_kl, np.array(kept) / sum(kept), rtol=0, atol=1e-12)


@given(score_lists, priors, st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0, 2.5, 6.0]))
@settings(max_examples=200, deadline=None)
def test_by_radius(score, prior, radius):
    prior = prior[: len(score)]
    e, p = [Fraction(x) for x in score], [Fraction(x) / sum(map(Fraction, prior)) for x in prior]
    wanted = fill_to_radius(e, p, Fraction(radius))
    np.testing.assert_allclose(solve(Chi2(radius=radius), score, prior), np.array(wanted, float), rtol=0, atol=1e-12)


def test_scores_whose_differences_overflow_are_refused():
    candidates = Candidates(
        problem_id=np.array(["p"]), candidate_id=np.array(["0"]), row_N=np.zeros(1, int), statistics={}
    )
    for score in (1e308, -1e308, math.inf):
        rule = Rule(name="huge", score=lambda _, score=score: np.array([score]), policy=Chi2(budget=1))
        with pytest.raises(LarkError, match="huge"):
            rule.compute_scores(candidates)
