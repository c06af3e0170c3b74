"""The batches of training and of the held-out loss: pure functions of the selection, the seed and the step.

Shapes: R rows (trajectories), C sets of coefficients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from lark.common.groups import unit_hash
from lark.selection.selection import Selection
from lark.student.batching import (
    compute_loss_coefficients,
    compute_problem_mean_coefficients,
    draw_step_rows,
    take_rank_rows,
)
from lark.student.chat import TokenizedTrajectory
from lark.student.tokenized_pool import TokenizedPool
from lark.training.recipe import Recipe

HELD_OUT_ROWS = 64  # a rank reads at a time


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rank's part of a global batch, not yet cut into micro-batches.

    encoded: the tokens of its rows [R]. coefficient_CR: what their summed surprisals are multiplied by: training has
    one set, held-out loss one per figure. names: "problem/candidate", for messages.
    lengths_by_rank: tokens of the rows of every rank, from which each can tell how many micro-batches another makes.
    effective: effective sample size of the weights in the global batch, (sum w)^2 / sum w^2, in trajectories.
    mean_weight: what the step's loss is to be divided by to compare it with that of other steps.
    """

    rows: np.ndarray
    encoded: list[TokenizedTrajectory]
    coefficient_CR: np.ndarray
    names: tuple[str, ...]
    lengths_by_rank: tuple[np.ndarray, ...]
    effective: float = 0.0
    mean_weight: float = 1.0

    def to(self, device: torch.device, **_: Any) -> "Step":
        return self  # its micro-batches move one by one

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.input_ids) for row in self.encoded], np.int64)

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss; nothing predicts a row's very first."""
        return sum(len(row.input_ids) - max(row.prompt_tokens, 1) for row in self.encoded)


class StepStream(IterableDataset):
    """Gives a Trainer the steps that `iterate` yields. As it is iterable, no Trainer divides it among the ranks
    again.
    """

    def __init__(self, iterate: Callable[[], Iterator[Step]]):
        self.iterate = iterate

    def __iter__(self) -> Iterator[Step]:
        return self.iterate()


def make_training_step(
    pool: TokenizedPool,
    selection: Selection,
    recipe: Recipe,
    *,
    seed: int,
    number: int,
    rank: int = 0,
    world: int = 1,
) -> Step:
    """Compute optimizer step `number` (from 0) of this rank."""
    weights = selection.weight if recipe.weighted else np.ones(len(selection.row))
    batch = draw_step_rows(len(selection.row), recipe.batch_size, seed=seed, step=number)
    trained = pool.span_tokens[selection.row].astype(np.float64)
    lengths = pool.length[selection.row]
    shares = [take_rank_rows(batch, lengths, rank=i, world=world) for i in range(world)]
    mine = shares[rank]
    coefficient_R = compute_loss_coefficients(
        trained[mine],
        weights[mine],
        average=recipe.average,
        total_rows=len(batch),
        total_weighted_tokens=float((weights[batch] * trained[batch]).sum()),
    )
    return _make_step(
        pool,
        selection.row[mine],
        coefficient_R[None],
        tuple(lengths[share] for share in shares),
        effective=float(weights[batch].sum() ** 2 / np.square(weights[batch]).sum()),
        mean_weight=float(weights[batch].mean()) if recipe.average == "trajectory" else 1.0,
    )


def _make_step(
    pool: TokenizedPool,
    rows: np.ndarray,
    coefficient_CR: np.ndarray,
    lengths_by_rank: tuple[np.ndarray, ...],
    **facts: float,
) -> Step:
    return Step(
        rows=rows,
        encoded=pool.read_tokens(rows) if len(rows) else [],
        coefficient_CR=coefficient_CR,
        names=tuple(f"{pool.problem_id[row]}/{pool.candidate_id[row]}" for row in rows.tolist()),
        lengths_by_rank=lengths_by_rank,
        **facts,
    )


def sample_held_out(pool: TokenizedPool, limit: int | None) -> np.ndarray:
    """Find the held-out rows that fit, ascending; where more than `limit`, that many by the hash of their ids."""
    row = pool.find_held_out()
    if limit is None or len(row) <= limit:
        return row
    draw_R = unit_hash(0, pool.problem_id[row], pool.candidate_id[row], salt="held-out curve")
    return np.sort(row[np.argsort(draw_R, kind="stable")[:limit]])


def compute_held_out_coefficients(pool: TokenizedPool, row: np.ndarray) -> np.ndarray:
    """Compute coefficients [C, R] of held-out rows whose sums of coefficient * surprisal are held-out losses
    (nats/token): [0] the mean over problems of the mean L of their candidates, [1] the same over their correct
    candidates (zeros when none is known to be correct).
    """
    sets = [np.ones(len(row), bool), pool.correct[row] == 1]
    means = [compute_problem_mean_coefficients(pool.problem_id[row], mask) for mask in sets]
    return np.array(means) / pool.span_tokens[row]


def iterate_held_out_steps(
    pool: TokenizedPool, row: np.ndarray, coefficients_CR: np.ndarray, *, rank: int, world: int
) -> Iterator[Step]:
    """Yield this rank's batches of the held-out rows; as many as every other rank's."""
    order = np.argsort(-pool.length[row], kind="stable")
    for start in range(0, len(order), HELD_OUT_ROWS * world):
        batch = order[start : start + HELD_OUT_ROWS * world]
        shares = [batch[i::world] for i in range(world)]
        mine = shares[rank]
        yield _make_step(pool, row[mine], coefficients_CR[:, mine], tuple(pool.length[row[share]] for share in shares))
