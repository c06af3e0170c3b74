"""Policies: from the scores of each problem's candidates to weights q (sum 1, most of them 0).

The main one, `Chi2`, maximises <q, e> - (tau/2) chi2(q || p) over the simplex, with scores e, prior p over the valid
candidates and chi2(q || p) = sum_k (q_k - p_k)^2 / p_k. Its solution is the water-filling
q_k = p_k max(0, 1 + (e_k - nu)/tau) (LARK, arXiv 2605.30651; the forms by tau and by radius, general priors and edge
cases are worked out here).

Shapes: G groups (problems), M valid rows in ranked order (group by group, best first).
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import Ranking
from lark.selection.own_functions import import_function
from lark.selection.water_filling import cut_at_budget, fill, fill_to_radius

RANGES: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "budget": ("a whole number of at least 1", lambda x: isinstance(x, Integral) and int(x) >= 1, "3"),
    "tau": ("a finite number above 0", lambda x: float(x) > 0, "0.1"),
    "radius": ("a finite number of at least 0", lambda x: float(x) >= 0, "1.0"),
}
"""The settings of sharpness: what each takes, as words and as a check of a finite number, and an example."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The base of all policies: the settings of sharpness, checked, and what a policy may say about itself.

    A policy of your own is a subclass with `weights`, in a module that `selector.policy.kind=my_module:MyPolicy` names.

    Raises:
        LarkError: a setting is out of range, missing, or not one that the policy takes.
    """

    budget: int | None = None
    """Candidates per problem, at least 1."""
    tau: float | None = None
    """Temperature in units of the score, above 0: large gives the prior, small the best candidate alone."""
    radius: float | None = None
    """Largest chi2(q || p), at least 0: 0 gives the prior."""
    prior: str = "uniform"
    """uniform, per_teacher (the teachers of a problem share its mass equally), or the name of a pool column."""

    TAKES: ClassVar[tuple[str, ...]] = ("budget", "tau", "radius")
    """The settings of sharpness that the policy takes; the others must be null."""
    NEEDS: ClassVar[tuple[str, ...]] = ()
    """Those of them that it cannot do without."""
    TAKES_ALL: ClassVar[bool] = False
    """Whether every valid candidate is taken, so that as a baseline it is not cut to the selector's counts."""

    def __post_init__(self) -> None:
        if not isinstance(self.prior, str) or not self.prior:
            raise LarkError(
                f"selector.policy.prior={self.prior!r} is not a name; set uniform, per_teacher or the name of a column."
            )
        for name, value in self.given.items():
            if name not in self.TAKES:
                raise LarkError(
                    f"selector.policy.{name}={value} is not used by selector.policy.kind={self.kind}; "
                    f"set selector.policy.{name}=null."
                )
            words, is_in_range, example = RANGES[name]
            is_number = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(float(value))
            if not (is_number and is_in_range(value)):
                raise LarkError(f"selector.policy.{name}={value} is not {words}; set {example}, say.")
        for name in self.NEEDS:
            if name not in self.given:
                raise LarkError(
                    f"selector.policy.{name}=null, but selector.policy.kind={self.kind} needs it; set "
                    f"selector.policy.{name}={RANGES[name][2]}, say."
                )

    @property
    def kind(self) -> str:
        """The policy's name in settings and records."""
        return next((kind for kind, policy in KINDS.items() if policy is type(self)), type(self).__name__)

    @property
    def given(self) -> dict[str, Any]:
        """The settings of sharpness that are not null."""
        return {name: getattr(self, name) for name in RANGES if getattr(self, name) is not None}

    @property
    def draws(self) -> int | None:
        """How often to draw a candidate of each problem, with replacement, from the weights; None: do not draw."""
        return None

    def weights(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        """Return the weight of every ranked candidate up to a factor a problem, float64 [M], at least 0.

        prior_M sums to 1 in each group. `ranking` computes inside groups: `ranking.sum`, `.spread`, `.position`, `.at`.
        """
        raise NotImplementedError

    def temperatures(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        """Return the temperature in force of each group for the record, float64 [G]; NaN where there is none."""
        if self.tau is not None:
            return np.where(ranking.size == 0, np.nan, self.tau)
        return cut_at_budget(ranking, score_M, prior_M, self.budget).tau_G

    def _check_sharpness(self) -> None:
        if not self.given:
            choices = " or ".join(f"selector.policy.{name}" for name in self.TAKES)
            raise LarkError(f"selector.policy.kind={self.kind} has no sharpness, all are null; set {choices}.")


@dataclass(frozen=True, kw_only=True)
class Chi2(Policy):
    """Water-filling, by exactly one of budget, tau and radius."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.given) > 1:
            values = ", ".join(f"selector.policy.{name}={value}" for name, value in self.given.items())
            remedy = " ".join(f"selector.policy.{name}=null" for name in list(self.given)[:-1])
            raise LarkError(f"Only one of budget, tau and radius may set the sharpness, not {values}; set {remedy}.")
        self._check_sharpness()

    def weights(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        if self.radius is not None:
            return fill_to_radius(ranking, score_M, prior_M, self.radius)[0]
        return fill(ranking, score_M, prior_M, tau=self.tau, budget=self.budget)

    def temperatures(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        if self.radius is not None:
            return fill_to_radius(ranking, score_M, prior_M, self.radius)[1]
        return super().temperatures(ranking, score_M, prior_M)


@dataclass(frozen=True, kw_only=True)
class KL(Policy):
    """p exp(e / tau), on the `budget` best if given; without tau, at the temperature of `Chi2` by budget."""

    TAKES = ("budget", "tau")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sharpness()

    def weights(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        # tau = 0 comes only from ties at the top and infinite tau only where nothing is excluded: in both the rows kept
        # have the prior's ratio.
        cut = cut_at_budget(ranking, score_M, prior_M, self.budget)
        offset_M = score_M - ranking.spread(ranking.at(score_M, 0, fill=np.nan))
        logit_M = np.zeros_like(score_M)
        with np.errstate(over="ignore"):  # minus infinity: no weight
            if self.tau is not None:
                logit_M = offset_M / self.tau
            else:
                tau_M = ranking.spread(np.where(cut.within_G, np.inf, ranking.sum(prior_M * cut.excess_M)))
                np.divide(np.ldexp(offset_M, -ranking.spread(cut.unit_G)), tau_M, out=logit_M, where=tau_M > 0)
        return prior_M * np.exp(logit_M) * cut.top_M


@dataclass(frozen=True, kw_only=True)
class TopB(Policy):
    """The prior on the `budget` best."""

    TAKES = NEEDS = ("budget",)

    def weights(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        return prior_M * cut_at_budget(ranking, score_M, prior_M, self.budget).top_M

    def temperatures(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        return np.full(ranking.count, np.nan)


@dataclass(frozen=True, kw_only=True)
class Sample(Policy):
    """`budget` draws with replacement from `Chi2` at tau or, if not given, by budget."""

    TAKES = ("budget", "tau")
    NEEDS = ("budget",)

    @property
    def draws(self) -> int | None:
        return self.budget

    def weights(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        return fill(ranking, score_M, prior_M, tau=self.tau, budget=self.budget)


@dataclass(frozen=True, kw_only=True)
class Prior(Policy):
    """The prior itself: every valid candidate."""

    TAKES = ()
    TAKES_ALL = True

    def weights(self, ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
        return prior_M


KINDS: dict[str, type[Policy]] = {"chi2": Chi2, "kl": KL, "top_b": TopB, "sample": Sample, "prior": Prior}


def make_policy(
    *,
    kind: str = "chi2",
    budget: int | None = None,
    tau: float | None = None,
    radius: float | None = None,
    prior: str = "uniform",
    **own: Any,
) -> Policy:
    """Build the policy that `selector.policy` describes.

    kind: one of KINDS, or `module:Class` of a subclass of Policy, which may take settings of its `own`.
    Raises LarkError for an unknown kind and for settings that the policy does not take.
    """
    policy = import_function(kind, "selector.policy.kind") if ":" in kind else KINDS.get(kind)
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        known = ", ".join(KINDS)
        raise LarkError(f"selector.policy.kind={kind} is unknown; set one of {known}, or module:Class of a Policy.")
    return policy(budget=budget, tau=tau, radius=radius, prior=prior, **own)
