"""Describe a selection beside the pool it was taken from: teachers, concentration of the weights, the policy's gap,
coverage of easy and hard problems, and overlap with other selections.

Shapes: N candidates, G problems.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lark.common.groups import Groups, tie_hash
from lark.selection.candidates import Candidates
from lark.selection.policies import Policy
from lark.selection.policy_weights import compute_prior, compute_weights
from lark.selection.selection import Selection
from lark.selection.within_problem import (
    average_over_problems,
    compute_jaccard,
    compute_midranks,
    summarise_with_chance,
)

DECILES = (0.1, 0.5, 0.9)
DIFFICULTY_BINS = 4


def expand_q(candidates: Candidates, selection: Selection) -> np.ndarray:
    """Return q of every candidate, 0 where it was not chosen, [N]; sums to 1 in problems with a choice."""
    q_N = np.zeros(len(candidates))
    q_N[np.searchsorted(candidates.row_N, selection.row)] = selection.q
    return q_N


def compute_quantiles(x: np.ndarray, quantiles: Sequence[float] = DECILES) -> dict[str, float]:
    """Compute quantiles of x by name (p10, p50, ...), NaN where x is empty."""
    return {f"p{100 * q:.0f}": float(np.quantile(x, q)) if len(x) else math.nan for q in quantiles}


def measure_teachers(candidates: Candidates, q_N: np.ndarray) -> dict[str, dict[str, float]]:
    """Measure by teacher, largest share first: its `share` of the choice (of q, so that every problem counts the same),
    of the `pool`'s candidates, and `chance`: what a random choice in the same problems would give it.
    """
    groups = candidates.groups
    names, index_N = np.unique([str(teacher) for teacher in candidates["teacher"]], return_inverse=True)
    chosen_G = groups.sum(q_N) > 0
    chance_N = np.where(groups.spread(chosen_G), 1 / groups.spread(groups.size), 0.0)
    columns = [np.bincount(index_N, x_N) / x_N.sum() for x_N in (q_N, np.ones(len(q_N)), chance_N)]
    rows = zip(names.tolist(), *(column.tolist() for column in columns), strict=True)
    found = {name: {"share": share, "pool": pool, "chance": chance} for name, share, pool, chance in rows}
    return dict(sorted(found.items(), key=lambda item: -item[1]["share"]))


def measure_concentration(
    candidates: Candidates, q_N: np.ndarray, *, budget: int | None, resamples: int
) -> dict[str, Any]:
    """Measure the effective sample size (sum w)^2 / sum w^2 of the whole selection and of a problem's candidates; the
    chi2 distance of q to the uniform distribution over the pool: in a problem K sum q^2 - 1, and over the whole pool
    with every problem of the same mass. `least`: the chi2 that `budget` candidates of K cannot fall below, K / B - 1.
    """
    groups = candidates.groups
    size_G, square_G = groups.size.astype(np.float64), groups.sum(q_N**2)
    square_G = np.where(square_G > 0, square_G, np.nan)  # NaN: no choice in the problem
    least_G = np.full(groups.count, np.nan)
    if budget is not None:
        least_G = np.where(np.isnan(square_G), np.nan, np.maximum(size_G / budget - 1, 0))
    figures = np.stack([1 / square_G, size_G * square_G - 1, least_G])
    effective, chi2, least = average_over_problems(figures, resamples=resamples)
    p_N = 1 / (groups.count * groups.spread(size_G))
    whole_N = q_N / q_N.sum()
    return {
        "chosen": int((q_N > 0).sum()),
        "effective_sample_size": float(q_N.sum() ** 2 / (q_N**2).sum()),
        "effective_within_problem": effective,
        "chi2_within_problem": chi2,
        "least_chi2_within_problem": least.mean,
        "chi2_whole": float((whole_N**2 / p_N).sum() - 1),
    }


def measure_gaps(candidates: Candidates, selection: Selection, policy: Policy, *, seed: int) -> dict[str, Any]:
    """Measure the budget policy's gap, mean_topB e - e_(B+1), over problems in which something is excluded: quantiles,
    and of the gap over the standard deviation of the problem's scores. ||dq||_1 <= 8 ||de||_inf / gap (ours): `movable`
    is the score change that may move all of q (||dq||_1 = 2) at the quantile, gap / 4. `no_gap`: problems where it is
    0.
    """
    groups, score_N = candidates.groups, selection.score_N
    valid_N = np.isfinite(score_N)
    prior_N = compute_prior(policy.prior, candidates.__getitem__, groups, valid_N)
    tie_N = tie_hash(seed, candidates.problem_id, candidates.candidate_id)
    result = compute_weights(policy, score_N, groups, tie_N, prior_N, seed=seed, problem_ids=candidates.problem_id)
    gap_G = result.gap_G
    sub, score_M = Groups(groups.index_N[valid_N], groups.count), score_N[valid_N]
    deviation_G = np.sqrt(sub.average((score_M - sub.spread(sub.average(score_M))) ** 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_G = np.where(deviation_G > 0, gap_G / deviation_G, np.nan)
    known = gap_G[np.isfinite(gap_G)]
    return {
        "problems": len(known),
        "no_gap": int((known == 0).sum()),
        "gap": compute_quantiles(known),
        "gap_over_deviation": compute_quantiles(relative_G[np.isfinite(relative_G)]),
        "movable": compute_quantiles(known / 4),
    }


def bin_difficulty(value_G: np.ndarray, *, bins: int = DIFFICULTY_BINS) -> np.ndarray:
    """Bin problems by their difficulty, 0 the easiest, -1 where it is not known; equal difficulties share a bin, so
    that bins are of equal size only where few are.
    """
    known_G = np.isfinite(value_G)
    bin_G = np.full(len(value_G), -1)
    if known_G.any():
        one = Groups(np.zeros(known_G.sum(), np.int64), 1)
        place = (compute_midranks(value_G[known_G], one) + 0.5) / known_G.sum()
        bin_G[known_G] = np.minimum((place * bins).astype(np.int64), bins - 1)
    return bin_G


def measure_difficulty(candidates: Candidates, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Measure problems, [G] by measure, higher = harder: `loss`, the candidates' mean loss (where there are
    statistics), and `correct`, minus the share of correct ones among those with a verdict.
    """
    found: dict[str, np.ndarray] = {}
    for name, sign in (("loss", 1), ("correct", -1)):
        if name in columns:
            known_N = np.isfinite(columns[name])
            total_G = candidates.groups.sum(np.where(known_N, columns[name], 0.0))
            with np.errstate(divide="ignore", invalid="ignore"):
                found[name] = sign * (total_G / candidates.groups.sum(known_N.astype(float)))
    return {name: value_G for name, value_G in found.items() if np.isfinite(value_G).any()}


def measure_coverage(
    candidates: Candidates, q_N: np.ndarray, difficulty_G: np.ndarray, correct_N: np.ndarray | None
) -> list[dict[str, Any]]:
    """List by bin of problems from easy to hard: problems and those with a choice; trajectories chosen; mean tokens of
    the chosen (by q) and of all candidates; share of correct ones (by q) among the chosen and among all, where known.
    """
    groups, tokens_N = candidates.groups, candidates["num_tokens"].astype(np.float64)
    bin_G, chosen_G = bin_difficulty(difficulty_G), groups.sum(q_N) > 0
    rows = []
    for number in range(DIFFICULTY_BINS):
        inside_N = groups.spread(bin_G == number)
        if not inside_N.any():
            continue
        row: dict[str, Any] = {
            "bin": number + 1,
            "problems": int((bin_G == number).sum()),
            "problems_with_choice": int((chosen_G & (bin_G == number)).sum()),
            "chosen": int((inside_N & (q_N > 0)).sum()),
            "chosen_tokens": _average(tokens_N, q_N * inside_N),
            "pool_tokens": _average(tokens_N, inside_N.astype(float)),
        }
        if correct_N is not None:
            known_N, value_N = np.isfinite(correct_N), np.nan_to_num(correct_N)
            row["chosen_correct"] = _average(value_N, q_N * inside_N * known_N)
            row["pool_correct"] = _average(value_N, (inside_N & known_N).astype(float))
        rows.append(row)
    return rows


def _average(x_N: np.ndarray, weight_N: np.ndarray) -> float:
    total = weight_N.sum()
    return float((x_N * weight_N).sum() / total) if total else math.nan


def measure_overlaps(chosen: Mapping[str, np.ndarray], groups: Groups, *, resamples: int) -> list[dict[str, Any]]:
    """List for every pair of selections (masks [N] by name) the mean over problems of their Jaccard index, beside what
    random selections of the same sizes would have.
    """
    names = list(chosen)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    values = [compute_jaccard(chosen[a], chosen[b], groups) for a, b in pairs]
    found = summarise_with_chance(values, resamples=resamples)
    return [{"a": a, "b": b, **asdict(mean)} for (a, b), mean in zip(pairs, found, strict=True)]
