"""Policies: from the scores of each problem's candidates to weights q (sum 1, most of them 0).

The main one maximises <q, e> - (tau/2) chi2(q || p) over the simplex, with scores e, prior p over the valid candidates
and chi2(q || p) = sum_k (q_k - p_k)^2 / p_k. Its solution is the water-filling q_k = p_k max(0, 1 + (e_k - nu)/tau)
(LARK, arXiv 2605.30651; the forms by tau and by radius, general priors and edge cases are worked out here).

Shapes: N rows of the pool, G groups (problems), M valid rows in ranked order (group by group, best first).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import Groups, Ranking, unit_hash

Kind = Literal["chi2", "kl", "top_b", "sample", "prior"]

SETTINGS: dict[str, tuple[str, ...]] = {
    "chi2": ("budget", "tau", "radius"),
    "kl": ("budget", "tau"),
    "top_b": ("budget",),
    "sample": ("budget", "tau"),
    "prior": (),
}
"""The settings of sharpness that each kind takes."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How the scores of one problem's candidates become weights.

    Raises:
        LarkError: a setting is out of range, missing, or not one of its kind's.
    """

    kind: Kind = "chi2"
    """chi2: water-filling, by exactly one of budget, tau and radius. kl: p exp(e / tau), on the `budget` best if given,
    tau as in chi2 by budget if not given. top_b: the prior on the `budget` best. sample: `budget` draws with
    replacement from chi2 at tau or, if not given, by budget. prior: every valid candidate."""
    budget: int | None = None
    """Candidates per problem, at least 1."""
    tau: float | None = None
    """Temperature in units of the score, above 0: large gives the prior, small the best candidate alone."""
    radius: float | None = None
    """Largest chi2(q || p), at least 0: 0 gives the prior."""
    prior: str = "uniform"
    """uniform, per_teacher (the teachers of a problem share its mass equally), or the name of a pool column."""

    def __post_init__(self) -> None:
        if self.kind not in SETTINGS:
            raise LarkError(f"selector.policy.kind={self.kind} is unknown; set one of {', '.join(SETTINGS)}.")
        if not isinstance(self.prior, str) or not self.prior:
            raise LarkError(
                f"selector.policy.prior={self.prior!r} is no name; set uniform, per_teacher or the name of a column."
            )
        given = {name: getattr(self, name) for name in ("budget", "tau", "radius") if getattr(self, name) is not None}
        for name, value in given.items():
            if name not in SETTINGS[self.kind]:
                raise LarkError(
                    f"selector.policy.{name}={value} is not used by selector.policy.kind={self.kind}; "
                    f"set selector.policy.{name}=null."
                )
            _check_range(name, value)
        if self.kind == "chi2" and len(given) > 1:
            values = ", ".join(f"selector.policy.{name}={value}" for name, value in given.items())
            remedy = " ".join(f"selector.policy.{name}=null" for name in list(given)[:-1])
            raise LarkError(f"Only one of budget, tau and radius may set the sharpness, not {values}; set {remedy}.")
        if not given and self.kind in ("chi2", "kl"):
            choices = " or ".join(f"selector.policy.{name}" for name in SETTINGS[self.kind])
            raise LarkError(f"selector.policy.kind={self.kind} has no sharpness, all are null; set {choices}.")
        if self.budget is None and self.kind in ("top_b", "sample"):
            raise LarkError(
                f"selector.policy.budget=null, but selector.policy.kind={self.kind} needs it; "
                "set selector.policy.budget=3, say."
            )


def _check_range(name: str, value: object) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(float(value))
    if name == "budget" and not (isinstance(value, Integral) and number and int(value) >= 1):
        raise LarkError(f"selector.policy.budget={value} is no whole number of at least 1; set 3, say.")
    if name == "tau" and not (number and value > 0):  # type: ignore[operator]
        raise LarkError(f"selector.policy.tau={value} is no finite number above 0; set 0.1, say.")
    if name == "radius" and not (number and value >= 0):  # type: ignore[operator]
        raise LarkError(f"selector.policy.radius={value} is no finite number of at least 0; set 1.0, say.")


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyResult:
    """Weights of all rows and, per group, how they came about."""

    q_N: np.ndarray
    """Weights: sum 1 in every group with a valid candidate, else 0."""
    valid_G: np.ndarray
    """Valid candidates (finite score, positive prior), int64."""
    tau_G: np.ndarray
    """Temperature in force, in units of the score: by budget tau_B = sum_j p_j (e_j - e_(B+1))_+, infinite where the
    weights are the prior, 0 where ties at the top decide; NaN without valid candidates and for top_b and prior."""
    gap_G: np.ndarray
    """Mean score of the B best, weighted by the prior, minus e_(B+1): what the budget form's stability rests on under a
    uniform prior (any other: on tau; docs/theory.md, 5.4 and 5.5). Infinite where nothing is excluded; NaN without a
    budget or without valid candidates."""
    within_budget_G: np.ndarray
    """True where 1 .. B candidates are valid, so that the budget excludes none."""
    tied_G: np.ndarray
    """True where more than B candidates share the best score, so that the tie hash chooses."""
    zero_weight_G: np.ndarray
    """Rows among the B best that have weight 0 and so leave the selection, int64."""

    @property
    def empty(self) -> np.ndarray:
        """True where no candidate is valid: the problem is dropped."""
        return self.valid_G == 0

    def record(self) -> dict[str, object]:
        """What a selection's record keeps, JSON: problems by edge case, rows of weight 0 among the B best, and the
        spread over problems of the finite temperatures and gaps."""
        return {
            "problems_without_valid": int(self.empty.sum()),
            "problems_within_budget": int(self.within_budget_G.sum()),
            "problems_tied_at_top": int(self.tied_G.sum()),
            "zero_weight_in_top_b": int(self.zero_weight_G.sum()),
            "tau_in_force": _deciles(self.tau_G),
            "gap": _deciles(self.gap_G),
        }


def _deciles(x_G: np.ndarray) -> dict[str, float] | None:
    finite = x_G[np.isfinite(x_G)]
    if finite.size == 0:
        return None
    return dict(zip(("p10", "p50", "p90"), np.quantile(finite, [0.1, 0.5, 0.9]).tolist(), strict=True))


def weights(
    policy: Policy,
    score_N: np.ndarray,
    groups: Groups,
    tie_N: np.ndarray,
    prior_N: np.ndarray,
    *,
    seed: int,
    problem_ids: Sequence[str] | np.ndarray | None = None,
) -> PolicyResult:
    """Weights of every row under a policy; the order of the rows does not matter.

    score_N is higher for better; NaN or minus infinity means never. tie_N comes from `tie_hash`. prior_N is any
    non-negative finite weight; it is renormalised over the valid candidates of each group. seed and problem_ids, one
    per row, key the draws of kind=sample and are not used otherwise.
    """
    score_N, prior_N = np.asarray(score_N, np.float64), np.asarray(prior_N, np.float64)
    assert not np.isposinf(score_N).any(), "a score of plus infinity is an error of the rule that made it"
    assert np.isfinite(prior_N).all() and (prior_N >= 0).all()

    ranking = groups.rank(score_N, tie_N, np.isfinite(score_N) & (prior_N > 0))
    score_M, prior_M = score_N[ranking.row_M], _normalised(ranking, prior_N[ranking.row_M])
    valid_G = ranking.size
    empty_G = valid_G == 0
    tau_G, gap_G = np.full(groups.count, np.nan), np.full(groups.count, np.nan)
    within_G, tied_G = np.zeros(groups.count, bool), np.zeros(groups.count, bool)
    top_M = np.ones(ranking.row_M.size, bool)
    excess_M = np.zeros(ranking.row_M.size)
    if policy.budget is not None:
        top_M = ranking.position < policy.budget
        next_G = ranking.at(score_M, policy.budget, fill=np.nan)  # e_(B+1), the best excluded score
        within_G = ~empty_G & (valid_G <= policy.budget)
        tied_G = next_G == ranking.at(score_M, 0, fill=np.nan)
        excluding_M = ~ranking.spread(within_G)
        np.subtract(score_M, ranking.spread(next_G), out=excess_M, where=top_M & excluding_M)
        tau_G = np.where(within_G, np.inf, ranking.sum(prior_M * excess_M))
        tau_G[empty_G] = np.nan
        top_mass_G = ranking.sum(prior_M * top_M)
        np.divide(tau_G, top_mass_G, out=gap_G, where=~empty_G)
    if policy.tau is not None:
        tau_G = np.where(empty_G, np.nan, policy.tau)

    if policy.kind == "prior":
        q_M = prior_M
    elif policy.kind == "top_b":
        q_M = prior_M * top_M
        tau_G = np.full(groups.count, np.nan)
    elif policy.kind == "kl":
        q_M = _kl(ranking, score_M, prior_M, tau_G) * top_M
    elif policy.radius is not None:
        q_M, tau_G = _chi2_by_radius(ranking, score_M, prior_M, policy.radius)
    elif policy.tau is not None:
        q_M = _chi2_by_tau(ranking, score_M, prior_M, policy.tau)
    else:
        # The solution at tau_B, p (e - e_(B+1))_+ / tau_B; the prior on the B best where all of them tie with the next
        # (tau_B = 0) or none is excluded.
        q_M = prior_M * np.where(ranking.spread(within_G | tied_G), top_M, excess_M)
    q_M = _normalised(ranking, q_M)
    if policy.kind == "sample":
        assert policy.budget is not None and problem_ids is not None and len(problem_ids) == score_N.size
        q_M = _draw(ranking, q_M, policy.budget, problem_ids, seed)

    zero_G = ranking.sum((q_M == 0) & top_M).astype(np.int64) if policy.budget is not None else np.zeros_like(valid_G)
    return PolicyResult(
        q_N=ranking.scatter(q_M, score_N.size),
        valid_G=valid_G,
        tau_G=tau_G,
        gap_G=gap_G,
        within_budget_G=within_G,
        tied_G=tied_G,
        zero_weight_G=zero_G,
    )


def _normalised(ranking: Ranking, x_M: np.ndarray) -> np.ndarray:
    return x_M / ranking.spread(ranking.sum(x_M))


def _breakpoints(
    ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prefix sums at each row k of its group: mass P_k, T_k = sum_(j<=k) p_j (e_j - e_k), and the same with squares.

    T_k is the tau at which row k enters. Both sums are built from gaps between neighbours, so that all terms are
    non-negative and nothing cancels, however large or close the scores are.
    """
    gap_M = ranking.previous(score_M, first=score_M) - score_M
    mass_M = ranking.prefix_sum(prior_M)
    tau_M = ranking.prefix_sum(gap_M * ranking.previous(mass_M, first=0.0))
    # (e_j - e_k)^2 = (e_j - e_(k-1))^2 + gap (2 (e_j - e_(k-1)) + gap), summed over j with weights p_j.
    square_M = ranking.prefix_sum(gap_M * (ranking.previous(tau_M, first=0.0) + tau_M))
    return mass_M, tau_M, square_M


def _chi2_by_tau(ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray, tau: float) -> np.ndarray:
    """Water-filling at a given tau: rows 1 .. m with T_k < tau are active, and the level follows from sum q = 1."""
    mass_M, tau_M, _ = _breakpoints(ranking, score_M, prior_M)
    active_G = ranking.sum(tau_M < tau).astype(np.int64)
    last_score_G = ranking.at(score_M, active_G - 1, fill=np.nan)
    last_tau_G = ranking.at(tau_M, active_G - 1, fill=np.nan)
    last_mass_G = ranking.at(mass_M, active_G - 1, fill=np.nan)
    last_ratio_G = (1 - last_tau_G / tau) / last_mass_G  # q/p of the last active row
    active_M = ranking.position < ranking.spread(active_G)
    gain_M = np.where(active_M, score_M - ranking.spread(last_score_G), 0.0)
    ratio_M = gain_M / tau + ranking.spread(last_ratio_G)
    return prior_M * np.where(active_M, np.maximum(ratio_M, 0.0), 0.0)


def _chi2_by_radius(
    ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """The largest <q, e> with chi2(q || p) <= radius: q [M] before normalisation and tau [G].

    With the active rows' mass P, prior mean mu and prior variance v, q_k = (p_k / P) (1 + s (e_k - mu)) and
    1 + chi2 = (1 + s^2 v) / P, which gives the slope s; tau = P / s.
    """
    _, tau_M, square_M = _breakpoints(ranking, score_M, prior_M)
    best_M = ranking.spread(ranking.at(score_M, 0, fill=np.nan))
    tied_M = score_M == best_M
    # chi2 of the solution that row k is about to enter; it falls along the ranking.
    chi2_M = np.broadcast_to(1 / ranking.spread(_positive(ranking.sum(prior_M * tied_M))) - 1, score_M.shape).copy()
    np.divide(square_M, tau_M**2, out=chi2_M, where=~tied_M)
    chi2_M[~tied_M] -= 1
    active_G = ranking.sum(chi2_M > radius)
    active_M = ranking.position < ranking.spread(active_G)

    active_prior_M = prior_M * active_M
    mass_G = _positive(ranking.sum(active_prior_M))
    outside_G = ranking.sum(prior_M * ~active_M)
    offset_M = score_M - best_M
    centred_M = offset_M - ranking.spread(ranking.sum(active_prior_M * offset_M) / mass_G)
    variance_G = ranking.sum(active_prior_M * centred_M**2) / mass_G
    slope_G = np.sqrt(np.maximum(mass_G * radius - outside_G, 0.0) / _positive(variance_G))
    q_M = active_prior_M * np.maximum(1 + ranking.spread(slope_G) * centred_M, 0.0)

    # No row active: even the prior on the best scores alone lies within the radius, so it is the solution (tau -> 0).
    sharp_G = (ranking.size > 0) & (active_G == 0)
    q_M = np.where(ranking.spread(sharp_G), prior_M * tied_M, q_M)
    tau_G = np.full(ranking.count, np.inf)
    np.divide(mass_G, slope_G, out=tau_G, where=slope_G > 0)
    tau_G[sharp_G] = 0.0
    tau_G[ranking.size == 0] = np.nan
    return q_M, tau_G


def _positive(x_G: np.ndarray) -> np.ndarray:
    """x with 1 in place of 0, as a divisor for groups whose quotient is not used."""
    return np.where(x_G > 0, x_G, 1.0)


def _kl(ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray, tau_G: np.ndarray) -> np.ndarray:
    """p exp((e - max e) / tau), [M] before normalisation; tau = 0 comes only from ties at the top and infinite tau
    only where nothing is excluded: in both the rows kept have the prior's ratio."""
    offset_M = score_M - ranking.spread(ranking.at(score_M, 0, fill=np.nan))
    tau_M = ranking.spread(tau_G)
    logit_M = np.zeros_like(score_M)
    np.divide(offset_M, tau_M, out=logit_M, where=tau_M > 0)
    return prior_M * np.exp(logit_M)


def _draw(
    ranking: Ranking, q_M: np.ndarray, budget: int, problem_ids: Sequence[str] | np.ndarray, seed: int
) -> np.ndarray:
    """`budget` draws from q in each group with replacement, as weights count / budget [M]; draw d of a problem depends
    on nothing but (seed, problem, d) and q. D draws in all."""
    drawn_M = np.flatnonzero(q_M > 0)
    group_M = ranking.index_N[drawn_M]
    upper_M = ranking.prefix_sum(q_M)[drawn_M]
    upper_M[np.flatnonzero(np.diff(group_M, append=-1))] = 1.0  # no draw falls beyond a group's last row
    filled_G = np.flatnonzero(ranking.size)
    group_D, draw_D = np.repeat(filled_G, budget), np.tile(np.arange(budget), filled_G.size)
    row_D = ranking.row_M[ranking.start[group_D]]
    unit_D = unit_hash(seed, (problem_ids[row] for row in row_D), draw_D, salt="sample")
    # Complex numbers sort by real part, then imaginary part: one search for all groups, exact in both.
    hit_D = drawn_M[np.searchsorted(group_M + 1j * upper_M, group_D + 1j * unit_D, side="right")]
    return np.bincount(hit_D, minlength=q_M.size) / budget


def prior_weights(
    kind: str, column_N: Sequence[object] | np.ndarray | None, groups: Groups, valid_N: np.ndarray
) -> np.ndarray:
    """Prior over the valid candidates of each group, float64 [N], 0 for other rows.

    kind is a policy's prior: `uniform` (column_N is not used); `per_teacher`, column_N holding the teachers; or a pool
    column's name, column_N holding its numbers. The sum is 1 in every group where some valid row has a positive prior,
    else 0.

    Raises:
        LarkError: a valid row has no teacher (per_teacher), or no finite non-negative number in the column.
    """
    valid_N = np.asarray(valid_N, bool)
    assert valid_N.shape == groups.index_N.shape
    if kind == "uniform":
        prior_N = valid_N.astype(np.float64)
    elif kind == "per_teacher":
        assert column_N is not None
        prior_N = _per_teacher(column_N, groups, valid_N)
    else:
        assert column_N is not None
        prior_N = _column_prior(kind, column_N, valid_N)
    return prior_N / groups.spread(_positive(groups.sum(prior_N)))


def _per_teacher(teachers_N: Sequence[object] | np.ndarray, groups: Groups, valid_N: np.ndarray) -> np.ndarray:
    """1 / (valid rows of the same teacher in the same group), [N]."""
    missing = sum(teacher is None and valid for teacher, valid in zip(teachers_N, valid_N.tolist(), strict=True))
    if missing:
        raise LarkError(
            f"selector.policy.prior=per_teacher needs a teacher in every candidate, {missing} of {valid_N.sum()} have "
            "none; fill the pool's teacher field or set selector.policy.prior=uniform."
        )
    teachers = Groups.from_ids(teachers_N)
    _, pair_N = np.unique(groups.index_N * teachers.count + teachers.index_N, return_inverse=True)
    pairs = Groups(pair_N, pair_N.size)
    return valid_N / pairs.spread(_positive(pairs.sum(valid_N)))


def _column_prior(name: str, column_N: Sequence[object] | np.ndarray, valid_N: np.ndarray) -> np.ndarray:
    """The column's numbers at valid rows, else 0, [N]."""
    remedy = "correct the pool's column or set selector.policy.prior=uniform."
    try:
        number_N = np.array(column_N, np.float64)
    except (TypeError, ValueError) as error:
        raise LarkError(f"selector.policy.prior={name} names a column that holds no numbers; {remedy}") from error
    wrong_N = valid_N & ~(np.isfinite(number_N) & (number_N >= 0))
    if wrong_N.any():
        raise LarkError(
            f"selector.policy.prior={name} needs a finite number of at least 0 in every candidate, {wrong_N.sum()} of "
            f"{valid_N.sum()} have none, the first has {number_N[wrong_N][0]}; {remedy}"
        )
    return np.where(valid_N, number_N, 0.0)
