"""Apply a policy: weights of every row of a ragged pool, the prior they start from, and how they came about.

Shapes: N rows of the pool, G groups (problems), M valid rows in ranked order (group by group, best first).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lark.common.errors import LarkError
from lark.common.groups import Groups, Ranking, unit_hash
from lark.selection.policies import Policy
from lark.selection.water_filling import cut_at_budget, replace_zeros


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyResult:
    """Weights of all rows and, per group, how they came about."""

    q_N: np.ndarray
    """Weights: sum 1 in every group with a valid candidate, else 0."""
    valid_G: np.ndarray
    """Valid candidates (finite score, positive prior), int64."""
    tau_G: np.ndarray
    """Temperature in force, in units of the score; infinite where the weights are the prior, 0 where ties at the top
    decide; NaN without valid candidates and for policies without one."""
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
        """Return what a selection's record keeps, JSON: problems by edge case, rows of weight 0 among the B best, and
        the spread over problems of the finite temperatures and gaps."""
        return {
            "problems_without_valid": int(self.empty.sum()),
            "problems_within_budget": int(self.within_budget_G.sum()),
            "problems_tied_at_top": int(self.tied_G.sum()),
            "zero_weight_in_top_b": int(self.zero_weight_G.sum()),
            "tau_in_force": _compute_deciles(self.tau_G),
            "gap": _compute_deciles(self.gap_G),
        }


def _compute_deciles(x_G: np.ndarray) -> dict[str, float] | None:
    finite = x_G[np.isfinite(x_G)]
    if finite.size == 0:
        return None
    return dict(zip(("p10", "p50", "p90"), np.quantile(finite, [0.1, 0.5, 0.9]).tolist(), strict=True))


def compute_weights(
    policy: Policy,
    score_N: np.ndarray,
    groups: Groups,
    tie_N: np.ndarray,
    prior_N: np.ndarray,
    *,
    seed: int,
    problem_ids: Sequence[str] | np.ndarray | None = None,
) -> PolicyResult:
    """Compute the weights of every row under a policy; the order of the rows does not matter.

    score_N is higher for better; NaN or minus infinity means never. tie_N comes from `tie_hash`. prior_N is any
    non-negative finite weight; it is renormalised over the valid candidates of each group. seed and problem_ids, one
    per row, key the draws of a policy that draws and are not used otherwise.
    Raises LarkError where a policy of the user's own returns something that is not a weight.
    """
    score_N, prior_N = np.asarray(score_N, np.float64), np.asarray(prior_N, np.float64)
    assert not np.isposinf(score_N).any(), "a score of plus infinity is an error of the rule that made it"
    assert np.isfinite(prior_N).all() and (prior_N >= 0).all()

    ranking = groups.rank(score_N, tie_N, np.isfinite(score_N) & (prior_N > 0))
    score_M, prior_M = score_N[ranking.row_M], _normalise(ranking, prior_N[ranking.row_M])
    cut = cut_at_budget(ranking, score_M, prior_M, policy.budget)
    q_M = np.asarray(policy.weights(ranking, score_M, prior_M), np.float64)
    if q_M.shape != score_M.shape or not (np.isfinite(q_M) & (q_M >= 0)).all():
        raise LarkError(
            f"selector.policy.kind={policy.kind} gave something else than one finite weight of at least 0 for each of "
            f"{len(score_M):,} ranked candidates; correct its `weights`"
        )
    if (ranking.sum(q_M)[ranking.size > 0] == 0).any():
        raise LarkError(f"selector.policy.kind={policy.kind} gave no weight to a whole problem; correct its `weights`")
    q_M = _normalise(ranking, q_M)
    if policy.draws is not None:
        assert problem_ids is not None and len(problem_ids) == score_N.size
        q_M = _draw(ranking, q_M, policy.draws, problem_ids, seed)
    in_budget_M = cut.top_M if policy.budget is not None else np.zeros_like(cut.top_M)
    return PolicyResult(
        q_N=ranking.scatter(q_M, score_N.size),
        valid_G=ranking.size,
        tau_G=policy.temperatures(ranking, score_M, prior_M),
        gap_G=cut.gap_G,
        within_budget_G=cut.within_G,
        tied_G=cut.tied_G,
        zero_weight_G=ranking.sum((q_M == 0) & in_budget_M).astype(np.int64),
    )


def _normalise(ranking: Ranking, x_M: np.ndarray) -> np.ndarray:
    return x_M / ranking.spread(ranking.sum(x_M))


def _draw(
    ranking: Ranking, q_M: np.ndarray, budget: int, problem_ids: Sequence[str] | np.ndarray, seed: int
) -> np.ndarray:
    """Draw `budget` times from q in each group with replacement; return weights count / budget [M]; draw d of a problem
    depends on nothing but (seed, problem, d) and q. D draws in all."""
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


def get_prior_column(prior: str) -> str | None:
    """Return the pool column that a policy's prior reads; None for the uniform one."""
    return {"uniform": None, "per_teacher": "teacher"}.get(prior, prior)


def compute_prior(
    prior: str, read_column: Callable[[str], Sequence[object] | np.ndarray], groups: Groups, valid_N: np.ndarray
) -> np.ndarray:
    """Compute the prior over the valid candidates of each group, float64 [N], 0 for other rows.

    prior is a policy's: `uniform`, `per_teacher`, or the name of a pool column that holds numbers; read_column gives a
    pool column, one value a row. The sum is 1 in every group where some valid row has a positive prior, else 0.

    Raises:
        LarkError: a valid row has no teacher (per_teacher), or no finite non-negative number in the column.
    """
    valid_N = np.asarray(valid_N, bool)
    assert valid_N.shape == groups.index_N.shape
    column = get_prior_column(prior)
    if column is None:
        prior_N = valid_N.astype(np.float64)
    elif prior == "per_teacher":
        prior_N = _weigh_teachers(read_column(column), groups, valid_N)
    else:
        prior_N = _read_numbers(column, read_column(column), valid_N)
    return prior_N / groups.spread(replace_zeros(groups.sum(prior_N)))


def _weigh_teachers(teachers_N: Sequence[object] | np.ndarray, groups: Groups, valid_N: np.ndarray) -> np.ndarray:
    """Return 1 / (valid rows of the same teacher in the same group), [N]."""
    missing = sum(teacher is None and valid for teacher, valid in zip(teachers_N, valid_N.tolist(), strict=True))
    if missing:
        raise LarkError(
            f"selector.policy.prior=per_teacher needs a teacher in every candidate, {missing} of {valid_N.sum()} have "
            "none; fill the pool's teacher field or set selector.policy.prior=uniform."
        )
    teachers = Groups.from_ids(teachers_N)
    _, pair_N = np.unique(groups.index_N * teachers.count + teachers.index_N, return_inverse=True)
    pairs = Groups(pair_N, pair_N.size)
    return valid_N / pairs.spread(replace_zeros(pairs.sum(valid_N)))


def _read_numbers(name: str, column_N: Sequence[object] | np.ndarray, valid_N: np.ndarray) -> np.ndarray:
    """Return the column's numbers at valid rows, else 0, [N]."""
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
