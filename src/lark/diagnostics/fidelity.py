"""Compare scores with the truth: exact learnability from gradients and real loss drops beside the proxies that forward
passes give, what lies between them (kappa), and how far candidates' gradients overlap; on a sample of problems.

kappa_k = ||grad L_k||^2 / Brier_k: LARK (arXiv 2605.30651) takes it for constant, and gradients for orthogonal.

Shapes: N candidates of a sample, G problems, K candidates of one, R resamples.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lark.common.bootstrap import resample_sums
from lark.common.groups import Groups, tie_hash
from lark.diagnostics.composition import compute_quantiles
from lark.diagnostics.exact_gradients import ExactGradients
from lark.scoring.passes import HeadGradients
from lark.selection.candidates import Candidates
from lark.selection.scores.gradients import LarkExact, LarkHead, LossDrop, compute_squared_norms
from lark.selection.scores.statistics import Lark, Learnability
from lark.selection.within_problem import (
    UNKNOWN,
    Mean,
    average_over_problems,
    compute_spearman,
    compute_top_overlap,
    estimate_from_sums,
    summarise_with_chance,
)

STEP_TOLERANCE = 0.05
"""Relative change that halving the step of the loss drops may make."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarise_fidelity(
    sample: Candidates,
    wanted: ExactGradients,
    own_scores: Mapping[str, np.ndarray],
    *,
    average: str,
    budget: int,
    seed: int,
    resamples: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summarise a sample whose candidates have the columns of the exact pass; return the figures, and a row a
    candidate.

    own_scores: by name, [N], scores to compare besides the proxies; those that equal one are left out. average:
    trajectory | token, the loss whose exact gain is measured.
    """
    truth, scores = compute_truths(sample, wanted, average=average), compute_proxies(sample, average=average)
    for name, score_N in own_scores.items():
        if not any(np.allclose(score_N, known_N, equal_nan=True) for known_N in scores.values()):
            scores[name] = score_N
    columns, tokens_N = sample.of(wanted), sample["num_tokens"].astype(np.float64)
    found = {
        "problems": sample.groups.count,
        "candidates": len(sample),
        "budget": budget,
        "parameters": wanted.parameters,
        "average": average,
        "step": check_step(sample, wanted),
        "proxies": compare_scores(scores, truth, sample, budget=budget, seed=seed, resamples=resamples),
        "kappa": summarise_kappa(
            columns["squared_norm"], sample["brier"], tokens_N, sample.groups, resamples=resamples
        ),
        "cosine": measure_cosines(sample, columns, resamples=resamples),
    }
    shown = {name: sample[name] for name in ("problem_id", "candidate_id", "teacher", "correct", "num_tokens")}
    shown |= {"loss": sample["loss"], "brier": sample["brier"], "squared_norm": columns["squared_norm"]}
    shown |= {f"exact_{name}": values for name, values in truth.items()} | scores
    lists = [values.tolist() for values in shown.values()]
    return found, [dict(zip(shown, row, strict=True)) for row in zip(*lists, strict=True)]


def compute_truths(candidates: Candidates, wanted: ExactGradients, *, average: str) -> dict[str, np.ndarray]:
    """Compute by name, [N]: loss_drop, the relative drop of the loss by one SGD step; rho = ||grad L||^2 / L, to which
    it tends for small steps; g, LARK's gain with the Gram matrix of gradients for the loss that sft.average trains. NaN
    where L = 0.
    """
    columns = candidates.of(wanted)
    loss_N = columns["loss_before"]
    with np.errstate(divide="ignore", invalid="ignore"):
        rho_N = np.where(loss_N > 0, columns["squared_norm"] / loss_N, np.nan)
    return {
        "loss_drop": LossDrop(parameters=wanted.parameters, eta=wanted.eta)(candidates),
        "rho": rho_N,
        "g": LarkExact(parameters=wanted.parameters, average=average)(candidates),
    }


def compute_proxies(candidates: Candidates, *, average: str) -> dict[str, np.ndarray]:
    """Compute by name, [N], from forward passes: rho = Brier / L and LARK's g; both with Brier / T (rho_length,
    lark_length); both with the head's gradient (rho_head, lark_head), where its pass is there; and the controls, minus
    length and minus loss (likelihood). average: lark_head's, whose Gram matrix is exact over the head; the others have
    none.
    """
    loss_N, tokens_N = candidates["loss"], candidates["num_tokens"].astype(np.float64)
    found = {"rho": Learnability(length_exponent=0.0)(candidates), "lark": Lark()(candidates)}
    found |= {"rho_length": Learnability()(candidates), "lark_length": Lark(length_exponent=1.0)(candidates)}
    if HeadGradients() in candidates.passes:
        columns = candidates.of(HeadGradients())
        found |= {"rho_head": compute_squared_norms(candidates, columns) / loss_N}
        found |= {"lark_head": LarkHead(average=average)(candidates)}
    return found | {"minus_length": -tokens_N, "likelihood": -loss_N}


def compare_scores(
    scores: Mapping[str, np.ndarray],
    truth: Mapping[str, np.ndarray],
    candidates: Candidates,
    *,
    budget: int,
    seed: int,
    resamples: int,
) -> dict[str, dict[str, dict[str, Mean]]]:
    """Compare every score with every truth within problems: `spearman`, and `overlap`, the share of the truth's top
    `budget` that are the score's; each beside chance.
    """
    groups = candidates.groups
    tie_N = tie_hash(seed, candidates.problem_id, candidates.candidate_id)
    pairs = [(score, true) for score in scores for true in truth]
    ranks = [compute_spearman(scores[a], truth[b], groups) for a, b in pairs]
    tops = [compute_top_overlap(scores[a], truth[b], groups, tie_N, budget=budget) for a, b in pairs]
    rank_means, top_means = (summarise_with_chance(values, resamples=resamples) for values in (ranks, tops))
    found: dict[str, dict[str, dict[str, Mean]]] = {score: {} for score in scores}
    for (score, true), rank, top in zip(pairs, rank_means, top_means, strict=True):
        found[score][true] = {"spearman": rank, "overlap": top}
    return found


def check_step(candidates: Candidates, wanted: ExactGradients) -> dict[str, Any]:
    """Check that the step is small enough: |drop at eta / 2 over drop at eta - 1|, its median and 95th percentile over
    the candidates, and the share of them that stay within `STEP_TOLERANCE`; and how many losses rose.
    """
    columns = candidates.of(wanted)
    with np.errstate(divide="ignore", invalid="ignore"):
        change_N = np.abs(columns["drop_half"] / columns["drop"] - 1)
    change_N = change_N[np.isfinite(change_N)]
    median, p95 = compute_quantiles(change_N, (0.5, 0.95)).values()
    share = float((change_N <= STEP_TOLERANCE).mean()) if len(change_N) else math.nan
    return {
        "eta": wanted.eta,
        "tolerance": STEP_TOLERANCE,
        "candidates": len(change_N),
        "median_change": median,
        "p95_change": p95,
        "share_within": share,
        "rises": int((columns["drop"] <= 0).sum()),
        "passed": share >= 0.95,
    }


# ---- kappa


def summarise_kappa(
    norm_N: np.ndarray, brier_N: np.ndarray, tokens_N: np.ndarray, groups: Groups, *, resamples: int
) -> dict[str, Any]:
    """Summarise kappa = squared norm / Brier over the candidates where both are above 0: mean, coefficient of
    variation, quantiles, its coefficient of variation within problems, and the power of the length that it goes with
    there.
    """
    valid_N = (norm_N > 0) & (brier_N > 0) & (tokens_N > 0)
    found: dict[str, Any] = {"candidates": int(valid_N.sum()), "left_out": int((~valid_N).sum())}
    if not valid_N.any():
        return found
    kappa_N, tokens_N = norm_N[valid_N] / brier_N[valid_N], tokens_N[valid_N]
    sub = Groups(groups.index_N[valid_N], groups.count)
    mean_G = sub.average(kappa_N)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation_G = np.sqrt(sub.average((kappa_N - sub.spread(mean_G)) ** 2)) / mean_G
    within_G = np.where(sub.size > 1, deviation_G, np.nan)
    return found | {
        "mean": float(kappa_N.mean()),
        "cv": float(kappa_N.std() / kappa_N.mean()),
        "quantiles": compute_quantiles(kappa_N, QUANTILES),
        "cv_within_problems": average_over_problems([within_G], resamples=resamples)[0],
        "exponent_within_problems": fit_length_exponent(kappa_N, tokens_N, sub, resamples=resamples),
    }


def fit_length_exponent(
    kappa_N: np.ndarray, tokens_N: np.ndarray, groups: Groups, *, resamples: int, seed: int = 0
) -> Mean:
    """Fit b of kappa ~ T^b by least squares on logarithms, with a constant for each problem and a bootstrap interval
    over problems. 0: length says nothing (that is its `chance`).
    """
    x_N, y_N = (v_N - groups.spread(groups.average(v_N)) for v_N in (np.log(tokens_N), np.log(kappa_N)))
    sum_2G = np.stack([groups.sum(x_N * x_N), groups.sum(x_N * y_N)])[:, groups.size > 1]
    if not sum_2G.size:
        return UNKNOWN
    (resampled_R2,) = resample_sums(sum_2G, resamples=resamples, seed=seed)
    return estimate_from_sums(sum_2G, resampled_R2, _compute_slope)


def _compute_slope(sum_R2: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sum_R2[:, 1] / sum_R2[:, 0]


# ---- overlap of gradients


def measure_cosines(candidates: Candidates, columns: Mapping[str, np.ndarray], *, resamples: int) -> dict[str, Any]:
    """Measure the cosine between the gradients of a problem's candidates: the mean over pairs, averaged over problems
    (0 where they were orthogonal), and quantiles over all pairs.
    """
    mean_G, pairs = np.full(candidates.groups.count, np.nan), [np.zeros(0)]
    for g, rows in enumerate(candidates.groups.split()):
        # a Gram row is over the problem's rows in the order of the pass, which may be more than these
        place = {row: i for i, row in enumerate(columns["gram_rows"][rows[0]].tolist())}
        keep = [place[row] for row in candidates.row_N[rows].tolist()]
        gram_KK = np.stack([columns["gram"][row][keep] for row in rows])
        norm_K = np.sqrt(gram_KK.diagonal())
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = (gram_KK / np.outer(norm_K, norm_K))[np.triu_indices(len(rows), 1)]
        cosine = cosine[np.isfinite(cosine)]
        if len(cosine):
            mean_G[g] = cosine.mean()
            pairs.append(cosine)
    every = np.concatenate(pairs)
    (mean,) = average_over_problems([mean_G], resamples=resamples)
    return {"mean": mean, "pairs": len(every), "quantiles": compute_quantiles(every, QUANTILES)}
