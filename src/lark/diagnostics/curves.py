"""What a held-out loss curve says of speed, and a record of an arm's own training loss."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lark.common.cache import write_text
from lark.comparison.comparison import compute_curve_mean

OWN_LOSS = "training_loss.csv"

Curve = Sequence[Mapping[str, Any]]
"""Points of held-out loss, as in trained.json: `step`, `held_out/loss` (nats/token)."""


def steps_to(loss: float, curve: Curve) -> float:
    """The optimizer step at which the curve, linear between its points, first comes down to `loss` (nats/token); NaN if
    it never does.
    """
    step, value = _points(curve)
    below = np.flatnonzero(value <= loss)
    if not len(below):
        return math.nan
    i = int(below[0])
    if i == 0 or value[i - 1] == value[i]:
        return float(step[i])
    share = (value[i - 1] - loss) / (value[i - 1] - value[i])
    return float(step[i - 1] + share * (step[i] - step[i - 1]))


def against_baseline(curve: Curve, baseline: Curve) -> dict[str, float]:
    """area_ratio: mean held-out loss over training (`comparison.compute_curve_mean`) relative to the baseline's, below 1 =
    faster; final_ratio: the same of the losses at the end; steps_to_baseline: optimizer steps to the baseline's final
    held-out loss (NaN: never), and steps_ratio, that over the steps the baseline took; points: of the curve. One seed:
    its variance is not estimated.
    """
    _, theirs = _points(baseline)
    step, ours = _points(curve)
    if not len(theirs) or not len(ours):
        return {"points": len(ours)}
    reached = steps_to(float(theirs[-1]), curve)
    steps = float(_points(baseline)[0][-1])
    return {
        "area_ratio": compute_curve_mean(curve) / compute_curve_mean(baseline),
        "final_ratio": float(ours[-1] / theirs[-1]),
        "steps_to_baseline": reached,
        "steps_ratio": reached / steps if steps else math.nan,
        "points": len(step),
    }


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of the points that have both."""
    known = [(p["step"], p["held_out/loss"]) for p in curve if p.get("held_out/loss") is not None]
    step, loss = np.array(known, np.float64).reshape(-1, 2).T
    return step, loss


class TrainingLoss(Callback):
    """Keeps an arm's own training loss (nats/token, weights 1 on average), a value an optimizer step, in
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


def own_loss_ratio(folder: Path, *, share: float = 0.1) -> dict[str, float]:
    """L(t) / L(0) of an arm's own training loss: the mean over the last tenth of its optimizer steps over that of the
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
