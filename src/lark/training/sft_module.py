"""SFTModule: weighted supervised fine-tuning, one training_step = one optimizer step.

A step's loss is sum_N coefficient_N * surprisal_N over the whole global batch. The coefficients already carry weights
and denominators (see lark.student.batching), so micro-batches and ranks only add up: weights act at any micro-batch
size. Gradients are summed over ranks once a step, after its last micro-batch, so that a rank that runs out of memory
can do its part again in smaller ones. (A student that is divided over ranks, trainer=fsdp, may sum them as it goes.)
"""

import csv
import hashlib
import io
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lark.common.cache import write_text
from lark.common.errors import LarkError
from lark.student.attention import enable_packed_rows
from lark.student.batching import MicroBatch, lay_out_row, pack_rows, plan_alone, plan_packed
from lark.student.chat import TokenizedTrajectory
from lark.student.distributed import Parallelism, clip_gradients
from lark.student.memory import estimate_training_tokens, is_out_of_memory, release_memory
from lark.student.model_parts import compile_layers, compute_hidden_states, get_base_model, get_head
from lark.student.student import Student
from lark.student.token_statistics import compute_weighted_surprisal
from lark.training.batches import Step
from lark.training.divergence import DivergedError, Losses
from lark.training.recipe import Recipe

PRECISIONS = ("32-true", "bf16-mixed")
NOTHING = TokenizedTrajectory(input_ids=[0, 0], prompt_tokens=0, end_of_turn=1, steps=[0])
NAMED = 10  # trajectories that a message about a loss names


class HeldOutLoss(Metric):
    """Sums [4] in nats/token: [0] the loss over all held-out rows, [1] over those known to be correct, [2] and [3]
    the same over the sample of the curve.

    Coefficients carry the denominators (lark.training.batches.compute_held_out_coefficients), so sums are the losses.
    """

    full_state_update = False
    sum_C: Tensor

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple's GPUs have no float64
        self.add_state("sum_C", torch.zeros(4, dtype=dtype), dist_reduce_fx="sum")

    def update(self, loss_C: Tensor) -> None:
        self.sum_C += loss_C

    def compute(self) -> Tensor:
        return self.sum_C


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
        self.parallelism = Parallelism()
        self.unpacked_reason: str | None = None
        """Why a micro-batch is one row; None: it is several, packed."""
        self.budget = recipe.micro_batch_tokens or 0
        """Tokens of a micro-batch."""
        self.curve: list[dict[str, float]] = []
        """Held-out loss by optimizer step, over a sample of the held-out rows."""
        self.held_out: dict[str, dict[str, float]] = {}
        """That over all of them: the points `start` and `end`."""
        self.held_out_loss = HeldOutLoss()
        self.losses = Losses(spike=recipe.spike)
        self.totals = dict.fromkeys(("steps", "row_tokens", "computed_tokens", "trained_tokens", "halvings"), 0)
        """Of this module on this rank: steps, tokens of trajectories, of micro-batches, in the loss, ..."""

    # ---- the student

    def configure_model(self) -> None:
        if self.student_model is not None:
            return
        if self.trainer.precision not in PRECISIONS:  # others scale the loss, or round the weights that are trained
            raise LarkError(
                f"trainer.precision={self.trainer.precision} is not supported in training; set it to "
                f"{' or '.join(PRECISIONS)}"
            )
        torch.manual_seed(self.seed)  # LoRA's first factor is random: the same for every arm and rank
        self.parallelism, device = Parallelism(self.trainer), self.trainer.strategy.root_device
        # Full fine-tuning keeps float32 master weights; trainer.precision decides what the products run in.
        dtype = torch.float32 if self.student.lora is None else self.student.resolve_dtype(device)
        self.load_student(dtype)
        if self.unpacked_reason is None:
            compile_layers(self.student_model, device)
        self.parallelism.divide_for_training(self.student_model, "weighted_surprisal")

    def load_student(self, dtype: torch.dtype) -> None:
        """Load the student into `student_model`."""
        self.student_model = self.student.load_trainable(dtype)
        base: Any = get_base_model(self.student_model)
        base.eval()
        self.unpacked_reason = self.parallelism.find_refusal(enable_packed_rows(base, self.student.attention))
        base.train()
        self.student_model.weighted_surprisal = MethodType(_weighted_surprisal, self.student_model)

    def on_fit_start(self) -> None:
        """Find what a micro-batch may take, now that the student is on its device."""
        if self.curve and self.curve[-1]["step"] == 0:  # as it was found for an earlier arm
            self.log_held_out(self.curve[-1])
        if not self.budget:
            model, checkpointed = get_base_model(self.student_model), self.student.gradient_checkpointing
            own = estimate_training_tokens(model, self.device, checkpointed=checkpointed)
            self.budget = self.parallelism.find_least(own)

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        settings = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
        # on CUDA in one kernel, without the copies of all parameters that `foreach` makes
        optimizer = torch.optim.AdamW(self._list_trained(), **settings, fused=self.device.type == "cuda" or None)

        def factor(step: int) -> float:
            return recipe.compute_rate(step, self.steps) / recipe.lr

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def _list_trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    # ---- micro-batches

    def micro_batches(self, batch: Step) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Yield the rank's part of a step in micro-batches, each with the coefficients [C, R] of its rows."""
        plan = self._plan(batch.lengths)
        for part in plan:
            encoded, rows = [batch.encoded[i] for i in part.tolist()], batch.rows[part].tolist()
            micro = pack_rows(encoded, rows) if self.unpacked_reason is None else lay_out_row(*encoded, *rows)
            yield self._move(micro, batch.coefficient_CR[:, part])
        if self.parallelism.is_divided:  # every forward pass takes all ranks
            most = max(len(self._plan(lengths)) for lengths in batch.lengths_by_rank)
            for _ in range(most - len(plan)):
                yield self._move(lay_out_row(NOTHING, -1), np.zeros((len(batch.coefficient_CR), 1)))

    def _plan(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Plan micro-batches of rows of `lengths` [R] (tokens); returns indices into them."""
        return plan_packed(lengths, budget=self.budget) if self.unpacked_reason is None else plan_alone(lengths)

    def _count_largest(self, lengths: np.ndarray) -> int:
        """Count the tokens of the largest micro-batch of rows of `lengths`, what they share not deducted."""
        return max((int(lengths[part].sum()) for part in self._plan(lengths)), default=0)

    def _move(self, micro: MicroBatch, coefficient_CR: np.ndarray) -> tuple[MicroBatch, Tensor]:
        return micro.to(self.device), torch.tensor(coefficient_CR, dtype=torch.float32, device=self.device)

    def loss(self, micro: MicroBatch, coefficient_CR: Tensor) -> Tensor:
        """Sum coefficient * surprisal over the micro-batch's tokens, [C] (nats)."""
        return self.student_model.weighted_surprisal(micro, coefficient_CR)

    # ---- training

    def training_step(self, batch: Step, batch_idx: int) -> None:
        step = self.global_step
        optimizer: Any = self.optimizers()
        loss = self._compute_gradients(batch, step)
        norm = clip_gradients(self._list_trained(), self.recipe.clip)
        reason = self.losses.find_reason_to_stop(loss / batch.mean_weight, norm)
        if reason is not None:
            raise DivergedError(
                f"training stopped at optimizer step {step}: {reason}; lower sft.lr={self.recipe.lr:g} or look at this "
                f"step's trajectories (problem/candidate: nats/token): {self._describe_worst(batch)}"
            )
        self.losses.append(loss / batch.mean_weight)
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/gradient_norm", norm)
        self.log("train/lr", scheduler.get_last_lr()[0])
        self.log("train/effective_trajectories", batch.effective)
        scheduler.step()

    def _compute_gradients(self, batch: Step, step: int) -> float:
        """Compute the step's loss and, in the parameters, its gradient; both of all ranks together."""
        while True:
            torch.manual_seed(_mix_seeds(self.seed, step, self.global_rank))  # dropout: resuming needs no saved state
            loss, failure, computed = torch.zeros((), device=self.device), None, 0
            try:
                micro_batches = list(self.micro_batches(batch))
                for number, (micro, coefficient_CR) in enumerate(micro_batches, 1):
                    self.parallelism.set_last(self.student_model, number == len(micro_batches))
                    loss += self._backward(micro, coefficient_CR)
                    computed += micro.tokens
            except RuntimeError as error:
                # under fsdp the other ranks wait inside the pass it left
                if self.parallelism.is_divided or not is_out_of_memory(error):
                    raise
                failure = str(error).partition("\n")[0]
            found = torch.stack([loss, loss.new_tensor(float(failure is not None))])
            total, failures = self.trainer.strategy.reduce(found, reduce_op="sum").tolist()
            if not failures:
                break
            self._shrink(batch, failure)
        self.parallelism.sum_gradients(self._list_trained())
        self.totals["steps"] += 1
        self.totals["row_tokens"] += int(batch.lengths.sum())
        self.totals["computed_tokens"] += computed
        self.totals["trained_tokens"] += batch.trained_tokens
        return total

    def _backward(self, micro: MicroBatch, coefficient_CR: Tensor) -> Tensor:
        """Add a micro-batch's gradients and return its loss. Where it fails, nothing of its graph outlives the call."""
        with self.parallelism.keep_gradients_local():
            value = self.loss(micro, coefficient_CR).sum()
            self.manual_backward(value * self.parallelism.loss_factor)
        return value.detach().float()

    def _shrink(self, batch: Step, failure: str | None) -> None:
        """Forget the step's gradients and halve what is taken at a time, on all ranks, as one ran out of memory."""
        for parameter in self._list_trained():
            parameter.grad = None
        release_memory(self.device)
        longest = max(int(lengths.max(initial=0)) for lengths in batch.lengths_by_rank)
        largest = max(self._count_largest(lengths) for lengths in batch.lengths_by_rank)
        if largest <= longest:
            hint = "" if self.student.gradient_checkpointing else "model.gradient_checkpointing=true, "
            raise LarkError(
                f"a trajectory of {longest:,} tokens alone does not fit into a training step's memory "
                f"({failure or 'on another rank'}); set {hint}a lower task.max_length, or trainer=fsdp"
            )
        self.budget = max(min(self.budget, largest) // 2, longest)
        self.totals["halvings"] += 1

    def _describe_worst(self, batch: Step) -> str:
        """List the step's trajectories of all ranks: those whose loss is not a number first, then the highest."""
        # ranks that share a student cannot look at one trajectory each
        is_divided = self.parallelism.is_divided
        losses = [math.nan if is_divided else self._compute_row_loss(batch, i) for i in range(len(batch.names))]
        found = self.parallelism.gather_objects(list(zip(losses, batch.names, strict=True)))
        worst = sorted(chain(*found), key=lambda one: (math.isfinite(one[0]), -one[0]))
        shown = ", ".join(name if is_divided else f"{name}: {loss:.3g}" for loss, name in worst[:NAMED])
        return shown + (f" and {len(worst) - NAMED} more" if len(worst) > NAMED else "")

    @torch.no_grad()
    def _compute_row_loss(self, batch: Step, i: int) -> float:
        """Compute L of one row (nats/token) by itself: in sums with other rows what is not a number would spread."""
        micro = lay_out_row(batch.encoded[i], int(batch.rows[i]))
        return self.loss(*self._move(micro, np.full((1, 1), 1 / len(micro.target_N)))).item()

    # ---- the held-out loss

    def on_validation_epoch_start(self) -> None:
        self.held_out_loss.reset()

    def validation_step(self, batch: Step, batch_idx: int) -> None:
        for micro, coefficient_CR in self.micro_batches(batch):
            self.held_out_loss.update(self.loss(micro, coefficient_CR))

    def on_validation_epoch_end(self) -> None:
        """Append a point to the held-out curve; the pass before the first step gives the point at step 0."""
        found = self.held_out_loss.compute().tolist()
        whole, of_sample = self._make_point(*found[:2]), self._make_point(*found[2:])
        if whole["held_out/loss"] > 0:  # not on the way
            self.held_out["end" if self.global_step else "start"] = whole
        if any(point["step"] == self.global_step for point in self.curve):
            return
        self.curve.append(of_sample)
        self.log_held_out(of_sample)

    def _make_point(self, loss: float, loss_correct: float) -> dict[str, float]:
        known = {"held_out/loss_correct": loss_correct} if loss_correct > 0 else {}  # some is known to be correct
        return {"step": self.global_step, "held_out/loss": loss, **known}

    def log_held_out(self, point: dict[str, float]) -> None:
        if self.logger is not None:  # not self.log: it is silent before the first step, and one step behind after it
            self.logger.log_metrics({k: v for k, v in point.items() if k != "step"}, step=int(point["step"]))
        if self.trainer.is_global_zero:
            write_curve(self.curve, self.folder / "loss.csv")

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"curve": self.curve, "held_out": self.held_out}
        checkpoint |= {"losses": self.losses.recent, "budget": self.budget}
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve, self.held_out = checkpoint["curve"], checkpoint["held_out"]
        self.losses.recent, self.budget = checkpoint["losses"], checkpoint["budget"]


def _weighted_surprisal(model: Any, micro: MicroBatch, coefficient_CR: Tensor) -> Tensor:
    """Compute the loss as a method of the student: a divided one gathers its head for its own methods only."""
    hidden_XD = compute_hidden_states(model, micro.input_ids_1X, micro.position_ids_1X, micro.tree)
    return compute_weighted_surprisal(
        hidden_XD[micro.predict_N], micro.target_N, coefficient_CR[:, micro.row_N], get_head(model)
    )


def write_curve(curve: list[dict[str, float]], path: Path) -> None:
    """Write the held-out curve as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(curve[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    write_text(path, text.getvalue())


def _mix_seeds(*numbers: int) -> int:
    """Mix several numbers into one seed."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7])
