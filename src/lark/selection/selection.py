"""Apply a rule to candidates: which rows it chooses, with which weights, and how that came about."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import Groups, tie_hash
from lark.selection.candidates import Candidates
from lark.selection.matching import take_tokens, take_top
from lark.selection.policy_weights import compute_prior, compute_weights
from lark.selection.rule import Rule, describe_part
from lark.selection.within_problem import compute_spearman


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen rows of the pool, with their weights; one value a chosen row unless the name says otherwise."""

    row: np.ndarray
    """Row numbers in the pool, ascending."""
    q: np.ndarray
    """The policy's weights, which sum to 1 within a problem."""
    weight: np.ndarray
    """q scaled so that its mean over the selection is 1."""
    score: np.ndarray
    """The rule's scores."""
    record: dict[str, Any]
    """Counts, shares and confounds (JSON)."""
    score_N: np.ndarray
    """The scores of all candidates, NaN where there is none."""
    taken_by_problem: Mapping[str, int]
    """Chosen rows of each problem that has some."""


def select(
    rule: Rule,
    candidates: Candidates,
    *,
    seed: int,
    reference_selection: Selection | None = None,
    match: str = "trajectories",
    trained_tokens_N: np.ndarray | None = None,
) -> Selection:
    """Apply `rule` to the candidates.

    reference_selection: the selection that this one is to be a baseline for. The policy is then top_b with equal
        weights, taking of each problem as many rows as were taken there or, with match="tokens", then more or fewer
        until the tokens are as many. A rule that takes all candidates still takes all.
    trained_tokens_N: the tokens that training a row means; by default the candidates' own num_tokens.

    Raises LarkError when nothing at all can be chosen.
    """
    tokens_N = candidates["num_tokens"] if trained_tokens_N is None else trained_tokens_N
    if reference_selection is not None:
        candidates = candidates.as_baseline_for(reference_selection)

    # Filter, then score what is left.
    keep_N = rule.compute_mask(candidates)
    survivors = candidates.where(keep_N)
    score_N = np.full(len(candidates), np.nan)
    if len(survivors):
        score_N[keep_N] = rule.compute_scores(survivors)
    valid_N = np.isfinite(score_N)
    counts: dict[str, int] = {
        "candidates": len(candidates),
        "dropped_by_filter": int((~keep_N).sum()),
        "dropped_without_score": int((keep_N & ~valid_N).sum()),
    }

    # Weights: by the policy, or matched to the reference selection.
    groups, problem_N = candidates.groups, candidates["problem_id"]
    tie_N = tie_hash(seed, problem_N, candidates["candidate_id"])
    if reference_selection is not None and not rule.policy.TAKES_ALL:
        first_of_group = problem_N[np.unique(groups.index_N, return_index=True)[1]]
        wanted_G = np.array([reference_selection.taken_by_problem.get(problem, 0) for problem in first_of_group])
        details: dict[str, Any] = {"kind": "top_b", "match": match}
        if match == "tokens":
            total = reference_selection.record["tokens"]
            q_N, difference = take_tokens(score_N, groups, tie_N, wanted_G, tokens_N, total)
            details["tokens_minus_selector"] = difference
            is_matched = abs(difference) <= int(tokens_N.max())  # to within a row
        else:
            q_N, shortfall = take_top(score_N, groups, tie_N, wanted_G)
            counts["short_of_selector"] = shortfall
            is_matched = shortfall == 0
    else:
        prior_N = compute_prior(rule.policy.prior, candidates.__getitem__, groups, valid_N)
        result = compute_weights(rule.policy, score_N, groups, tie_N, prior_N, seed=seed, problem_ids=problem_N)
        q_N = result.q_N
        details = {"kind": rule.policy.kind, **vars(rule.policy), **result.record()}
        is_matched = reference_selection is None
    chosen_N = np.flatnonzero(q_N > 0)
    if len(chosen_N) == 0:
        raise LarkError(
            f"selector {rule.name} chose nothing of {len(candidates)} candidates ({counts['dropped_by_filter']} "
            f"filtered, {counts['dropped_without_score']} without a score); loosen filter or check the scores"
        )

    # The record.
    q = q_N[chosen_N]
    weight = q * len(q) / q.sum()
    problems, taken = np.unique(problem_N[chosen_N], return_counts=True)
    counts |= {
        "chosen": len(chosen_N),
        "not_chosen": int(valid_N.sum()) - len(chosen_N),
        "problems": groups.count,
        "problems_without_choice": groups.count - len(problems),
    }
    decide = getattr(rule.score, "decisions", None)  # what a score chose by itself, such as an order of teachers
    record = {
        "rule": rule.name,
        "filter": None if rule.filter is None else describe_part(rule.filter),
        "decisions": decide(survivors) if decide and len(survivors) else {},
        "matched": is_matched,
        "policy": details,
        "counts": counts,
        "tokens": int(tokens_N[chosen_N].sum()),
        "effective_sample_size": float(weight.sum() ** 2 / np.square(weight).sum()),
        "known_wrong": _compute_known_wrong(candidates["correct"].astype(np.float64), chosen_N, weight),
        "teacher_share": _compute_shares(candidates["teacher"][chosen_N], weight),
        "within_problem_spearman": {
            name: compute_mean_spearman(score_N, candidates[name], groups)
            for name in ("loss", "num_tokens")
            if name in candidates.statistics  # a rule that needs no forward pass has none
        },
    }
    return Selection(
        row=candidates.row_N[chosen_N],
        q=q,
        weight=weight,
        score=score_N[chosen_N],
        record=record,
        score_N=score_N,
        taken_by_problem=dict(zip(problems.tolist(), taken.tolist(), strict=True)),
    )


def _compute_known_wrong(correct_N: np.ndarray, chosen_N: np.ndarray, weight: np.ndarray) -> dict[str, float] | None:
    """Return which share of the selection's weight is on trajectories known to be wrong, and which share of all
    candidates they are; None where no verdict is known.
    """
    if np.isnan(correct_N).all():
        return None
    is_wrong_N = correct_N == 0
    return {"weight": float(weight[is_wrong_N[chosen_N]].sum() / weight.sum()), "candidates": float(is_wrong_N.mean())}


def _compute_shares(teachers: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Return the share of the selection's weight by teacher, largest first."""
    names, index = np.unique([str(t) for t in teachers], return_inverse=True)
    share = np.bincount(index, weight) / weight.sum()
    return {str(names[i]): float(share[i]) for i in np.argsort(-share)}


def compute_mean_spearman(a_N: np.ndarray, b_N: np.ndarray, groups: Groups) -> float | None:
    """Return the mean over problems of Spearman's correlation between a and b among the problem's candidates (midranks
    for ties); problems in which either is constant, or fewer than two rows have both values, do not count. None if
    none.
    """
    rho_G = compute_spearman(a_N, b_N, groups).value_G
    return float(np.nanmean(rho_G)) if np.isfinite(rho_G).any() else None
