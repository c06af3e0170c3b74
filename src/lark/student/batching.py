"""Rows to batches: the step sampler, plans of micro-batches, packed rows. A pure function of (rows, seed, step).

Shapes: X tokens of a packed row, N trained ones among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lark.common.errors import LarkError
from lark.common.groups import Groups
from lark.student.attention import PrefixTree, build_prefix_tree
from lark.student.chat import TokenizedTrajectory
from lark.student.transfer import copy_to_device


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Trajectories laid out as one row for one forward pass, and the tokens that count.

    `tree` says which tokens belong to which trajectory; None: there is one trajectory, for any student's attention.
    `predict_N` indexes the hidden states [X] that predict `target_N`, `observed_N` those that have seen it; `row_N` and
    `position_N` say which trajectory of the micro-batch, and which place in its span, that is; `end_of_turn_R` is the
    place of each one's end-of-turn token (-1: cut off). `encoded` are the trajectories.
    """

    input_ids_1X: Tensor
    position_ids_1X: Tensor | None
    predict_N: Tensor
    target_N: Tensor
    observed_N: Tensor
    row_N: Tensor
    position_N: Tensor
    end_of_turn_R: Tensor
    encoded: tuple[TokenizedTrajectory, ...]
    rows: tuple[int, ...]
    tree: PrefixTree | None = None

    @property
    def tokens(self) -> int:
        """Count the tokens computed; those that trajectories share once."""
        return self.input_ids_1X.numel()

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to `device`."""
        moved = {name: copy_to_device(x, device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved, tree=None if self.tree is None else self.tree.to(device))


def pack_rows(encoded: Sequence[TokenizedTrajectory], rows: Sequence[int], *, share: bool = True) -> MicroBatch:
    """Lay out `encoded`, whose ids are `rows`, as one packed row; what they begin alike with is there once."""
    ids_X, depths_X, tree, paths = build_prefix_tree([row.input_ids for row in encoded], share=share)
    return _lay_out(encoded, rows, paths, ids_X, depths_X, tree)


def lay_out_row(row: TokenizedTrajectory, number: int) -> MicroBatch:
    """Lay out one trajectory, whose id is `number`, for any student's attention."""
    ids_X, path = torch.tensor(row.input_ids, dtype=torch.int64), np.arange(len(row.input_ids))
    return _lay_out([row], [number], [path], ids_X, None, None)


def _lay_out(
    encoded: Sequence[TokenizedTrajectory],
    rows: Sequence[int],
    paths: Sequence[np.ndarray],
    ids_X: Tensor,
    depths_X: Tensor | None,
    tree: PrefixTree | None,
) -> MicroBatch:
    """Find the scored tokens of trajectories whose tokens stand at `paths` of the row."""
    firsts = [max(row.prompt_tokens, 1) for row in encoded]  # nothing predicts the very first token
    observed = [path[first:] for path, first in zip(paths, firsts, strict=True)]
    observed_N = torch.from_numpy(np.concatenate(observed))
    positions = [
        np.arange(first, len(row.input_ids)) - row.prompt_tokens for row, first in zip(encoded, firsts, strict=True)
    ]
    return MicroBatch(
        input_ids_1X=ids_X[None],
        position_ids_1X=None if depths_X is None else depths_X[None],
        predict_N=torch.from_numpy(np.concatenate([p[first - 1 : -1] for p, first in zip(paths, firsts, strict=True)])),
        target_N=ids_X[observed_N],
        observed_N=observed_N,
        row_N=torch.from_numpy(np.repeat(np.arange(len(encoded)), [len(span) for span in observed])),
        position_N=torch.from_numpy(np.concatenate(positions)),
        end_of_turn_R=torch.tensor([row.end_of_turn for row in encoded]),
        encoded=tuple(encoded),
        rows=tuple(rows),
        tree=tree,
    )


def draw_step_rows(rows: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Draw the row numbers of optimizer step `step`'s global batch: consecutive parts of one permutation an epoch,
    seeded by `seed`.
    """
    if not batch_size >= 1:
        raise LarkError(f"sft.batch_size={batch_size} trains nothing; set it to at least 1 trajectory")
    wanted = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = wanted // rows
    batch = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, int(epoch)])).permutation(rows)
        inside = epochs == epoch
        batch[inside] = order[wanted[inside] % rows]
    return batch


def take_rank_rows(batch: np.ndarray, lengths: np.ndarray, *, rank: int, world: int) -> np.ndarray:
    """Take this rank's part of a global batch: every world-th row by length, for equal work and widths."""
    return batch[np.argsort(-lengths[batch], kind="stable")][rank::world]


def plan_alone(lengths: np.ndarray) -> list[np.ndarray]:
    """Plan micro-batches of one row each, the longest first. Returns indices into `lengths`."""
    return list(np.argsort(-lengths, kind="stable")[:, None])


def plan_packed(lengths: np.ndarray, *, budget: int) -> list[np.ndarray]:
    """Plan micro-batches of packed rows by best-fit-decreasing, each of at most `budget` tokens (a longer row goes
    alone). Returns indices into `lengths`.
    """
    order = np.argsort(-lengths, kind="stable")
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order.tolist():
        fitting = [b for b, free in enumerate(room) if free >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
        else:
            best = len(bins)
            bins.append([])
            room.append(budget)
        bins[best].append(index)
        room[best] -= int(lengths[index])
    return [np.array(rows) for rows in bins]


def plan_consecutive(lengths: np.ndarray, *, budget: int) -> list[np.ndarray]:
    """Plan micro-batches of rows in their order, each of at most `budget` tokens (a longer row goes alone)."""
    parts, start, tokens = [], 0, 0
    for i, length in enumerate(lengths.tolist()):
        if i > start and tokens + length > budget:
            parts.append(np.arange(start, i))
            start, tokens = i, 0
        tokens += length
    return [*parts, np.arange(start, len(lengths))] if len(lengths) else []


def plan_prefix_units(
    problem_id: np.ndarray, lengths: np.ndarray, spans: np.ndarray, *, budget: int
) -> list[np.ndarray]:
    """Plan units of at most `budget` tokens, a prompt counted once for the rows of its problem (a longer row goes
    alone). Problems stay together where they fit, those of similar length next to each other, the longest first.

    problem_id, lengths, spans: [N], `spans` being the tokens after the prompt. Returns indices into them.
    """
    problems = [rows[np.argsort(-lengths[rows], kind="stable")] for rows in Groups.from_ids(problem_id).split()]
    units: list[list[int]] = []
    room = 0
    for rows in sorted(problems, key=lambda rows: -lengths[rows[0]]):
        prompt = int(lengths[rows[0]] - spans[rows[0]])
        together = prompt + int(spans[rows].sum())
        if together <= room:
            units[-1] += rows.tolist()
            room -= together
            continue
        room = 0
        for row in rows.tolist():
            if spans[row] > room:
                units.append([])
                room = budget - prompt
            units[-1].append(row)
            room -= int(spans[row])
    return [np.array(unit) for unit in units]


def compute_loss_coefficients(
    row_tokens: np.ndarray, weights: np.ndarray, *, average: str, total_rows: int, total_weighted_tokens: float
) -> np.ndarray:
    """Compute what each row's summed surprisal is multiplied by so that the products add up to the step's loss, [R].

    average="trajectory": w_i / (|G| T_i), the weighted mean over trajectories of the mean over their tokens.
    average="token": w_i / sum over G of w_j T_j, the weighted mean over tokens.
    Both denominators are the global batch's (`total_rows` = |G|), never the micro-batch's.
    """
    if average == "trajectory":
        return weights / (total_rows * row_tokens)
    if average == "token":
        return weights / total_weighted_tokens
    raise LarkError(f"sft.average={average!r} is unknown; set it to trajectory or token")


def compute_problem_mean_coefficients(problem_id: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Compute coefficients [R] that average a row's value over its problem's masked rows, then over problems."""
    _, problem, rows = np.unique(problem_id[mask].astype(str), return_inverse=True, return_counts=True)
    result = np.zeros(len(problem_id))
    result[mask] = 1 / (rows[problem] * len(rows))
    return result
