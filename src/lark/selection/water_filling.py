"""Water-filling by budget, tau or radius, exact for ragged groups and without a loop over them.

q_k = p_k max(0, 1 + (e_k - nu)/tau) with scores e and prior p maximises <q, e> - (tau/2) chi2(q || p); see
lark.selection.policies.

Shapes: G groups (problems), M valid rows in ranked order (group by group, best first).
"""

import math
from dataclasses import dataclass

import numpy as np

from lark.common.groups import Ranking


@dataclass(frozen=True, kw_only=True, eq=False)
class BudgetCut:
    """Where a budget of B candidates cuts each problem's ranking; without a budget nothing is cut."""

    top_M: np.ndarray
    """True for the B best."""
    excess_M: np.ndarray
    """Score above that of the best excluded candidate, e_(B+1), in units of 2^unit_G; 0 outside the top and where none
    is excluded."""
    unit_G: np.ndarray
    """A power of two of the size of the best one's excess: sums of what is as small as it gets are no longer 0."""
    within_G: np.ndarray
    """True where 1 .. B candidates are valid, so that none is excluded."""
    tied_G: np.ndarray
    """True where more than B candidates share the best score, so that the tie hash chooses."""
    tau_G: np.ndarray
    """tau_B = sum_j p_j (e_j - e_(B+1))_+: infinite where none is excluded, 0 where ties at the top decide."""
    gap_G: np.ndarray
    """tau_B over the prior's mass on the B best: their mean score minus e_(B+1)."""


def cut_at_budget(ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray, budget: int | None) -> BudgetCut:
    """Find the `budget` best candidates of each group and how far they are above the next one."""
    if budget is None:
        rows, nothing_G = len(score_M), np.full(ranking.count, np.nan)
        none_G = np.zeros(ranking.count, bool)
        return BudgetCut(
            top_M=np.ones(rows, bool),
            excess_M=np.zeros(rows),
            unit_G=np.zeros(ranking.count, np.int32),
            within_G=none_G,
            tied_G=none_G,
            tau_G=nothing_G,
            gap_G=nothing_G,
        )
    empty_G = ranking.size == 0
    top_M = ranking.position < budget
    best_G, next_G = ranking.at(score_M, 0, fill=np.nan), ranking.at(score_M, budget, fill=np.nan)
    within_G = ~empty_G & (ranking.size <= budget)
    unit_G = _find_unit(best_G - next_G)
    excess_M = np.zeros(len(score_M))
    np.subtract(score_M, ranking.spread(next_G), out=excess_M, where=top_M & ~ranking.spread(within_G))
    excess_M = np.ldexp(excess_M, -ranking.spread(unit_G))
    tau_G = np.where(within_G, np.inf, ranking.sum(prior_M * excess_M))
    tau_G[empty_G] = np.nan
    gap_G = np.full(ranking.count, np.nan)
    np.divide(tau_G, ranking.sum(prior_M * top_M), out=gap_G, where=~empty_G)
    return BudgetCut(
        top_M=top_M,
        excess_M=excess_M,
        unit_G=unit_G,
        within_G=within_G,
        tied_G=next_G == best_G,
        tau_G=np.ldexp(tau_G, unit_G),
        gap_G=np.ldexp(gap_G, unit_G),
    )


def _find_unit(x_G: np.ndarray) -> np.ndarray:
    """Find k with 2^k of the size of x, so that x / 2^k is exact and its square neither over- nor underflows; 0 for 0
    and NaN.
    """
    return np.frexp(np.where(np.isfinite(x_G), x_G, 0.0))[1]


def fill(
    ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray, *, tau: float | None, budget: int | None
) -> np.ndarray:
    """Fill to a given tau or, without one, to tau_B: p (e - e_(B+1))_+ / tau_B, and the prior on the B best where all
    of them tie with the next (tau_B = 0) or none is excluded; q [M] before normalisation."""
    if tau is not None:
        return _fill_to_tau(ranking, score_M, prior_M, tau)
    cut = cut_at_budget(ranking, score_M, prior_M, budget)
    return prior_M * np.where(ranking.spread(cut.within_G | cut.tied_G), cut.top_M, cut.excess_M)


def _fill_to_tau(ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray, tau: float) -> np.ndarray:
    """Fill to a given tau: rows 1 .. m with T_k < tau are active, and the level follows from sum q = 1.

    T_k = sum_(j<=k) p_j (e_j - e_k) is the tau at which row k enters. It is built from gaps between neighbours, so that
    all terms are non-negative and nothing cancels, and in units of tau: what overflows is never active.
    """
    tau, unit = math.frexp(tau)
    with np.errstate(over="ignore"):
        gap_M = np.ldexp(ranking.previous(score_M, first=score_M) - score_M, -unit)
        mass_M = ranking.prefix_sum(prior_M)
        tau_M = ranking.prefix_sum(gap_M * ranking.previous(mass_M, first=0.0))
        active_G = ranking.sum(tau_M < tau).astype(np.int64)
        last_score_G = ranking.at(score_M, active_G - 1, fill=np.nan)
        last_tau_G = ranking.at(tau_M, active_G - 1, fill=np.nan)
        last_mass_G = ranking.at(mass_M, active_G - 1, fill=np.nan)
        last_ratio_G = (1 - last_tau_G / tau) / last_mass_G  # q/p of the last active row
        active_M = ranking.position < ranking.spread(active_G)
        gain_M = np.ldexp(np.where(active_M, score_M - ranking.spread(last_score_G), 0.0), -unit)
    ratio_M = gain_M / tau + ranking.spread(last_ratio_G)
    return prior_M * np.where(active_M, np.maximum(ratio_M, 0.0), 0.0)


def fill_to_radius(
    ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Find the largest <q, e> with chi2(q || p) <= radius: q [M] before normalisation and tau [G].

    With the active rows' mass P, prior mean mu and prior variance v, q_k = (p_k / P) (1 + s (e_k - mu)) and
    1 + chi2 = (1 + s^2 v) / P, which gives the slope s; tau = P / s. All in units of the active rows' spread.
    """
    best_M = ranking.spread(ranking.at(score_M, 0, fill=np.nan))
    tied_M = score_M == best_M
    active_G = ranking.sum(_compute_entry_chi2(ranking, score_M, prior_M) > radius).astype(np.int64)
    active_M = ranking.position < ranking.spread(active_G)

    active_prior_M = prior_M * active_M
    mass_G = replace_zeros(ranking.sum(active_prior_M))
    outside_G = ranking.sum(prior_M * ~active_M)
    unit_G = _find_unit(ranking.at(score_M, 0, fill=np.nan) - ranking.at(score_M, active_G - 1, fill=np.nan))
    offset_M = np.ldexp(np.where(active_M, score_M - best_M, 0.0), -ranking.spread(unit_G))
    centred_M = offset_M - ranking.spread(ranking.sum(active_prior_M * offset_M) / mass_G)
    variance_G = ranking.sum(active_prior_M * centred_M**2) / mass_G
    slope_G = np.sqrt(np.maximum(mass_G * radius - outside_G, 0.0) / replace_zeros(variance_G))
    q_M = active_prior_M * np.maximum(1 + ranking.spread(slope_G) * centred_M, 0.0)

    # No row active: even the prior on the best scores alone lies within the radius, so it is the solution (tau -> 0).
    sharp_G = (ranking.size > 0) & (active_G == 0)
    q_M = np.where(ranking.spread(sharp_G), prior_M * tied_M, q_M)
    tau_G = np.full(ranking.count, np.inf)
    np.divide(mass_G, slope_G, out=tau_G, where=slope_G > 0)
    tau_G = np.ldexp(tau_G, unit_G)
    tau_G[sharp_G] = 0.0
    tau_G[ranking.size == 0] = np.nan
    return q_M, tau_G


def _compute_entry_chi2(ranking: Ranking, score_M: np.ndarray, prior_M: np.ndarray) -> np.ndarray:
    """Compute chi2(q || p) of the solution that row k is about to enter, [M]; it falls along the ranking.

    1 + chi2 = S_k / T_k^2 with T_k = sum_(j<=k) p_j d_jk, S_k = sum_(j<=k) p_j d_jk^2 and d_jk = e_j - e_k. Both are
    computed in units of d_1k, from row to row: with r = d_1(k-1) / d_1k all terms are non-negative and at most 1,
    however large, small or close the scores are.
    """
    best_M = ranking.spread(ranking.at(score_M, 0, fill=np.nan))
    tied_M, mass_M = score_M == best_M, ranking.prefix_sum(prior_M)
    spread_M = best_M - score_M
    share_M, gap_M = np.zeros_like(score_M), np.zeros_like(score_M)
    np.divide(ranking.previous(spread_M, first=0.0), spread_M, out=share_M, where=~tied_M)
    np.divide(ranking.previous(score_M, first=score_M) - score_M, spread_M, out=gap_M, where=~tied_M)
    rise_M = ranking.previous(mass_M, first=0.0) * gap_M
    first_M, second_M = np.zeros_like(score_M), np.zeros_like(score_M)
    order_M = np.argsort(ranking.position, kind="stable")  # all first rows, all second rows, ...
    for rows in np.split(order_M, np.cumsum(np.bincount(ranking.position))[:-1])[1:]:
        before, share = rows - 1, share_M[rows]
        carried = share * first_M[before]
        first_M[rows] = carried + rise_M[rows]
        second_M[rows] = share**2 * second_M[before] + gap_M[rows] * (carried + first_M[rows])
    tied_mass_M = ranking.spread(replace_zeros(ranking.sum(prior_M * tied_M)))
    chi2_M = 1 / tied_mass_M - 1
    np.divide(second_M, first_M**2, out=chi2_M, where=~tied_M)
    chi2_M[~tied_M] -= 1
    return chi2_M


def replace_zeros(x_G: np.ndarray) -> np.ndarray:
    """Return x with 1 in place of 0, as a divisor for groups whose quotient is not used."""
    return np.where(x_G > 0, x_G, 1.0)
