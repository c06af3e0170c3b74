"""Warm-up arms: a student trained shortly on a random share of the candidates, kept at the end of every epoch.

Rules such as LESS (arXiv 2402.04333, section 4.1) compare gradients at these checkpoints, with the optimizer's state. A
warm-up arm is cached like any other.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from lark.common.cache import read_json
from lark.common.groups import unit_hash
from lark.scoring.passes import GradientMatches
from lark.selection.selection import Selection
from lark.training.arms import Arm, make_arm
from lark.training.datamodule import TrajectoryDataModule, WarmUp

NAME = "warm_up"


def make_warm_up_arm(data: TrajectoryDataModule, wanted: GradientMatches, arms: Path) -> Arm:
    """Make the arm, not yet trained; its selection joins `data.selections` until it is."""
    data.selections[NAME] = _choose_at_random(data, wanted.warmup_share)
    recipe = data.recipe.for_epochs(wanted.epochs)
    steps = recipe.count_steps(len(data.selections[NAME].row))
    return make_arm(NAME, NAME, data, recipe=recipe, steps=steps, arms=arms, kept=wanted.epochs)


def _choose_at_random(data: TrajectoryDataModule, share: float) -> Selection:
    """Choose that share of the candidates, at least one, by hash and with equal weights."""
    pool, row = data.trajectories, data.scored
    draw_N = unit_hash(data.seed, pool.problem_id[row], pool.candidate_id[row], salt="warm-up")
    row = np.sort(row[np.argsort(draw_N)[: max(1, round(share * len(row)))]])
    problems, taken = np.unique(pool.problem_id[row].astype(str), return_counts=True)
    return Selection(
        row=row,
        q=np.full(len(row), 1 / len(row)),
        weight=np.ones(len(row)),
        score=np.zeros(len(row)),
        record={"rule": NAME, "counts": {"chosen": len(row)}, "tokens": int(pool.span_tokens[row].sum())},
        score_N=np.zeros(0),
        taken_by_problem=dict(zip(problems.tolist(), taken.tolist(), strict=True)),
    )


def list_epoch_ends(arm: Arm) -> list[int]:
    """List the optimizer steps after which an epoch of the warm-up arm is over; the last is its last step."""
    assert arm.selection is not None
    rows, epochs = len(arm.selection.row), int(arm.recipe.epochs)
    return [math.ceil(epoch * rows / arm.recipe.batch_size) for epoch in range(1, epochs + 1)]


def list_checkpoints(arm: Arm) -> tuple[tuple[Path, float], ...]:
    """List the kept checkpoints with the mean learning rate of each epoch."""
    ends = list_epoch_ends(arm)
    starts = [0, *ends[:-1]]
    return tuple(
        (
            arm.folder / "epochs" / f"{epoch}.ckpt",
            float(np.mean([arm.recipe.compute_rate(step, ends[-1]) for step in range(start, max(end, start + 1))])),
        )
        for epoch, (start, end) in enumerate(zip(starts, ends, strict=True), start=1)
    )


def is_warmed_up(arm: Arm) -> bool:
    """Say whether the arm is trained and all its checkpoints are still there."""
    return arm.is_trained and all(path.is_file() for path, _ in list_checkpoints(arm))


def read_warm_up(arm: Arm, data: TrajectoryDataModule) -> WarmUp:
    """Read what a trained warm-up arm left, and what it cost."""
    assert arm.selection is not None
    tokens = int(arm.recipe.epochs * data.trajectories.length[arm.selection.row].sum())
    seconds = read_json(arm.folder / "trained.json")["seconds"]
    cost = {"forward_tokens": tokens, "backward_tokens": tokens, "seconds": seconds}
    return WarmUp(checkpoints=list_checkpoints(arm), cost=cost)


class EpochSaver(Callback):
    """Keeps a checkpoint, optimizer state included, at the end of every epoch."""

    def __init__(self, arm: Arm):
        self.paths: dict[int, list[Path]] = {}  # several epochs may end at one step
        for end, (path, _) in zip(list_epoch_ends(arm), list_checkpoints(arm), strict=True):
            self.paths.setdefault(end, []).append(path)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        for path in self.paths.get(trainer.global_step, []):
            trainer.save_checkpoint(path)
