"""Apply a rule to candidates: which rows it chooses, with which weights, and how that came about."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import Groups, tie_hash
from lark.selection.candidates import Candidates
from lark.selection.matching import take_tokens, take_top
from lark.selection.policies import Policy, prior_weights, weights
from lark.selection.rule import Rule
from lark.selection.within_problem import compute_spearman


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen rows of the pool, with their weights.

    row: row numbers in the pool, ascending; q: its share of the problem, sums to 1 within it; weight: q scaled so that its mean
    over the selection is 1; score: what the rule gave each chosen row; record: counts, shares, confounds (JSON);
    score_N: the scores of all candidates, NaN where there is none.
    """

    row: np.ndarray
    q: np.ndarray
    weight: np.ndarray
    score: np.ndarray
    record: dict[str, Any]
    score_N: np.ndarray
    taken_by_problem: Mapping[str, int]


def select(
    rule: Rule,
    candidates: Candidates,
    *,
    seed: int,
    reference_selection: Selection | None = None,
    match: str = "trajectories",
    trained_tokens_N: np.ndarray | None = None,
) -> Selection:
    """Apply `rule`; with `reference_selection` it acts as that selection's baseline: policy top_b with equal weights, taking of each
    problem as many rows as `reference_selection` took there or, with match="tokens", then more or fewer until the tokens are as many
    (a rule that takes all candidates still takes all). `trained_tokens_N` counts the tokens that training a row means;
    by default the candidates' own num_tokens.

    Raises LarkError when nothing at all can be chosen.
    """
    tokens_N = candidates["num_tokens"] if trained_tokens_N is None else trained_tokens_N
    if reference_selection is not None:
        candidates = candidates.as_baseline_for(reference_selection)
    keep_N = rule.keep(candidates)
    survivors = candidates.where(keep_N)
    score_N = np.full(len(candidates), np.nan)
    if len(survivors):
        score_N[keep_N] = rule.scores(survivors)
    groups = candidates.groups
    tie_N = tie_hash(seed, candidates["problem_id"], candidates["candidate_id"])
    valid_N = np.isfinite(score_N)
    counts: dict[str, int] = {
        "candidates": len(candidates),
        "dropped_by_filter": int((~keep_N).sum()),
        "dropped_without_score": int((keep_N & ~valid_N).sum()),
    }
    if reference_selection is not None and not rule.takes_all:
        first_of_group = candidates["problem_id"][np.unique(groups.index_N, return_index=True)[1]]
        wanted_G = np.array([reference_selection.taken_by_problem.get(problem, 0) for problem in first_of_group])
        details: dict[str, Any] = {"kind": "top_b", "match": match}
        if match == "tokens":
            total = reference_selection.record["tokens"]
            q_N, difference = take_tokens(score_N, groups, tie_N, wanted_G, tokens_N, total)
            details["tokens_minus_selector"] = difference
        else:
            q_N, counts["short_of_selector"] = take_top(score_N, groups, tie_N, wanted_G)
    else:
        column = None if rule.policy.prior == "uniform" else candidates[_prior_column(rule.policy)]
        prior_N = prior_weights(rule.policy.prior, column, groups, valid_N)
        result = weights(rule.policy, score_N, groups, tie_N, prior_N, seed=seed, problem_ids=candidates["problem_id"])
        q_N = result.q_N
        details = {**vars(rule.policy), **result.record()}
    chosen_N = np.flatnonzero(q_N > 0)
    if len(chosen_N) == 0:
        raise LarkError(
            f"selector {rule.name} chose nothing of {len(candidates)} candidates ({counts['dropped_by_filter']} "
            f"filtered, {counts['dropped_without_score']} without a score); loosen selector.filter or check the scores"
        )
    q = q_N[chosen_N]
    problems, taken = np.unique(candidates["problem_id"][chosen_N], return_counts=True)
    weight = q * len(q) / q.sum()
    counts |= {
        "chosen": len(chosen_N),
        "not_chosen": int(valid_N.sum()) - len(chosen_N),
        "problems": groups.count,
        "problems_without_choice": groups.count - len(problems),
    }
    decide = getattr(rule.score, "decisions", None)  # what a score chose by itself, such as an order of teachers
    record = {
        "rule": rule.name,
        "decisions": decide(survivors) if decide and len(survivors) else {},
        "matched": reference_selection is None or (not rule.takes_all and _is_matched(counts, details, tokens_N)),
        "policy": details,
        "counts": counts,
        "tokens": int(tokens_N[chosen_N].sum()),
        "effective_sample_size": float(weight.sum() ** 2 / np.square(weight).sum()),
        "teacher_share": _shares(candidates["teacher"][chosen_N], weight),
        "within_problem_spearman": {
            name: within_problem_spearman(score_N, candidates[name], groups)
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


def _is_matched(counts: dict[str, int], details: dict[str, Any], tokens_N: np.ndarray) -> bool:
    """Whether a baseline has as many rows, or tokens to within a row, as the selector: its rule may score too few."""
    if details["match"] == "tokens":
        return abs(details["tokens_minus_selector"]) <= int(tokens_N.max())
    return counts["short_of_selector"] == 0


def _prior_column(policy: Policy) -> str:
    return "teacher" if policy.prior == "per_teacher" else policy.prior


def _shares(teachers: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Share of the selection's weight by teacher, largest first."""
    names, index = np.unique([str(t) for t in teachers], return_inverse=True)
    share = np.bincount(index, weight) / weight.sum()
    return {str(names[i]): float(share[i]) for i in np.argsort(-share)}


def within_problem_spearman(a_N: np.ndarray, b_N: np.ndarray, groups: Groups) -> float | None:
    """Mean over problems of Spearman's correlation between a and b among the problem's candidates (midranks for
    ties); problems in which either is constant, or fewer than two rows have both values, do not count. None if none.
    """
    rho_G = compute_spearman(a_N, b_N, groups).value_G
    return float(np.nanmean(rho_G)) if np.isfinite(rho_G).any() else None
