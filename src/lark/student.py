"""SFTModule: weighted supervised fine-tuning, one training_step = one optimizer step.

A step's loss is sum_N coefficient_N * surprisal_N over the whole global batch. The coefficients already carry weights
and denominators (see packing.coefficients), so micro-batches and ranks only add up; weights act at any micro-batch
size. Gradients are synchronised at the last micro-batch of a step.
"""

import csv
import hashlib
import io
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lark.cache import write_text
from lark.models import Student, head_of, hidden_states
from lark.packing import MicroBatch
from lark.stats import weighted_surprisal

_NO_RESULT = ("checkpoint_every", "epochs", "steps", "lr_sweep")
"""Settings of a recipe that change no student, or do so by the number of steps and the rate chosen."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is trained; the same for every arm and independent of the number of devices.

    steps: optimizer steps; null = as many as `epochs` passes over the selector's choice take.
    batch_size: trajectories of a step's global batch.
    lr: peak learning rate.  lr_sweep: null, or the rates of which every arm gets the best by final held-out loss.
    warmup: share of the steps.  schedule: cosine | constant (after the warm-up).
    weight_decay, betas: AdamW's.  clip: largest gradient norm.
    average: trajectory (sum_k q_k L_k) | token.  weighted: false trains the same rows with weights 1.
    layout: buckets (rows of similar length, padded) | packed (documents in one row, positions restart).
    micro_batch_tokens: tokens of one forward-backward pass, padding included.
    validations: held-out evaluations over the run.  checkpoint_every: optimizer steps.
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 64
    lr: float = 1e-5
    lr_sweep: tuple[float, ...] | None = None
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    average: str = "trajectory"
    weighted: bool = True
    layout: str = "buckets"
    micro_batch_tokens: int = 4096
    validations: int = 20
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        known = {
            "average": ("trajectory", "token"),
            "layout": ("buckets", "packed"),
            "schedule": ("cosine", "constant"),
        }
        for name, options in known.items():
            if getattr(self, name) not in options:
                raise ValueError(f"sft.{name}={getattr(self, name)!r} is unknown; set it to {' or '.join(options)}")
        for name in ("batch_size", "micro_batch_tokens", "validations", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"sft.{name}={getattr(self, name)} is too small; set it to at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"sft.steps={self.steps} trains nothing; set it to at least 1, or null to use sft.epochs")
        for name in ("lr", "epochs", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"sft.{name}={getattr(self, name)} must be above 0; set it to a positive number")
        if self.lr_sweep is not None and not (self.lr_sweep and all(lr > 0 for lr in self.lr_sweep)):
            raise ValueError(
                f"sft.lr_sweep={list(self.lr_sweep)} holds no or other than positive rates; set [1e-4, 3e-4]"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"sft.warmup={self.warmup} is no share of the steps; set it from 0 to below 1")

    def identity(self) -> dict[str, Any]:
        """What a student trained for so many steps depends on (on `micro_batch_tokens` through LoRA's dropout)."""
        settings = {name: value for name, value in vars(self).items() if name not in _NO_RESULT}
        return settings | {"betas": list(self.betas)}

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then the schedule."""
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return self.lr * (1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * progress)))

    def for_epochs(self, epochs: int) -> "Recipe":
        """The same recipe for so many epochs, all rows alike, without a held-out curve: that of a warm-up arm."""
        return replace(self, steps=None, epochs=float(epochs), validations=1, weighted=False, lr_sweep=None)

    def steps_for(self, trajectories: int) -> int:
        """Optimizer steps of a run whose selector chose `trajectories`."""
        return self.steps or max(1, math.ceil(self.epochs * trajectories / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rank's part of an optimizer step: micro-batches, each row's coefficient, and counts for the log.

    `coefficients_CR` is one [C, R] a micro-batch and multiplies its rows' summed surprisals: training has one set,
    held-out loss one per figure. `names` are the rows' "problem/candidate", for messages.
    """

    micro: list[MicroBatch]
    coefficients_CR: list[Tensor]
    names: tuple[str, ...] = ()
    trained_tokens: int
    computed_tokens: int

    def to(self, device: torch.device, **_: Any) -> "Step":
        return Step(
            micro=[m.to(device) for m in self.micro],
            coefficients_CR=[c.to(device) for c in self.coefficients_CR],
            names=self.names,
            trained_tokens=self.trained_tokens,
            computed_tokens=self.computed_tokens,
        )


class DivergedError(ValueError):
    """Training came to a loss or gradient that is no number."""


class SFTModule(LightningModule):
    """The student to be trained on one selection.

    `folder` receives loss.csv: held-out loss (and that over correct trajectories) by optimizer step, nats/token.
    """

    def __init__(self, *, student: Student, recipe: Recipe, steps: int, seed: int, folder: Path):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # LoRA checkpoints hold the trained parameters only
        self.student, self.recipe, self.steps, self.seed, self.folder = student, recipe, steps, seed, folder
        self.student_model: Any = None
        self.curve: list[dict[str, float]] = []

    def configure_model(self) -> None:
        if self.student_model is not None:
            return
        if self.trainer.precision == "16-mixed":  # its loss scaling would reach the clipping of gradients
            raise ValueError("trainer.precision=16-mixed is not supported; set it to bf16-mixed or 32-true")
        torch.manual_seed(self.seed)  # LoRA's first factor is random: the same for every arm and rank
        device = self.trainer.strategy.root_device
        # Full fine-tuning keeps float32 master weights; trainer.precision decides what the products run in.
        dtype = torch.float32 if self.student.lora is None else self.student.resolve_dtype(device)
        self.student_model = self.student.load_trainable(dtype)

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)

        def factor(step: int) -> float:
            return recipe.rate(step, self.steps) / recipe.lr

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def _loss(self, micro: MicroBatch, coefficient_CR: Tensor) -> Tensor:
        hidden_XD = hidden_states(self.student_model, micro.input_ids_RL, micro.position_ids_RL)
        return weighted_surprisal(
            hidden_XD[micro.predict_N], micro.target_N, coefficient_CR[:, micro.row_N], head_of(self.student_model)
        )

    def training_step(self, batch: Step, batch_idx: int) -> None:
        step = self.global_step
        torch.manual_seed(_mix(self.seed, step, self.global_rank))  # dropout: resuming needs no saved state
        optimizer: Any = self.optimizers()
        loss = torch.zeros((), device=self.device)
        last = len(batch.micro) - 1
        for i, (micro, coefficient_CR) in enumerate(zip(batch.micro, batch.coefficients_CR, strict=True)):
            with self._gradients_kept_local() if i < last else nullcontext():
                value = self._loss(micro, coefficient_CR).sum()
                # data-parallel strategies average gradients over ranks; the coefficients already are global
                self.manual_backward(value * self.trainer.world_size)
            loss += value.detach().float()
        norm = torch.nn.utils.clip_grad_norm_(self._trained(), self.recipe.clip)
        loss = self.trainer.strategy.reduce(loss, reduce_op="sum")
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            names = ", ".join(batch.names[:20]) + (" ..." if len(batch.names) > 20 else "")
            raise DivergedError(
                f"training stopped at optimizer step {step}: loss {loss.item():.4g}, gradient norm {norm.item():.4g}; "
                f"lower sft.lr={self.recipe.lr:g} or look at this step's trajectories (problem/candidate): {names}"
            )
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/gradient_norm", norm)
        self.log("train/lr", scheduler.get_last_lr()[0])
        self.log("train/tokens", float(batch.trained_tokens), reduce_fx="sum", sync_dist=False)
        scheduler.step()

    def _gradients_kept_local(self) -> AbstractContextManager[None]:
        strategy: Any = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def on_validation_epoch_start(self) -> None:
        self._held_out_C = torch.zeros(2, dtype=_precise(self.device), device=self.device)

    def validation_step(self, batch: Step, batch_idx: int) -> None:
        for micro, coefficient_CR in zip(batch.micro, batch.coefficients_CR, strict=True):
            self._held_out_C += self._loss(micro, coefficient_CR)

    def on_validation_epoch_end(self) -> None:
        """Appends a point to the held-out curve; the pass before the first step gives the point at step 0."""
        if any(point["step"] == self.global_step for point in self.curve):
            return
        loss, loss_correct = self.trainer.strategy.reduce(self._held_out_C, reduce_op="sum").tolist()
        values = {"held_out/loss": loss}
        if loss_correct > 0:  # some held-out trajectory is known to be correct
            values["held_out/loss_correct"] = loss_correct
        if self.logger is not None:  # not self.log: it is silent before the first step, and one step behind after it
            self.logger.log_metrics(values, step=self.global_step)
        self.curve.append({"step": self.global_step, **values})
        if self.trainer.is_global_zero:
            write_curve(self.curve, self.folder / "loss.csv")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = checkpoint["curve"]


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def write_curve(curve: list[dict[str, float]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(curve[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    write_text(path, text.getvalue())


def _mix(*numbers: int) -> int:
    """One seed out of several."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7])
