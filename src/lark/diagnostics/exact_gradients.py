"""Take exact gradients of a sample's trajectories, and the loss after a step along each: what proxies are judged by.

The pass is `lark.scoring.gradient_passes`' Gram matrix and loss drop from one backward pass a trajectory, with the drop
at half the step beside it.

Shapes: N candidates, K of one problem, d parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lark.common.cache import identity_hash, is_complete, read_json
from lark.common.groups import Groups, unit_hash
from lark.common.log import logger
from lark.common.ranks import Claim
from lark.common.table_cache import Columns, read_columns
from lark.scoring.gradient_passes import GradientModule
from lark.scoring.gradients import (
    compute_flat_gradients,
    compute_gram,
    compute_mean_surprisal,
    step_and_restore,
)
from lark.scoring.pass_module import PassInputs, run_pass
from lark.scoring.passes import Gradients, HeadGradients, LossDrops, Pass, Statistics
from lark.selection.candidates import Candidates
from lark.student.student import Student
from lark.training.datamodule import TrajectoryDataModule


@dataclass(frozen=True, kw_only=True)
class ExactGradients(Gradients):
    """Columns: those of `Gradients`; loss_before (L, nats/token); drop and drop_half, (L(theta) - L(theta - e grad L))
    / e at e = eta and eta / 2 (nats/token per unit of step).
    """

    module = "lark.diagnostics.exact_gradients:ExactGradientsModule"

    eta: float = 1e-3


class ExactGradientsModule(GradientModule):
    """Always in float32: bfloat16 would round a small step away. Memory: the float32 gradients of one problem's
    candidates, 4 K d bytes, and the parameters that move once more.
    """

    wanted: ExactGradients

    @classmethod
    def resolve_dtype(cls, student: Student, device: torch.device) -> torch.dtype:
        return torch.float32

    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        model, chosen, eta = self.student_model, self.parameters_in_use, self.wanted.eta
        batch = self.collate_each(rows)
        gradient_Kd = compute_flat_gradients(model, batch, chosen)
        pieces = gradient_Kd.split([p.numel() for _, p in chosen], 1)
        gram_KK = np.sum([compute_gram(piece_Kp).numpy() for piece_Kp in pieces], axis=0)
        found = []
        for i, micro in enumerate(batch):
            before, drops = compute_mean_surprisal(model, micro), []
            pieces = gradient_Kd[i].split([p.numel() for _, p in chosen])
            along = [piece.view_as(p) for piece, (_, p) in zip(pieces, chosen, strict=True)]
            for step in (eta, eta / 2):
                with step_and_restore(chosen, along, step):
                    drops.append((before - compute_mean_surprisal(model, micro)) / step)
            found.append(
                {
                    "row": micro.rows[0],
                    "forward_tokens": 4 * micro.tokens,
                    "backward_tokens": micro.tokens,
                    "squared_norm": gram_KK[i, i],
                    "gram": gram_KK[i],
                    "gram_rows": rows,
                    "loss_before": before,
                    "drop": drops[0],
                    "drop_half": drops[1],
                }
            )
        return found


def measure_sample(
    data: TrajectoryDataModule, wanted: ExactGradients, claim: Claim, *, problems: int
) -> Candidates | None:
    """Measure the candidates of `problems` problems: statistics, head gradients and exact gradients (all ranks take
    part); None where no problem has more candidates than the budget.
    """
    pool = data.trajectories
    rows = sample_rows(pool.problem_id[data.scored], budget=find_budget(data), problems=problems)
    if not len(rows):
        return None
    row_N = data.scored[rows]
    if Statistics() in data.needs:
        statistics = data.candidates.where(np.isin(data.candidates.row_N, row_N)).statistics
    else:
        statistics = measure_rows(data, Statistics(), row_N, claim)[0].without("row")
    head, _ = measure_rows(data, HeadGradients(), row_N, claim)
    columns, _ = measure_rows(data, wanted, row_N, claim)
    sample = Candidates(
        problem_id=pool.problem_id[row_N],
        candidate_id=pool.candidate_id[row_N],
        row_N=row_N,
        statistics=statistics,
        read_column=pool.column,
        passes={HeadGradients(): head.without("row")},
    )
    return add_exact_columns(sample, wanted, columns.without("row"))


def find_budget(data: TrajectoryDataModule) -> int:
    """Find the selector's budget, else the baseline's, else 1 (trajectories a problem)."""
    return next((rule.policy.budget for rule in data.rules.values() if rule.policy.budget is not None), 1)


def sample_rows(problem_id_N: np.ndarray, *, budget: int, problems: int) -> np.ndarray:
    """Draw `problems` whole problems with more than `budget` candidates, by hash of their id; return their rows,
    ascending.
    """
    groups = Groups.from_ids(problem_id_N)
    ids = np.array(list(dict.fromkeys(problem_id_N.tolist())), object)
    choice = np.flatnonzero(groups.size > budget)
    draw = unit_hash(0, ids[choice], ["problem"] * len(choice), salt="agreement")
    return np.flatnonzero(np.isin(groups.index_N, choice[np.argsort(draw)[:problems]]))


def measure_rows(
    data: TrajectoryDataModule, wanted: Pass, row_N: np.ndarray, claim: Claim
) -> tuple[Columns, dict[str, Any]]:
    """Run a pass over these rows of the pool alone, or find it cached (all ranks take part); return its columns, of
    statistics with their means, and its manifest.
    """
    inputs = PassInputs(
        student=data.scorer, settings=data.probe, pool=data.scored_trajectories, rows=row_N, seed=data.seed
    )
    identity = data.pass_identity(wanted, inputs)
    folder: Path = data.cache / "diagnostics" / identity_hash(identity)
    label = wanted.name.replace("_", " ")
    with claim(f"diagnostics {wanted.name}", folder, partial(is_complete, folder)) as to_do:
        logger.info("%s of %s trajectories: %s", label, f"{len(row_N):,}", "run" if to_do else "cached")
        if to_do:
            module = wanted.load_module()(wanted=wanted, inputs=inputs, folder=folder)
            run_pass(data.make_trainer(label), module, identity)
    return read_columns(folder), read_json(folder / "manifest.json")


def add_exact_columns(candidates: Candidates, wanted: ExactGradients, columns: Mapping[str, np.ndarray]) -> Candidates:
    """Add the columns of the exact pass, under its name and under those of the passes that it stands for, so that the
    rules which ask for these can be called.
    """
    known = {
        wanted: columns,
        Gradients(parameters=wanted.parameters): columns,
        LossDrops(parameters=wanted.parameters, eta=wanted.eta): columns,
    }
    return replace(candidates, passes={**candidates.passes, **known})
