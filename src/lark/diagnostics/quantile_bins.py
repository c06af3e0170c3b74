"""Ask whether the score predicts what a trajectory is worth: candidates, cut within problems into bins of equal size by
the selector's score; one student trained on each; held-out loss and accuracy by bin.

Shapes: N candidates, G problems, B bins.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from scipy import stats

from lark.common.cache import is_complete, read_json
from lark.common.groups import tie_hash, unit_hash
from lark.comparison.comparison import compute_curve_mean
from lark.comparison.inference import compute_paired_difference
from lark.selection.candidates import Candidates
from lark.selection.policies import Prior
from lark.selection.rule import Rule
from lark.selection.selection import Selection, select
from lark.training.arms import Arm

EXACT_BINS = 7  # up to so many, all orders are tried for p


def assign_bins(score_N: np.ndarray, candidates: Candidates, *, bins: int, seed: int) -> np.ndarray:
    """Assign a bin to each candidate, int64 [N]: 0 holds each problem's lowest scores, `bins` - 1 its highest, -1 none.

    Every problem gives each bin floor(K / bins) of its K scored candidates, so that bins have the same problems in the
    same numbers. What does not divide is left out by seeded hash, never by score; problems with fewer candidates than
    bins give none.
    """
    groups, valid_N = candidates.groups, np.isfinite(score_N)
    each_G = groups.sum(valid_N.astype(float)).astype(np.int64) // bins
    draw_N = unit_hash(seed, candidates.problem_id, candidates.candidate_id, salt="quantile bins")
    tie_N = tie_hash(seed, candidates.problem_id, candidates.candidate_id)
    drawn = groups.rank(draw_N, tie_N, valid_N)
    kept_N = drawn.scatter((drawn.position < drawn.spread(each_G * bins)).astype(float), len(score_N)) > 0
    ranking = groups.rank(-np.nan_to_num(score_N), tie_N, kept_N)  # lowest first
    bin_N = np.full(len(score_N), -1)
    bin_N[ranking.row_M] = ranking.position // np.maximum(ranking.spread(each_G), 1)
    return bin_N


def select_by_bin(
    bin_N: np.ndarray, candidates: Candidates, *, rule: str, bins: int, seed: int, tokens_N: np.ndarray
) -> dict[str, Selection]:
    """Select what is trained on by arm, bin-1 (lowest scores) to bin-<bins>; every problem has the same weight."""

    def chosen(number: int) -> Rule:
        def score(candidates: Candidates) -> np.ndarray:
            return np.where(bin_N == number, 0.0, np.nan)

        return Rule(name=f"{rule} bin {number + 1} of {bins}", score=score, policy=Prior())

    return {
        f"bin-{number + 1}": select(chosen(number), candidates, seed=seed, trained_tokens_N=tokens_N)
        for number in range(bins)
    }


def summarise_bins(
    arms: Sequence[Arm], score_N: np.ndarray, bin_N: np.ndarray, figures: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """List a row a bin: trajectories and tokens, mean score, held-out loss at the end and its mean over training
    (nats/token), and each evaluation set's mean accuracy (fraction), from the arms' `read_figures`.
    """
    rows = []
    for number, (arm, figure) in enumerate(zip(arms, figures, strict=True)):
        assert arm.selection is not None
        trained = read_json(arm.folder / "trained.json") if is_complete(arm.folder, "trained.json") else {}
        curve, loss = trained.get("curve", []), trained.get("held_out", {}).get("end", {}).get("held_out/loss")
        rows.append(
            {
                "bin": number + 1,
                "hash": arm.folder.name,
                "trajectories": len(arm.selection.row),
                "tokens": arm.selection.record["tokens"],
                "mean_score": float(score_N[bin_N == number].mean()),
                "held_out_loss": math.nan if loss is None else float(loss),
                "mean_loss": compute_curve_mean(curve),
                "accuracy": {name: float(np.mean(list(x.values()))) for name, x in figure["per_problem"].items() if x},
            }
        )
    return rows


def compute_trends(rows: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Relate bins to what came of them: Spearman's correlation of the bin's number with held-out loss and with each
    accuracy, and its exact permutation p (two-sided; with 4 bins no less than 2/24); and the highest bin minus the
    lowest, for accuracies with the interval over problems. One seed: its variance is not estimated.
    """
    number = [row["bin"] for row in rows]
    loss = [row["held_out_loss"] for row in rows]
    found: dict[str, Any] = {
        "held_out_loss": _compute_trend(number, loss) | {"highest_minus_lowest": loss[-1] - loss[0]}
    }
    for name in [name for name in rows[0]["accuracy"] if all(name in row["accuracy"] for row in rows)]:
        high, low = (figures[i]["per_problem"][name] for i in (-1, 0))
        problems = sorted(high)
        x, y = (np.array([[of[problem] for problem in problems]]) for of in (high, low))
        found[name] = _compute_trend(number, [row["accuracy"][name] for row in rows]) | {
            "highest_minus_lowest": vars(compute_paired_difference(x, y))
        }
    return found


def _compute_trend(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    bins = len(x)
    if bins < 3 or not np.isfinite(y).all() or len(set(y)) == 1:
        return {"spearman": math.nan, "p": math.nan, "bins": bins}
    x_B, y_B = (stats.rankdata(v) - (bins + 1) / 2 for v in (x, y))
    scale = np.sqrt((x_B @ x_B) * (y_B @ y_B))
    rho = float(x_B @ y_B / scale)
    if bins <= EXACT_BINS:
        every = np.array([x_B[list(order)] @ y_B for order in permutations(range(bins))]) / scale
        p = float((np.abs(every) >= abs(rho) - 1e-12).mean())
    else:
        p = float(stats.spearmanr(x, y)[1])  # type: ignore[arg-type]
    return {"spearman": rho, "p": p, "bins": bins}
