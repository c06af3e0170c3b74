"""The full diagnostics before training: a sample of problems whose candidates are followed exactly, and its figures."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lark.common.groups import Groups, unit_hash
from lark.common.ranks import Claim
from lark.diagnostics import fidelity
from lark.diagnostics.exact_gradients import ExactGradients, measured
from lark.scoring.passes import HeadGradients, Statistics
from lark.selection.candidates import Candidates
from lark.training.datamodule import TrajectoryDataModule


def measure_sample(
    data: TrajectoryDataModule, wanted: ExactGradients, claim: Claim, *, problems: int
) -> tuple[Candidates | None, dict[str, Any]]:
    """The sampled problems' candidates with statistics, head gradients and exact gradients, and the manifest of the
    exact pass; None where no problem has more candidates than the budget.
    """
    pool = data.trajectories
    rows = sample_rows(pool.problem_id[data.scored], budget=budget_of(data), problems=problems)
    if not len(rows):
        return None, {}
    row_N = data.scored[rows]
    if Statistics() in data.needs:
        statistics = data.candidates.where(np.isin(data.candidates.row_N, row_N)).statistics
    else:
        columns, _ = measured(data, Statistics(), row_N, claim)
        statistics = columns.without("row")
    head, _ = measured(data, HeadGradients(), row_N, claim)
    columns, manifest = measured(data, wanted, row_N, claim)
    sample = Candidates(
        problem_id=pool.problem_id[row_N],
        candidate_id=pool.candidate_id[row_N],
        row_N=row_N,
        statistics=statistics,
        read_column=pool.column,
        passes={HeadGradients(): head.without("row")},
    )
    return fidelity.with_truth(sample, wanted, columns.without("row")), manifest


def sample_rows(problem_id_N: np.ndarray, *, budget: int, problems: int) -> np.ndarray:
    """Draw `problems` whole problems with more than `budget` candidates, by hash of their id; return their rows,
    ascending.
    """
    groups = Groups.from_ids(problem_id_N)
    ids = np.array(list(dict.fromkeys(problem_id_N.tolist())), object)
    choice = np.flatnonzero(groups.size > budget)
    draw = unit_hash(0, ids[choice], ["problem"] * len(choice), salt="agreement")
    return np.flatnonzero(np.isin(groups.index_N, choice[np.argsort(draw)[:problems]]))


def budget_of(data: TrajectoryDataModule) -> int:
    """The selector's budget, else the baseline's, else 1."""
    return next((rule.policy.budget for rule in data.rules.values() if rule.policy.budget is not None), 1)


def of_sample(
    sample: Candidates,
    wanted: ExactGradients,
    manifest: Mapping[str, Any],
    data: TrajectoryDataModule,
    *,
    average: str,
    resamples: int,
    tolerance: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of `full` before training, and a row a candidate of the sample."""
    budget = budget_of(data)
    truth = fidelity.truths(sample, wanted, average=average)
    scores = fidelity.proxies(sample, average=average)
    inside_N = np.isin(data.candidates.row_N, sample.row_N)
    for role, rule in data.rules.items():
        if role in data.selections:
            own_N = data.selections[role].score_N[inside_N]
            if not any(np.allclose(own_N, known_N, equal_nan=True) for known_N in scores.values()):
                scores[f"{rule.name} ({role})"] = own_N
    among = {"rho": truth["rho"], "g": truth["g"]}
    compare = partial(fidelity.against, candidates=sample, budget=budget, seed=data.seed, resamples=resamples)
    columns = sample.of(wanted)
    found = {
        "problems": sample.groups.count,
        "candidates": len(sample),
        "of_problems": data.candidates.groups.count,
        "budget": budget,
        "parameters": wanted.parameters,
        "average": average,
        "lora": data.scorer.lora is not None and wanted.parameters == "trained",
        "step": fidelity.step_check(sample, wanted, tolerance=tolerance),
        "proxies": compare(scores, truth),
        "truths": compare(among, {name: truth[name] for name in ("loss_drop", "g")}),
        "kappa": fidelity.kappas(sample, wanted, manifest["choices"]["groups"], resamples=resamples),
        "kappa_by_teacher": fidelity.kappa_by_teacher(sample, wanted),
        "cosine": fidelity.cosines(sample, columns, resamples=resamples),
    }
    ids = {name: sample[name] for name in ("problem_id", "candidate_id", "teacher", "correct", "num_tokens")}
    shown = {**ids, "loss": sample["loss"], "brier": sample["brier"], "squared_norm": columns["squared_norm"]}
    shown |= {f"exact_{name}": values for name, values in truth.items()} | scores
    lists = {name: values.tolist() for name, values in shown.items()}
    return found, [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
