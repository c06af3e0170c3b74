"""The cheap diagnostics: figures about scores and choices, from the statistics and selections that a run has anyway."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lark.common.groups import tie_hash
from lark.diagnostics import composition
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


def stock_scores(data: TrajectoryDataModule) -> dict[str, Score]:
    """The scores that need no other pass than the statistics, or none, by their rules' names."""
    free: dict[str, Score] = {"shortest": Length(sign=-1), "longest": Length(sign=1), "random": Random(seed=data.seed)}
    if Statistics() not in data.needs:
        return free
    found: dict[str, Score] = {
        "lark": Lark(),
        "lark_length": Lark(length_exponent=1.0),
        "rho_length": Learnability(),
        "likelihood": Likelihood(),
        "perplexity_high": Likelihood(sign=-1),
        "entropy": Entropy(),
        "rank": Rank(),
        "rsr": RankSurprisal(),
        "drop_first": DropFirst(skip=data.probe.skip),
    }
    return found | free


def of_choice(data: TrajectoryDataModule, *, resamples: int) -> dict[str, Any]:
    """The cheap figures: `correlations`, `selections` (by role) and `overlaps`, with the counts they rest on."""
    candidates = data.candidates
    groups, statistics = candidates.groups, Statistics() in data.needs
    rules = {role: data.rules[role] for role in data.selections if role in data.rules}
    scores: dict[str, np.ndarray] = {}
    stock = stock_scores(data)
    for name, score in stock.items():
        scores[name] = score(candidates)
    if statistics:
        scores["rho"] = Learnability(length_exponent=0.0)(candidates)
    titles: dict[str, str] = {}
    for role, rule in rules.items():  # a stock score under its own name is there once
        stocked = stock.get(rule.name) == rule.score and rule.filter is None
        taken = rule.name in titles.values() or (rule.name in scores and not stocked)
        titles[role] = f"{rule.name} ({role})" if taken else rule.name
        scores[titles[role]] = data.selections[role].score_N
    correct_N = candidates["correct"].astype(np.float64)
    targets = {"length": candidates["num_tokens"].astype(np.float64), "correct": correct_N}
    if statistics:
        targets = {"loss": candidates["loss"], **targets}
    chosen = {titles[role]: composition.shares(candidates, data.selections[role]) for role in rules}
    tie_N = tie_hash(data.seed, candidates.problem_id, candidates.candidate_id)
    wanted_G = groups.sum((chosen[titles["selector"]] > 0).astype(float)).astype(np.int64)
    masks = {name: q_N > 0 for name, q_N in chosen.items()}
    for name in stock:
        if name not in masks:
            masks[name] = take_top(scores[name], groups, tie_N, wanted_G)[0] > 0
    difficulty = composition.difficulties(candidates, targets)
    known_N = correct_N if np.isfinite(correct_N).any() else None
    found: dict[str, Any] = {
        "problems": groups.count,
        "candidates": len(candidates),
        "without_forward_pass": not statistics,
        "correlations": correlations(scores, targets, candidates, resamples=resamples),
        "selections": {},
        "overlaps": composition.overlaps(masks, groups, resamples=resamples),
    }
    for role, rule in rules.items():
        selection, q_N = data.selections[role], chosen[titles[role]]
        budget = rule.policy.budget
        found["selections"][role] = {
            "rule": rule.name,
            "score": titles[role],
            "teachers": composition.teachers(candidates, q_N),
            "concentration": composition.concentration(candidates, q_N, budget=budget, resamples=resamples),
            "gap": composition.gaps(candidates, selection, rule.policy, seed=data.seed) if budget is not None else None,
            "coverage": {
                name: composition.coverage(candidates, q_N, value_G, known_N) for name, value_G in difficulty.items()
            },
        }
    return found


def correlations(
    scores: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
    candidates: Candidates,
    *,
    resamples: int,
) -> dict[str, dict[str, dict[str, Mean]]]:
    """By score and target: Spearman's correlation `within` problems, and `pooled` over all candidates."""
    groups = candidates.groups
    pairs = [(score, target) for score in scores for target in targets]
    values = [(scores[score], targets[target]) for score, target in pairs]
    within = summarise_with_chance([compute_spearman(a_N, b_N, groups) for a_N, b_N in values], resamples=resamples)
    pooled = compute_pooled_spearman(values, groups, resamples=resamples)
    found: dict[str, dict[str, dict[str, Mean]]] = {score: {} for score in scores}
    for (score, target), inside, over_all in zip(pairs, within, pooled, strict=True):
        found[score][target] = {"within": inside, "pooled": over_all}
    return found
