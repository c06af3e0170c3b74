"""The batches of training and of the held-out loss: pure functions of the selection, the seed and the step.

Shapes: R rows (trajectories), C sets of coefficients.
"""

import numpy as np
import torch

from lark.packing import coefficients, collate, micro_batches, problem_mean_coefficients, rank_share, step_rows
from lark.selection import Selection
from lark.student import Recipe, Step
from lark.trajectories import Trajectories


def training_step(
    pool: Trajectories, selection: Selection, recipe: Recipe, *, seed: int, number: int, rank: int = 0, world: int = 1
) -> Step:
    """Optimizer step `number` as this rank computes it."""
    weights = selection.weight if recipe.weighted else np.ones(len(selection.row))
    batch = step_rows(len(selection.row), recipe.batch_size, seed=seed, step=number)
    trained = pool.span_tokens[selection.row].astype(np.float64)
    mine = rank_share(batch, pool.length[selection.row], rank=rank, world=world)
    coefficient_R = coefficients(
        trained[mine],
        weights[mine],
        average=recipe.average,
        total_rows=len(batch),
        total_weighted_tokens=float((weights[batch] * trained[batch]).sum()),
    )
    return _laid_out(pool, selection.row[mine], coefficient_R[None], recipe)


def _laid_out(pool: Trajectories, rows: np.ndarray, coefficient_CR: np.ndarray, recipe: Recipe) -> Step:
    packed = recipe.layout == "packed"
    cuts = micro_batches(pool.length[rows], budget=recipe.micro_batch_tokens, packed=packed)
    micro = [collate(pool.encoded(rows[cut]), rows[cut].tolist(), packed=packed) for cut in cuts]
    return Step(
        micro=micro,
        names=tuple(f"{pool.problem_id[row]}/{pool.candidate_id[row]}" for row in rows.tolist()),
        coefficients_CR=[torch.tensor(coefficient_CR[:, cut], dtype=torch.float32) for cut in cuts],
        trained_tokens=sum(len(m.target_N) for m in micro),
        computed_tokens=sum(m.tokens for m in micro),
    )


def held_out_coefficients(pool: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """Held-out rows [R] that fit, and coefficients [C, R] whose sums of coefficient * surprisal are the held-out
    losses (nats/token): [0] the mean over problems of the mean L of their candidates, [1] the same over their
    correct candidates (zeros when none is known to be correct).
    """
    row = np.flatnonzero(pool.fits & pool.is_held_out)
    sets = [np.ones(len(row), bool), pool.correct[row] == 1]
    means = [problem_mean_coefficients(pool.problem_id[row], mask) for mask in sets]
    return row, np.array(means) / pool.span_tokens[row]


def held_out_steps(
    pool: Trajectories, row: np.ndarray, coefficients_CR: np.ndarray, *, recipe: Recipe, rank: int, world: int
) -> list[Step]:
    """This rank's batches of the held-out rows; as many as every other rank's, since data-parallel wrappers
    synchronise at every batch.
    """
    cuts = micro_batches(pool.length[row], budget=recipe.micro_batch_tokens)
    steps = [_laid_out(pool, row[cut], coefficients_CR[:, cut], recipe) for cut in cuts[rank::world]]
    empty = Step(micro=[], coefficients_CR=[], trained_tokens=0, computed_tokens=0)
    return steps + [empty] * (-(-len(cuts) // world) - len(steps))
