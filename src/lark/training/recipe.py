"""The recipe: how a student is trained, the same for every arm."""

import math
from dataclasses import dataclass, replace
from typing import Any

from lark.common.errors import LarkError
from lark.scoring.passes import check_average

_NO_RESULT = ("checkpoint_every", "epochs", "steps", "spike", "micro_batch_tokens", "validations")
"""Settings of a recipe that change no student, or do so by the number of steps alone."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Describes how a student is trained; the same for every arm and independent of the number of devices.

    steps: optimizer steps; null = as many as `epochs` passes over the selector's choice take.
    batch_size: trajectories of a step's global batch.
    lr: peak learning rate.
    warmup: share of the steps.  schedule: cosine | constant (after the warm-up).
    weight_decay, betas: AdamW's.  clip: largest gradient norm.
    average: trajectory (sum_k q_k L_k) | token.  weighted: false trains the same rows with weights 1.
    micro_batch_tokens: tokens of one forward-backward pass; null = as memory allows. Where memory
        does run out, it is halved and the step is done again.
    spike: a step whose loss exceeds this many times the median of the steps before it stops training; null = none does.
    validations: held-out evaluations over the run.  checkpoint_every: optimizer steps.
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 64
    lr: float = 1e-5
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    average: str = "trajectory"
    weighted: bool = True
    micro_batch_tokens: int | None = None
    spike: float | None = 10.0
    validations: int = 20
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        check_average(self.average, "sft.average")
        known = {
            "schedule": ("cosine", "constant"),
        }
        for name, options in known.items():
            if getattr(self, name) not in options:
                raise LarkError(f"sft.{name}={getattr(self, name)!r} is unknown; set it to {' or '.join(options)}")
        for name in ("batch_size", "validations", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise LarkError(f"sft.{name}={getattr(self, name)} is too small; set it to at least 1")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise LarkError(
                f"sft.micro_batch_tokens={self.micro_batch_tokens} is too small; set it to at least 1, or null to have "
                "it follow from memory"
            )
        if self.spike is not None and not self.spike > 1:
            raise LarkError(f"sft.spike={self.spike} would stop at any loss; set it above 1, or null to never stop")
        if self.steps is not None and self.steps < 1:
            raise LarkError(f"sft.steps={self.steps} trains nothing; set it to at least 1, or null to use sft.epochs")
        for name in ("lr", "epochs", "clip"):
            if not getattr(self, name) > 0:
                raise LarkError(f"sft.{name}={getattr(self, name)} must be above 0; set it to a positive number")
        if not 0 <= self.warmup < 1:
            raise LarkError(f"sft.warmup={self.warmup} is not a share of the steps; set it from 0 to below 1")

    def identity(self) -> dict[str, Any]:
        """Name what a student that is trained for so many steps depends on."""
        settings = {name: value for name, value in vars(self).items() if name not in _NO_RESULT}
        return settings | {"betas": list(self.betas)}

    def compute_rate(self, step: int, steps: int) -> float:
        """Compute the learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then the schedule."""
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return self.lr * (1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * progress)))

    def for_epochs(self, epochs: int) -> "Recipe":
        """Derive the recipe of a warm-up arm: so many epochs, all rows alike, without a held-out curve."""
        return replace(self, steps=None, epochs=float(epochs), validations=1, weighted=False)

    def count_visits(self, trajectories: int, steps: int) -> tuple[int, int]:
        """Count how often a trajectory is drawn in so many steps: the least and the most."""
        drawn = steps * self.batch_size
        return drawn // trajectories, -(-drawn // trajectories)

    def count_steps(self, trajectories: int) -> int:
        """Count the optimizer steps of a run whose selector chose `trajectories`."""
        return self.steps or max(1, math.ceil(self.epochs * trajectories / self.batch_size))
