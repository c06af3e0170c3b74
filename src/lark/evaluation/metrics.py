"""Metrics over samples, their intervals, and both by level.

Shapes: P problems, N samples a problem.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lark.answers.answer_clusters import cluster_answers
from lark.common.errors import LarkError
from lark.comparison.inference import compute_mean_interval
from lark.tasks.problems import read_level

Record = Mapping[str, Any]
NO_LEVEL = "none"
"""Level of the problems that have none, in a set where others do."""
_INTERVAL_FIELDS = ("estimate", "low", "high", "level", "problems", "label")


def average_at_k(correct_PN: Tensor) -> Tensor:
    """Compute the share of each problem's k = N samples that are correct, [P] in float64 (RSR, arXiv 2601.14249:
    Acc@4).
    """
    return correct_PN.to(torch.float64).mean(dim=1)


def pass_at_k(correct_PN: Tensor, k: int) -> Tensor:
    """Compute the probability that k of a problem's N samples, drawn without replacement, hold a correct one.

    1 - C(N - c, k) / C(N, k) with c correct samples: unbiased for the chance that k new samples contain one (Codex,
    arXiv 2107.03374, equation 1). Binomials are exact integers, so it neither overflows nor loses digits.

    Returns:
        [P] in float64.

    Raises:
        LarkError: k is below 1 or above N.
    """
    num_samples = correct_PN.shape[1]
    check_pass_at(k, num_samples)
    by_count = [1.0 - comb(num_samples - c, k) / comb(num_samples, k) for c in range(num_samples + 1)]
    table = torch.tensor(by_count, dtype=torch.float64, device=correct_PN.device)
    return table[correct_PN.to(torch.long).sum(dim=1)]


def majority_at_k(vote_PN: Tensor, correct_PN: Tensor) -> Tensor:
    """Compute the credit of the answer that most of a problem's k = N samples agree on, [P] in float64.

    1 if it is correct, else 0; of answers with equally many votes, the share that is correct, which is what drawing one
    of them would earn on average. Samples without an answer do not vote; a problem without any vote earns 0. (Majority
    voting over samples: self-consistency, arXiv 2203.11171.)

    Args:
        vote_PN: integers; within a problem, equal ones are the same answer, and negative ones no answer
            (`lark.answers.answer_clusters`).
        correct_PN: bool; what counts of an answer is the share of its samples that are correct.
    """
    assert vote_PN.shape == correct_PN.shape, f"{tuple(vote_PN.shape)} votes, {tuple(correct_PN.shape)} verdicts"
    votes_PN = vote_PN >= 0
    same_PNN = (vote_PN[:, :, None] == vote_PN[:, None, :]) & votes_PN[:, None, :]
    count_PN = same_PNN.sum(dim=2) * votes_PN
    # Every answer of the most votes has equally many samples: the mean over these is the mean over answers.
    tied_PN = votes_PN & (count_PN == count_PN.amax(dim=1, keepdim=True))
    return (tied_PN & correct_PN).sum(dim=1).double() / tied_PN.sum(dim=1).clamp(min=1)


def check_pass_at(k: int, num_samples: int) -> None:
    """Raise LarkError unless pass@k can be estimated from this number of samples."""
    if not 1 <= k <= num_samples:
        raise LarkError(
            f"evaluation.pass_at={k} must lie between 1 and evaluation.samples={num_samples}; "
            "lower it or draw more samples"
        )


def summarise_samples(
    records: Sequence[Record], problems: Sequence[Record], *, pass_at: Iterable[int], kind: str
) -> dict[str, Any]:
    """Compute metrics and interval of a set, both by level, and avg@k by problem.

    Args:
        records: samples with their verdicts, in the order of the problems.
        kind: the checker's, of problems that name none themselves.

    Returns:
        metrics (`compute_metrics`), interval (of avg@k; lark.comparison.inference), levels: both by level, if any
        problem has one; and per_problem: each problem's avg@k.
    """
    pass_at = tuple(pass_at)
    kinds = {row["problem_id"]: row.get("checker") or kind for row in problems}

    def summarise(part: Sequence[Record]) -> dict[str, Any]:
        metrics = compute_metrics(part, kinds, pass_at=pass_at)
        return {"metrics": metrics, "interval": _compute_interval(part)}

    level_by_problem = {problem["problem_id"]: read_level(problem) or NO_LEVEL for problem in problems}
    levels = sorted(set(level_by_problem.values()), key=_level_order)
    by_level = {
        level: summarise([record for record in records if level_by_problem[record["problem_id"]] == level])
        for level in levels
        if levels != [NO_LEVEL]
    }
    correct: dict[str, list[bool]] = {}
    for record in records:
        correct.setdefault(record["problem_id"], []).append(record["correct"])
    per_problem = {problem_id: float(np.mean(verdicts)) for problem_id, verdicts in correct.items()}
    return {**summarise(records), "levels": by_level, "per_problem": per_problem}


def compute_metrics(
    records: Sequence[Record], kinds: Mapping[str, str], *, pass_at: Iterable[int] = (1,)
) -> dict[str, float | int]:
    """Compute the metrics of records that are in the order of problems and samples.

    kinds: how each problem's answers are checked (`lark.answers.checker.KINDS`).

    Returns:
        avg@<samples>, pass@<k> for each k, maj@<samples>, boxed, answered, stop, truncated (shares from 0 to 1),
        tokens (mean of a sample), timeouts and oversized (checks cut off, answers too long to be checked: both count
        as wrong), problems, and samples (per problem).

    Raises:
        LarkError: a k larger than the number of samples.
    """
    num_problems, num_samples = _count_problems(records)

    def column(name: str) -> Tensor:
        return torch.tensor([record[name] for record in records]).view(num_problems, num_samples)

    correct_PN = column("correct")
    per_problem = {
        f"avg@{num_samples}": average_at_k(correct_PN),
        **{f"pass@{k}": pass_at_k(correct_PN, k) for k in pass_at},
        f"maj@{num_samples}": majority_at_k(_cluster_answers(records, num_samples, kinds), correct_PN),
        **{name: average_at_k(column(name)) for name in ("boxed", "stop", "truncated")},
        "answered": torch.tensor([r["answer"] is not None for r in records])
        .view(num_problems, -1)
        .double()
        .mean(dim=1),
        "tokens": average_at_k(column("num_tokens")),
    }
    metrics: dict[str, float | int] = {name: float(x_P.sum() / num_problems) for name, x_P in per_problem.items()}
    metrics |= {name: int(column(field).sum()) for name, field in _COUNTS.items()}
    return metrics | {"problems": num_problems, "samples": num_samples}


_COUNTS = {"timeouts": "timed_out", "oversized": "oversized"}


def _level_order(level: str) -> tuple[bool, float, str]:
    """Sort numbers by value, then names, then what has no level."""
    try:
        return level == NO_LEVEL, float(level), ""
    except ValueError:
        return level == NO_LEVEL, float("inf"), level


def _cluster_answers(records: Sequence[Record], num_samples: int, kinds: Mapping[str, str]) -> Tensor:
    """Number the distinct answers of each problem, [P, N]."""
    by_problem = [records[start : start + num_samples] for start in range(0, len(records), num_samples)]
    return torch.tensor(
        [
            cluster_answers(
                [record["answer"] for record in part],
                [record["correct"] for record in part],
                kinds[part[0]["problem_id"]],
            )
            for part in by_problem
        ]
    )


def _compute_interval(records: Sequence[Record]) -> dict[str, Any]:
    """Compute the interval of avg@k."""
    num_problems, num_samples = _count_problems(records)
    correct_PN = np.array([record["correct"] for record in records], np.float64).reshape(num_problems, num_samples)
    interval = compute_mean_interval(correct_PN.mean(1))
    return {"metric": f"avg@{num_samples}"} | {key: getattr(interval, key) for key in _INTERVAL_FIELDS}


def _count_problems(records: Sequence[Record]) -> tuple[int, int]:
    """Count problems, and samples a problem."""
    num_problems = len({record["problem_id"] for record in records})
    num_samples, rest = divmod(len(records), num_problems)
    assert rest == 0, f"{len(records)} samples of {num_problems} problems"
    return num_problems, num_samples
