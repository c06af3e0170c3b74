"""Describe scores and selections by what a run has anyway, its statistics: correlations, composition, overlaps."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lark.common.groups import tie_hash
from lark.diagnostics.composition import (
    expand_q,
    measure_concentration,
    measure_coverage,
    measure_difficulty,
    measure_gaps,
    measure_overlaps,
    measure_teachers,
)
from lark.scoring.passes import Statistics
from lark.selection.candidates import Candidates
from lark.selection.matching import take_top
from lark.selection.scores.statistics import (
    DropFirst,
    Entropy,
    Lark,
    Learnability,
    Length,
    Likelihood,
    Random,
    Rank,
    RankSurprisal,
    Score,
)
from lark.selection.within_problem import Mean, compute_pooled_spearman, compute_spearman, summarise_with_chance
from lark.training.datamodule import TrajectoryDataModule


def list_stock_scores(data: TrajectoryDataModule) -> dict[str, Score]:
    """List the scores that need no other pass than the statistics, or none, by their rules' names."""
    free: dict[str, Score] = {"shortest": Length(sign=-1), "longest": Length(sign=1), "random": Random(seed=data.seed)}
    if Statistics() not in data.needs:
        return free
    return {
        "lark": Lark(),
        "lark_length": Lark(length_exponent=1.0),
        "rho_length": Learnability(),
        "likelihood": Likelihood(),
        "perplexity_high": Likelihood(sign=-1),
        "entropy": Entropy(),
        "rank": Rank(),
        "rsr": RankSurprisal(),
        "drop_first": DropFirst(skip=data.probe.skip),
        **free,
    }


def describe_choice(data: TrajectoryDataModule, *, resamples: int) -> dict[str, Any]:
    """Measure `correlations`, `selections` (by role) and `overlaps`, with the counts they rest on."""
    candidates, has_statistics = data.candidates, Statistics() in data.needs
    groups = candidates.groups
    rules = {role: data.rules[role] for role in data.selections if role in data.rules}
    stock = list_stock_scores(data)
    keep_N = data.rules["selector"].compute_mask(candidates)  # the other rules choose from what the selector may
    survivors = candidates.where(keep_N)

    def compute(score: Score) -> np.ndarray:
        score_N = np.full(len(candidates), np.nan)
        score_N[keep_N] = score(survivors)
        return score_N

    scores = {name: compute(score) for name, score in stock.items()}
    if has_statistics:
        scores["rho"] = compute(Learnability(length_exponent=0.0))
    titles: dict[str, str] = {}
    for role, rule in rules.items():  # a stock score under its own name is there once
        is_stock = stock.get(rule.name) == rule.score and rule.filter == data.rules["selector"].filter
        is_taken = rule.name in titles.values() or (rule.name in scores and not is_stock)
        titles[role] = f"{rule.name} ({role})" if is_taken else rule.name
        scores[titles[role]] = data.selections[role].score_N

    correct_N = candidates["correct"].astype(np.float64)
    targets = {"loss": candidates["loss"]} if has_statistics else {}
    targets |= {"length": candidates["num_tokens"].astype(np.float64), "correct": correct_N}

    # other rules choose as many candidates of each problem as the selector
    chosen = {titles[role]: expand_q(candidates, data.selections[role]) for role in rules}
    masks = {name: q_N > 0 for name, q_N in chosen.items()}
    count_G = groups.sum(masks[titles["selector"]].astype(float)).astype(np.int64)
    tie_N = tie_hash(data.seed, candidates.problem_id, candidates.candidate_id)
    masks |= {
        name: take_top(scores[name], groups, tie_N, count_G)[0] > 0 for name in stock if name not in titles.values()
    }

    difficulty = measure_difficulty(candidates, targets)
    known_N = correct_N if np.isfinite(correct_N).any() else None
    selections = {}
    for role, rule in rules.items():
        q_N, budget = chosen[titles[role]], rule.policy.budget
        selections[role] = {
            "rule": rule.name,
            "score": titles[role],
            "teachers": measure_teachers(candidates, q_N),
            "concentration": measure_concentration(candidates, q_N, budget=budget, resamples=resamples),
            "gap": None
            if budget is None
            else measure_gaps(candidates, data.selections[role], rule.policy, seed=data.seed),
            "coverage": {
                name: measure_coverage(candidates, q_N, value_G, known_N) for name, value_G in difficulty.items()
            },
        }
    return {
        "problems": groups.count,
        "candidates": len(candidates),
        "without_forward_pass": not has_statistics,
        "correlations": correlate_scores(scores, targets, candidates, resamples=resamples),
        "selections": selections,
        "overlaps": measure_overlaps(masks, groups, resamples=resamples),
    }


def correlate_scores(
    scores: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], candidates: Candidates, *, resamples: int
) -> dict[str, dict[str, dict[str, Mean]]]:
    """Correlate every score with every target (Spearman): `within` problems, and `pooled` over all candidates."""
    groups = candidates.groups
    pairs = [(score, target) for score in scores for target in targets]
    values = [(scores[score], targets[target]) for score, target in pairs]
    within = summarise_with_chance([compute_spearman(a_N, b_N, groups) for a_N, b_N in values], resamples=resamples)
    pooled = compute_pooled_spearman(values, groups, resamples=resamples)
    found: dict[str, dict[str, dict[str, Mean]]] = {score: {} for score in scores}
    for (score, target), inside, over_all in zip(pairs, within, pooled, strict=True):
        found[score][target] = {"within": inside, "pooled": over_all}
    return found
