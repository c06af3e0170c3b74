"""Compare held-out loss curves, and record an arm's own training loss."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lark.common.cache import read_json, write_text
from lark.comparison.comparison import compute_curve_mean
from lark.training.arms import Arm

OWN_LOSS = "training_loss.csv"

Curve = Sequence[Mapping[str, Any]]
"""Points of held-out loss, as in trained.json: `step`, `held_out/loss` (nats/token)."""


def find_steps_to(loss: float, curve: Curve) -> float:
    """Find the optimizer step at which the curve, linear between its points, first comes down to `loss` (nats/token);
    NaN if it never does.
    """
    step, value = _list_points(curve)
    below = np.flatnonzero(value <= loss)
    if not len(below):
        return math.nan
    i = int(below[0])
    if i == 0 or value[i - 1] == value[i]:
        return float(step[i])
    share = (value[i - 1] - loss) / (value[i - 1] - value[i])
    return float(step[i - 1] + share * (step[i] - step[i - 1]))


def compare_with_baseline(curve: Curve, baseline: Curve) -> dict[str, float]:
    """Compare two curves of one seed, whose variance is not estimated.

    area_ratio: mean held-out loss over training (`comparison.compute_curve_mean`) relative to the baseline's, below 1 =
    faster. final_ratio: the same of the losses at the end. steps_to_baseline: optimizer steps to the baseline's final
    held-out loss (NaN: never, or the baseline gained nothing). steps_ratio: that over the steps the baseline took.
    points: of the curve.
    """
    _, theirs = _list_points(baseline)
    step, ours = _list_points(curve)
    if not len(theirs) or not len(ours):
        return {"points": len(ours)}
    # A baseline that ends where it began, or worse, sets no goal: every curve is there before its first step.
    reached = find_steps_to(float(theirs[-1]), curve) if theirs[-1] < theirs[0] else math.nan
    steps = float(_list_points(baseline)[0][-1])
    return {
        "area_ratio": compute_curve_mean(curve) / compute_curve_mean(baseline),
        "final_ratio": float(ours[-1] / theirs[-1]),
        "steps_to_baseline": reached,
        "steps_ratio": reached / steps if steps else math.nan,
        "points": len(step),
    }


def _list_points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """List steps and losses of the points that have both."""
    known = [(p["step"], p["held_out/loss"]) for p in curve if p.get("held_out/loss") is not None]
    step, loss = np.array(known, np.float64).reshape(-1, 2).T
    return step, loss


def compare_curves(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Compare the held-out loss curve of every arm that was trained with the baseline's, if there is one; beside it the
    arm's own training loss.
    """
    trained = [arm for arm in arms if arm.selection is not None and arm.is_trained]
    curves = {arm.name: read_json(arm.folder / "trained.json")["curve"] for arm in trained}
    return {
        arm.name: {"rule": arm.rule, "label": "one seed: its variance is not estimated"}
        | (compare_with_baseline(curves[arm.name], curves["baseline"]) if "baseline" in curves else {})
        | {"own_training_loss_not_comparable": measure_own_loss(arm.folder)}
        for arm in trained
    }


class TrainingLoss(Callback):
    """Keep an arm's own training loss (nats/token, weights 1 on average), a value an optimizer step, in
    training_loss.csv; it goes into checkpoints, so that an interrupted training has it whole.
    """

    def __init__(self, folder: Path):
        self.folder, self.losses = folder, {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.losses[trainer.global_step] = float(pl_module.losses.recent[-1])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.losses:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([("step", "train/loss"), *sorted(self.losses.items())])
            write_text(self.folder / OWN_LOSS, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = dict(state_dict["losses"])


def measure_own_loss(folder: Path, *, share: float = 0.1) -> dict[str, float]:
    """Measure L(t) / L(0) of an arm's own training loss: the mean over the last tenth of its optimizer steps over that
    of the
    first (nats/token both). Arms train on different data: not comparable between them. Empty if it was not recorded.
    """
    path = folder / OWN_LOSS
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        loss = np.array([float(row["train/loss"]) for row in csv.DictReader(file)])
    count = max(1, int(len(loss) * share))
    first, last = float(loss[:count].mean()), float(loss[-count:].mean())
    return {"first": first, "last": last, "ratio": last / first if first else math.nan, "steps": len(loss)}
