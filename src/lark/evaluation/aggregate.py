"""What the samples of an evaluation come to: metrics, their intervals, both by level."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric

from lark.answers.answer_clusters import cluster_answers
from lark.common.cache import write_json
from lark.comparison.inference import compute_mean_interval
from lark.evaluation.metrics import AverageAtK, MajorityAtK, PassAtK, ProblemMean
from lark.tasks.problems import read_level

Record = Mapping[str, Any]
NO_LEVEL = "none"
"""Stands for the level of the problems that have none, in a set where others do."""
_INTERVAL = ("estimate", "low", "high", "level", "problems", "label")
_PARTS = {"sets": "metrics", "intervals": "interval", "levels": "levels"}


def write_figures(folder: Path, identity: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> None:
    """metrics.json, from the `figures_of` every set."""
    parts = {
        part: {name: of_set[key] for name, of_set in figures.items() if of_set[key]} for part, key in _PARTS.items()
    }
    write_json(folder / "metrics.json", {"identity": identity, **parts})


def figures_of(
    records: Sequence[Record], problems: Sequence[Mapping[str, Any]], *, pass_at: Iterable[int], kind: str
) -> dict[str, Any]:
    """What a set's records come to.

    records: samples with their verdicts, in the order of the problems.
    kind: the checker's, of problems that name none themselves.

    Returns:
        metrics (`summarise`), interval (of avg@k; lark.comparison.inference), and levels: both by level, if any problem has one.
    """
    pass_at = tuple(pass_at)
    kinds = {problem["problem_id"]: problem.get("checker") or kind for problem in problems}
    several = {problem_id for problem_id, of_problem in kinds.items() if of_problem == "reasoning_gym"}

    def figures(part: Sequence[Record]) -> dict[str, Any]:
        return {"metrics": summarise(part, pass_at=pass_at, several_right=several), "interval": _interval(part)}

    level_by_problem = {problem["problem_id"]: read_level(problem) or NO_LEVEL for problem in problems}
    levels = sorted(set(level_by_problem.values()), key=_natural)
    by_level = {
        level: figures([record for record in records if level_by_problem[record["problem_id"]] == level])
        for level in levels
        if levels != [NO_LEVEL]
    }
    return {**figures(records), "levels": by_level}


def _natural(level: str) -> tuple[bool, float, str]:
    """Sorts numbers by value, then names, then what has no level."""
    try:
        return level == NO_LEVEL, float(level), ""
    except ValueError:
        return level == NO_LEVEL, float("inf"), level


def summarise(
    records: Sequence[Record], *, pass_at: Iterable[int] = (1,), several_right: Collection[str] = ()
) -> dict[str, float | int]:
    """Metrics of an evaluation's records, in the order of problems and samples.

    several_right: ids of the problems that may have several right answers (`lark.answers.answer_clusters`).

    Returns:
        avg@<samples>, pass@<k> for each k, maj@<samples>, boxed, stop, truncated (shares from 0 to 1), tokens (mean of
        a sample), timeouts and oversized (checks cut off, answers too long to be checked: both count as wrong),
        problems, and samples (per problem).

    Raises:
        LarkError: a k larger than the number of samples.
    """
    num_problems, num_samples = _shape(records)

    def column(name: str) -> torch.Tensor:
        return torch.tensor([record[name] for record in records]).view(num_problems, num_samples)

    local = {"sync_on_compute": False}  # the records are complete: other ranks need not take part
    correct = (column("correct"),)
    metrics: dict[str, tuple[Metric, tuple[torch.Tensor, ...]]] = {
        f"avg@{num_samples}": (AverageAtK(**local), correct),
        **{f"pass@{k}": (PassAtK(k, **local), correct) for k in pass_at},
        f"maj@{num_samples}": (MajorityAtK(**local), (_votes(records, several_right), *correct)),
        **{name: (ProblemMean(**local), (column(name),)) for name in ("boxed", "stop", "truncated")},
        "tokens": (ProblemMean(**local), (column("num_tokens"),)),
    }
    summary: dict[str, float | int] = {}
    for name, (metric, columns) in metrics.items():
        metric.update(*columns)
        summary[name] = float(metric.compute())
    counts = {"timeouts": "timed_out", "oversized": "oversized"}
    summary |= {name: sum(record[column] for record in records) for name, column in counts.items()}
    return summary | {"problems": num_problems, "samples": num_samples}


def _votes(records: Sequence[Record], several_right: Collection[str]) -> torch.Tensor:
    num_problems, num_samples = _shape(records)
    of_problem = [records[start : start + num_samples] for start in range(0, len(records), num_samples)]
    assert len(of_problem) == num_problems
    return torch.tensor(
        [
            cluster_answers(
                [record["answer"] for record in part],
                [record["correct"] for record in part],
                one_right=part[0]["problem_id"] not in several_right,
            )
            for part in of_problem
        ]
    )


def _interval(records: Sequence[Record]) -> dict[str, Any]:
    """Of avg@k, as metrics.json has it."""
    num_problems, num_samples = _shape(records)
    correct_PN = np.array([record["correct"] for record in records], np.float64).reshape(num_problems, num_samples)
    interval = compute_mean_interval(correct_PN.mean(1))
    return {"metric": f"avg@{num_samples}"} | {key: getattr(interval, key) for key in _INTERVAL}


def _shape(records: Sequence[Record]) -> tuple[int, int]:
    """Problems and samples a problem."""
    num_problems = len({record["problem_id"] for record in records})
    num_samples, rest = divmod(len(records), num_problems)
    assert rest == 0, f"{len(records)} samples of {num_problems} problems"
    return num_problems, num_samples
