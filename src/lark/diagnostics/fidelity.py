"""Scores against the truth: exact learnability from gradients and real loss drops beside the proxies that forward
passes give, what lies between them (kappa), and how far candidates' gradients overlap.

kappa_k = ||grad L_k||^2 / Brier_k: LARK (arXiv 2605.30651) takes it for constant, and gradients for orthogonal.

Shapes: N candidates of a sample, G problems, K candidates of one, P groups of parameters, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lark.common.bootstrap import resample_sums
from lark.common.groups import Groups, tie_hash
from lark.diagnostics.exact_gradients import ExactGradients
from lark.scoring.passes import Gradients, HeadGradients, LossDrops
from lark.selection.candidates import Candidates
from lark.selection.scores.gradients import LarkExact, LarkHead, LossDrop, squared_norms
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

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def with_truth(candidates: Candidates, wanted: ExactGradients, columns: Mapping[str, np.ndarray]) -> Candidates:
    """The candidates with the columns of the exact pass, under its name and under those of the passes that it stands
    for, so that the rules which ask for these can be called.
    """
    known = {
        wanted: columns,
        Gradients(parameters=wanted.parameters): columns,
        LossDrops(parameters=wanted.parameters, eta=wanted.eta): columns,
    }
    return replace(candidates, passes={**candidates.passes, **known})


def truths(candidates: Candidates, wanted: ExactGradients, *, average: str) -> dict[str, np.ndarray]:
    """By name, [N]: loss_drop, the relative drop of the loss by one SGD step; rho = ||grad L||^2 / L, to which it tends
    for small steps; g, LARK's gain with the Gram matrix of gradients for the loss that sft.average trains. NaN where
    L = 0.
    """
    parameters = wanted.parameters
    loss_N = candidates.of(wanted)["loss_before"]
    with np.errstate(divide="ignore", invalid="ignore"):
        rho_N = np.where(loss_N > 0, candidates.of(wanted)["squared_norm"] / loss_N, np.nan)
    return {
        "loss_drop": LossDrop(parameters=parameters, eta=wanted.eta)(candidates),
        "rho": rho_N,
        "g": LarkExact(parameters=parameters, average=average)(candidates),
    }


def proxies(candidates: Candidates, *, average: str) -> dict[str, np.ndarray]:
    """By name, [N], from forward passes: rho = Brier / L and LARK's g; both with Brier / T (rho_length, lark_length);
    both with the head's gradient (rho_head, lark_head), where its pass is there; and the controls, minus length and
    minus loss (likelihood). average: lark_head's, whose Gram matrix is exact over the head; the others have none.
    """
    loss_N, tokens_N = candidates["loss"], candidates["num_tokens"].astype(np.float64)
    found = {"rho": Learnability(length_exponent=0.0)(candidates), "lark": Lark()(candidates)}
    found |= {"rho_length": Learnability()(candidates), "lark_length": Lark(length_exponent=1.0)(candidates)}
    if HeadGradients() in candidates.passes:
        columns = candidates.of(HeadGradients())
        found |= {"rho_head": squared_norms(candidates, columns) / loss_N}
        found |= {"lark_head": LarkHead(average=average)(candidates)}
    return found | {"minus_length": -tokens_N, "likelihood": -loss_N}


def against(
    scores: Mapping[str, np.ndarray],
    truth: Mapping[str, np.ndarray],
    candidates: Candidates,
    *,
    budget: int,
    seed: int,
    resamples: int,
) -> dict[str, dict[str, dict[str, Mean]]]:
    """By score and truth, within problems: `spearman`, and `overlap`, the share of the truth's top `budget` that are
    the score's; each beside chance.
    """
    groups = candidates.groups
    tie_N = tie_hash(seed, candidates.problem_id, candidates.candidate_id)
    pairs = [(score, true) for score in scores for true in truth]
    ranks = [compute_spearman(scores[score], truth[true], groups) for score, true in pairs]
    tops = [compute_top_overlap(scores[score], truth[true], groups, tie_N, budget=budget) for score, true in pairs]
    measured = zip(
        pairs,
        summarise_with_chance(ranks, resamples=resamples),
        summarise_with_chance(tops, resamples=resamples),
        strict=True,
    )
    found: dict[str, dict[str, dict[str, Mean]]] = {score: {} for score in scores}
    for (score, true), rank, top in measured:
        found[score][true] = {"spearman": rank, "overlap": top}
    return found


def step_check(candidates: Candidates, wanted: ExactGradients, *, tolerance: float) -> dict[str, Any]:
    """Whether the step is small enough: |drop at eta / 2 over drop at eta - 1|, its median and 95th percentile over the
    candidates, and the share of them that stay within `tolerance`; and how many losses rose.
    """
    columns = candidates.of(wanted)
    with np.errstate(divide="ignore", invalid="ignore"):
        change_N = np.abs(columns["drop_half"] / columns["drop"] - 1)
    change_N = change_N[np.isfinite(change_N)]
    share = float((change_N <= tolerance).mean()) if len(change_N) else math.nan
    return {
        "eta": wanted.eta,
        "tolerance": tolerance,
        "candidates": len(change_N),
        "median_change": float(np.median(change_N)) if len(change_N) else math.nan,
        "p95_change": float(np.quantile(change_N, 0.95)) if len(change_N) else math.nan,
        "share_within": share,
        "rises": int((columns["drop"] <= 0).sum()),
        "passed": share >= 0.95,
    }


# ---- kappa


def kappas(
    candidates: Candidates, wanted: ExactGradients, groups_P: Sequence[str], *, resamples: int
) -> dict[str, dict[str, Any]]:
    """`spread_of` kappa, by part of the student: all that moves, and each group of layers; with the share of the
    squared norm that falls to it.
    """
    columns = candidates.of(wanted)
    norm_NP = np.stack(list(columns["group_squared_norm"]))
    parts = {"all": columns["squared_norm"]} | dict(zip(groups_P, norm_NP.T, strict=True))
    total = float(columns["squared_norm"].sum())
    tokens_N, brier_N = candidates["num_tokens"].astype(np.float64), candidates["brier"]
    return {
        name: {"share_of_squared_norm": float(norm_N.sum()) / total if total else math.nan}
        | spread_of(norm_N, brier_N, tokens_N, candidates.groups, resamples=resamples)
        for name, norm_N in parts.items()
    }


def spread_of(
    norm_N: np.ndarray, brier_N: np.ndarray, tokens_N: np.ndarray, groups: Groups, *, resamples: int
) -> dict[str, Any]:
    """Of kappa = squared norm / Brier over the candidates where both are above 0: mean, coefficient of variation,
    quantiles, its coefficient of variation within problems, and its length exponents.
    """
    valid_N = (norm_N > 0) & (brier_N > 0) & (tokens_N > 0)
    found: dict[str, Any] = {"candidates": int(valid_N.sum()), "left_out": int((~valid_N).sum())}
    if not valid_N.any():
        return found
    kappa_N = norm_N[valid_N] / brier_N[valid_N]
    sub = Groups(groups.index_N[valid_N], groups.count)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_G = sub.sum(kappa_N) / sub.size
        deviation_G = np.sqrt(sub.sum((kappa_N - sub.spread(mean_G)) ** 2) / sub.size) / mean_G
    within_G = np.where(sub.size > 1, deviation_G, np.nan)
    return found | {
        "mean": float(kappa_N.mean()),
        "cv": float(kappa_N.std() / kappa_N.mean()),
        "quantiles": {f"p{100 * q:.0f}": float(np.quantile(kappa_N, q)) for q in QUANTILES},
        "cv_within_problems": average_over_problems([within_G], resamples=resamples)[0],
        "exponent_within_problems": exponent(kappa_N, tokens_N[valid_N], sub, within=True, resamples=resamples),
        "exponent_pooled": exponent(kappa_N, tokens_N[valid_N], sub, within=False, resamples=resamples),
    }


def exponent(
    kappa_N: np.ndarray, tokens_N: np.ndarray, groups: Groups, *, within: bool, resamples: int, seed: int = 0
) -> Mean:
    """b of kappa ~ T^b by least squares on logarithms, with a bootstrap interval over problems. within: each problem
    has a constant of its own; else all candidates share one. 0: length says nothing (that is its `chance`).
    """
    x_N, y_N = np.log(tokens_N), np.log(kappa_N)
    if within:
        with np.errstate(divide="ignore", invalid="ignore"):
            x_N, y_N = (v_N - groups.spread(groups.sum(v_N) / groups.size) for v_N in (x_N, y_N))
        several_N = groups.spread(groups.size) > 1
        x_N, y_N, groups = x_N[several_N], y_N[several_N], Groups(groups.index_N[several_N], groups.count)
    else:
        x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    sum_5G = np.stack([groups.sum(v_N) for v_N in (np.ones_like(x_N), x_N, y_N, x_N * x_N, x_N * y_N)])
    sum_5G = sum_5G[:, sum_5G[0] > 0]
    if not sum_5G.size:
        return UNKNOWN
    (resampled_R5,) = resample_sums(sum_5G, resamples=resamples, seed=seed)
    return estimate_from_sums(sum_5G, resampled_R5, partial(_slope, within=within))


def _slope(sum_R5: np.ndarray, within: bool) -> np.ndarray:
    n, x, y, xx, xy = sum_R5.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return xy / xx if within else (xy - x * y / n) / (xx - x * x / n)


def kappa_by_teacher(candidates: Candidates, wanted: ExactGradients) -> dict[str, dict[str, float]]:
    """By teacher: candidates, mean kappa, and `relative`, the geometric mean of kappa over its problem's geometric mean
    (1: a teacher whose trajectories the proxy neither flatters nor wrongs). Length explains much of it.
    """
    norm_N, brier_N = candidates.of(wanted)["squared_norm"], candidates["brier"]
    valid_N = (norm_N > 0) & (brier_N > 0)
    kappa_N = np.full(len(norm_N), np.nan)
    kappa_N[valid_N] = norm_N[valid_N] / brier_N[valid_N]
    log_N, groups = np.log(kappa_N), candidates.groups
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_G = groups.sum(np.where(valid_N, log_N, 0.0)) / groups.sum(valid_N.astype(float))
    relative_N = log_N - groups.spread(mean_G)
    teacher_N = np.array([str(teacher) for teacher in candidates["teacher"]])
    return {
        str(teacher): {
            "candidates": int(his_N.sum()),
            "mean": float(kappa_N[his_N].mean()),
            "relative": float(np.exp(relative_N[his_N].mean())),
        }
        for teacher in np.unique(teacher_N)
        if (his_N := valid_N & (teacher_N == teacher)).any()
    }


# ---- overlap of gradients


def cosines(candidates: Candidates, columns: Mapping[str, np.ndarray], *, resamples: int) -> dict[str, Any]:
    """Cosine between the gradients of a problem's candidates: the mean over pairs, averaged over problems (0 where they
    were orthogonal), and quantiles over all pairs.
    """
    mean_G, pairs = np.full(candidates.groups.count, np.nan), []
    for g, rows in enumerate(candidates.groups.split()):
        place = {row: i for i, row in enumerate(columns["gram_rows"][rows[0]].tolist())} if len(rows) else {}
        keep = [place[row] for row in candidates.row_N[rows].tolist()]
        gram_KK = np.stack([columns["gram"][row][keep] for row in rows]) if len(rows) else np.zeros((0, 0))
        norm_K = np.sqrt(gram_KK.diagonal())
        upper = np.triu_indices(len(rows), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = (gram_KK / np.outer(norm_K, norm_K))[upper]
        cosine = cosine[np.isfinite(cosine)]
        if len(cosine):
            mean_G[g] = cosine.mean()
            pairs.append(cosine)
    every = np.concatenate([np.zeros(0), *pairs])
    quantiles = {f"p{100 * q:.0f}": float(np.quantile(every, q)) if len(every) else math.nan for q in QUANTILES}
    return {
        "mean": average_over_problems([mean_G], resamples=resamples)[0],
        "pairs": len(every),
        "quantiles": quantiles,
    }
