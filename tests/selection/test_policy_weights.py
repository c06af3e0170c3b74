"""Priors, settings of policies, and policies of the user's own."""

from dataclasses import dataclass

import numpy as np
import pytest

from lark.common.groups import Groups
from lark.selection.policies import Policy, make_policy
from lark.selection.policy_weights import compute_prior, compute_weights

NAN = float("nan")


def test_per_teacher_gives_each_teacher_of_a_problem_the_same_mass():
    groups = Groups.from_ids(["a", "a", "a", "a", "b", "b", "c"])
    teachers = np.array(["x", "x", "y", "z", "x", "x", None], object)
    valid_N = np.array([True, True, True, False, True, True, False])
    prior_N = compute_prior("per_teacher", {"teacher": teachers}.__getitem__, groups, valid_N)
    np.testing.assert_allclose(prior_N, [0.25, 0.25, 0.5, 0, 0.5, 0.5, 0])


def test_uniform_and_column_priors_are_normalised_over_valid_rows():
    groups = Groups.from_ids(["a", "a", "a", "b"])
    valid_N = np.array([True, False, True, True])
    np.testing.assert_allclose(compute_prior("uniform", {}.__getitem__, groups, valid_N), [0.5, 0, 0.5, 1])
    column = [1, None, 3, 0]  # the row without a number is not valid, and b has no mass
    np.testing.assert_allclose(
        compute_prior("judge", {"judge": column}.__getitem__, groups, valid_N), [0.25, 0, 0.75, 0]
    )


@pytest.mark.parametrize(
    ("kind", "column", "message"),
    [
        ("per_teacher", ["x", None], "prior=per_teacher needs a teacher .* 1 of 2 have none"),
        ("judge", [1.0, -2.0], "prior=judge needs .* 1 of 2 have none, the first has -2.0"),
        ("judge", [NAN, np.inf], "prior=judge needs .* 2 of 2 have none"),
        ("judge", [1.0, None], "prior=judge needs .* 1 of 2 have none"),
        ("judge", ["good", "bad"], "prior=judge names a column that holds no numbers"),
    ],
)
def test_a_prior_that_cannot_be_used_is_an_error(kind, column, message):
    with pytest.raises(ValueError, match=rf"selector\.policy\.{message}.*set selector\.policy\.prior=uniform"):
        compute_prior(kind, lambda name: column, Groups.from_ids(["a", "a"]), np.array([True, True]))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "kind=chi2 has no sharpness.*set selector.policy.budget or selector.policy.tau or selector.policy.radius"),
        ({"budget": 3, "tau": 0.5}, "budget=3, selector.policy.tau=0.5; set selector.policy.budget=null"),
        ({"tau": 1, "radius": 2}, "tau=1, selector.policy.radius=2; set selector.policy.tau=null"),
        ({"budget": 1, "tau": 1, "radius": 2}, "set selector.policy.budget=null selector.policy.tau=null"),
        ({"budget": 0}, "budget=0 is not a whole number"),
        ({"budget": 2.5}, "budget=2.5 is not a whole number"),
        ({"budget": True}, "budget=True is not a whole number"),
        ({"budget": "three"}, "budget=three is not a whole number"),
        ({"tau": 0}, "tau=0 is not a finite number above 0"),
        ({"tau": NAN}, "tau=nan is not a finite number above 0"),
        ({"radius": -1}, "radius=-1 is not a finite number"),
        ({"kind": "kl"}, "kind=kl has no sharpness.*set selector.policy.budget or selector.policy.tau"),
        (
            {"kind": "kl", "budget": 2, "radius": 1},
            "radius=1 is not used by .*kind=kl; set selector.policy.radius=null",
        ),
        ({"kind": "top_b"}, "budget=null, but selector.policy.kind=top_b needs it"),
        ({"kind": "top_b", "budget": 2, "tau": 1}, "tau=1 is not used by .*kind=top_b"),
        ({"kind": "sample", "tau": 1}, "budget=null, but selector.policy.kind=sample needs it"),
        ({"kind": "prior", "budget": 2}, "budget=2 is not used by .*kind=prior; set selector.policy.budget=null"),
        ({"kind": "softmax", "tau": 1}, "kind=softmax is unknown; set one of chi2, kl"),
        ({"budget": 1, "prior": ""}, "prior='' is not a name"),
    ],
)
def test_settings_that_cannot_be_used_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**settings)


# Policies of the user's own


@dataclass(frozen=True, kw_only=True)
class Harmonic(Policy):
    """1, 1/2, 1/3, ... on the `budget` best."""

    TAKES = NEEDS = ("budget",)
    power: float = 1.0

    def weights(self, ranking, score_M, prior_M):
        assert self.budget is not None
        return np.where(ranking.position < self.budget, (1.0 + ranking.position) ** -self.power, 0.0)


def apply(policy, score=(3.0, 1.0, 2.0, 5.0)):
    groups, tie_N = Groups.from_ids(["a", "a", "a", "b"]), np.arange(4).astype(np.uint64)
    return compute_weights(policy, np.array(score), groups, tie_N, np.ones(4), seed=0)


def test_a_policy_of_the_users_own_is_a_class_with_weights():
    policy = make_policy(kind=f"{__name__}:Harmonic", budget=2, power=2.0)
    assert (policy.kind, policy.TAKES_ALL) == ("Harmonic", False)
    result = apply(policy)
    np.testing.assert_allclose(result.q_N, [0.8, 0, 0.2, 1])
    assert result.within_budget_G.tolist() == [False, True] and result.tau_G.shape == (2,)
    with pytest.raises(ValueError, match=r"selector\.policy\.tau=1"):
        make_policy(kind=f"{__name__}:Harmonic", budget=2, tau=1)


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf, 0.0])
def test_weights_that_are_none_are_one_sentence(weight):
    class Wrong(Policy):
        def weights(self, ranking, score_M, prior_M):
            return np.full(len(score_M), weight)

    with pytest.raises(ValueError, match=r"selector\.policy\.kind=Wrong"):
        apply(Wrong())
