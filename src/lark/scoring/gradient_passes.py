"""Passes that need the student's gradients (lark.scoring.passes says what each gives).

Dropout is off, layers that recompute their activations to save memory do so, and gradients are taken one trajectory at
a time. Units are whole problems where a row's columns depend on the problem's other rows.

Shapes: K candidates of one problem, M trajectories whose gradients are held together, d parameters, J sub-tasks, k
dimensions of a projection, or d without one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lark.common.groups import Groups, unit_hash
from lark.common.log import logger
from lark.scoring.gradients import (
    Parameters,
    choose_parameters,
    compute_adam_direction,
    compute_flat_gradients,
    compute_gram,
    compute_head_gram,
    compute_inner_products,
    measure_loss_drop,
    project_gradients,
    read_adam_moments,
)
from lark.scoring.pass_module import PassInputs, PassModule
from lark.scoring.passes import GradientMatches, HeadGradients, LossDrops, Pass, ProjectedGradients
from lark.student.batching import MicroBatch, lay_out_row
from lark.student.model_parts import get_head
from lark.student.student import Student
from lark.student.tokenized_pool import TokenizedPool

BUFFER_BYTES = 2**30  # of gradients that wait to be projected together


def plan_problem_units(pool: TokenizedPool, rows: np.ndarray) -> list[np.ndarray]:
    """Divide `rows` by problem, the one with most tokens first."""
    units = [rows[of_problem] for of_problem in Groups.from_ids(pool.problem_id[rows]).split()]
    return sorted(units, key=lambda unit: -int(pool.length[unit].sum()))


class GradientModule(PassModule):
    """A pass whose student has a gradient in the parameters that the pass names, and in no others."""

    SPLITS = False

    @classmethod
    def identity(cls, wanted: Pass, inputs: PassInputs) -> dict[str, Any]:
        parameters: str = wanted.parameters  # type: ignore[attr-defined]
        lora = inputs.student.lora if parameters == "trained" else None
        return wanted.identity() | ({} if lora is None else {"lora": lora, "seed": inputs.seed})

    def load_student(self, device: torch.device) -> torch.nn.Module:
        student, which = self.inputs.student, self.wanted.parameters
        dtype = self.resolve_dtype(student, device)
        if which == "trained":
            torch.manual_seed(self.inputs.seed)  # LoRA's first factor is random: the arm's own
            model: Any = student.load_trainable(dtype)
        else:
            model = student.load_model(dtype)
            if student.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        chosen = choose_parameters(model, which)
        model.eval().requires_grad_(False)
        for _, parameter in chosen:
            parameter.requires_grad_(True)
        return model

    @property
    def parameters_in_use(self) -> Parameters:
        return choose_parameters(self.student_model, "trained")

    def on_predict_start(self) -> None:
        """Recomputing layers look at their own `training`; their children, dropout among them, stay in eval mode."""
        for module in self.student_model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True

    def plan_units(self) -> list[np.ndarray]:
        return plan_problem_units(self.inputs.pool, self.inputs.rows)

    def collate_each(self, rows: np.ndarray) -> list[MicroBatch]:
        """Make a micro-batch of each row, on the student's device."""
        tokenized = self.inputs.pool.read_tokens(rows)
        return [lay_out_row(one, row).to(self.device) for one, row in zip(tokenized, rows.tolist(), strict=True)]


def _cost(micro: MicroBatch, *, forwards: int = 1, backwards: int = 1) -> dict[str, Any]:
    return {
        "row": micro.rows[0],
        "forward_tokens": forwards * micro.tokens,
        "backward_tokens": backwards * micro.tokens,
    }


class GradientsModule(GradientModule):
    """Memory: the float32 gradients of one problem's candidates, 4 K d bytes."""

    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        batch = self.collate_each(rows)
        gram_KK = compute_gram(compute_flat_gradients(self.student_model, batch, self.parameters_in_use)).numpy()
        return [
            _cost(micro) | {"squared_norm": gram_KK[i, i], "gram": gram_KK[i], "gram_rows": rows}
            for i, micro in enumerate(batch)
        ]


class LossDropsModule(GradientModule):
    """Always in float32: bfloat16 would round a small step away. Memory: twice the parameters that move."""

    wanted: LossDrops

    @classmethod
    def resolve_dtype(cls, student: Student, device: torch.device) -> torch.dtype:
        return torch.float32

    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        measured = []
        for micro in self.collate_each(rows):
            drop, loss = measure_loss_drop(self.student_model, micro, self.parameters_in_use, self.wanted.eta)
            measured.append(_cost(micro, forwards=3) | {"drop": drop, "loss_before": loss})
        return measured


class ProjectedGradientsModule(GradientModule):
    """Rows are projected together, as many as BUFFER_BYTES hold, because random signs cost about as much as one row."""

    VERSION = 2
    wanted: ProjectedGradients

    def plan_units(self) -> list[np.ndarray]:
        rows = self.inputs.rows[np.argsort(-self.inputs.pool.length[self.inputs.rows], kind="stable")]
        together = min(_count_buffered_rows(self.parameters_in_use), self.inputs.settings.shard_rows)
        return [rows[i : i + together] for i in range(0, len(rows), together)]

    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        batch, parameters = self.collate_each(rows), self.parameters_in_use
        gradient_Md = compute_flat_gradients(self.student_model, batch, parameters)
        settings = {"dimensions": self.wanted.dimensions, "seed": self.wanted.projection_seed}
        vector_Mk = project_gradients(gradient_Md, parameters, **settings).cpu()
        return [_cost(micro) | {"vector": vector.numpy()} for micro, vector in zip(batch, vector_Mk, strict=True)]


def _count_buffered_rows(parameters: Parameters) -> int:
    return max(1, BUFFER_BYTES // (4 * sum(p.numel() for _, p in parameters)))


class HeadGradientsModule(PassModule):
    """A forward pass in micro-batches, then the head's gradients of the whole problem. Memory: its hidden states."""

    VERSION = 2
    SPLITS = False
    CUTS_INSIDE = True
    wanted: HeadGradients

    def plan_units(self) -> list[np.ndarray]:
        _ = self.batch_tokens, self.unpacked_reason  # ranks agree on them, also those without a unit
        return plan_problem_units(self.inputs.pool, self.inputs.rows)

    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        batch = [self.collate(piece) for piece in self.plan_batches(rows)]
        hidden_ND = torch.cat([self.compute_hidden(m)[m.predict_N] for m in batch])
        rows = np.array([row for m in batch for row in m.rows])  # in the order of the tokens
        gram_KK = compute_head_gram(
            hidden_ND,
            torch.cat([m.target_N for m in batch]),
            [int(self.inputs.pool.span_tokens[row]) for m in batch for row in m.rows],
            get_head(self.student_model),
            sketch=self.wanted.sketch,
            seed=self.wanted.projection_seed,
        ).numpy()
        tokens = self.inputs.pool.length[rows].tolist()
        return [
            {"row": row, "forward_tokens": tokens[i], "gram": gram_KK[i], "gram_rows": rows}
            for i, row in enumerate(rows.tolist())
        ]


# ---- LESS


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A warm-up checkpoint: the trained weights, AdamW's moments [d] and settings, the epoch's learning rate; and the
    sums of the validation examples' unit gradients [J, k].
    """

    weights: list[Tensor]
    first_d: Tensor
    second_d: Tensor
    betas: tuple[float, float]
    eps: float
    rate: float
    target_Jk: Tensor


def choose_examples(wanted: GradientMatches, inputs: PassInputs) -> np.ndarray:
    """Choose the validation examples; returns rows of the pool, ascending.

    They are the correct candidates of `validation_problems` problems, by seeded hash among those that have one; where
    no candidate is known to be correct, all candidates of as many problems.
    """
    correct = inputs.rows[inputs.pool.correct[inputs.rows] == 1]
    rows = correct if len(correct) else inputs.rows
    problems = np.unique(inputs.pool.problem_id[rows].astype(str))
    draw = unit_hash(inputs.seed, problems, ["validation"] * len(problems), salt="gradient matches")
    chosen = problems[np.argsort(draw)[: wanted.validation_problems]]
    return rows[np.isin(inputs.pool.problem_id[rows].astype(str), chosen)]


def list_subtasks(wanted: GradientMatches, inputs: PassInputs, examples: np.ndarray) -> list[str]:
    """Name the sub-task of each validation example."""
    if wanted.subtask is None:
        return [""] * len(examples)
    return [str(value) for value in inputs.pool.column(wanted.subtask, examples)]


class GradientMatchesModule(GradientModule):
    """Every rank adds up the validation examples' unit gradients of every checkpoint by itself, before its first unit.

    An example of the candidate's own problem is taken out again: its gradient is computed with the problem's others.
    Memory: on the host (3 d + J k) floats a checkpoint; on the device, besides the weights and 2 d floats of moments,
    a few blocks of gradients (each BUFFER_BYTES, or 4 d bytes where one gradient is more) and the (K + J) k floats of
    what is compared. With `dimensions` k is small; without, k = d, and a problem's K directions are there together.
    A gradient of norm 0 has cosine 0 with all others. Where all validation examples are of the candidate's own problem
    there is no match (NaN).
    """

    VERSION = 2
    wanted: GradientMatches

    def __init__(self, *, wanted: Pass, inputs: PassInputs, folder: Path):
        super().__init__(wanted=wanted, inputs=inputs, folder=folder)
        assert isinstance(wanted, GradientMatches)
        self.checkpoints: list[Checkpoint] = []
        self.examples = choose_examples(wanted, inputs)
        task = np.unique(list_subtasks(wanted, inputs, self.examples), return_inverse=True)[1]
        self.task_of = dict(zip(self.examples.tolist(), task.tolist(), strict=True))
        self.count_J = torch.bincount(torch.from_numpy(task)).double()

    @classmethod
    def identity(cls, wanted: Pass, inputs: PassInputs) -> dict[str, Any]:
        assert isinstance(wanted, GradientMatches)
        examples = choose_examples(wanted, inputs)
        chosen = [examples.tolist(), list_subtasks(wanted, inputs, examples)]
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        return super().identity(wanted, inputs) | {"seed": inputs.seed, "validation_examples": digest}

    def on_predict_start(self) -> None:
        super().on_predict_start()
        rows = self.inputs.rows
        known = "correct" if (self.inputs.pool.correct[rows] == 1).any() else "none is known to be correct: all"
        problems = len(set(self.inputs.pool.problem_id[self.examples].tolist()))
        logger.info(
            f"validation  {len(self.examples):,} trajectories ({known}) of {problems:,} problems, "
            f"sub-tasks: {len(self.count_J)}, warm-up checkpoints: {len(self.inputs.warmup)}"
        )

    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        batch = self.collate_each(rows)
        before = {"forward_tokens": 0, "backward_tokens": 0}
        if not self.checkpoints:
            assert self.inputs.warmup, "a warm-up arm has been trained"
            self.checkpoints = [self._read_checkpoint(path, rate) for path, rate in self.inputs.warmup]
            tokens = len(self.checkpoints) * int(self.inputs.pool.length[self.examples].sum())
            before = {"forward_tokens": tokens, "backward_tokens": tokens}
        own = [self.task_of[micro.rows[0]] for micro in batch if micro.rows[0] in self.task_of]
        count_J = self.count_J - torch.bincount(torch.tensor(own, dtype=torch.int64), minlength=len(self.count_J))
        match_KJ = torch.zeros(len(batch), len(count_J), dtype=torch.float64)
        for checkpoint in self.checkpoints:
            match_KJ += checkpoint.rate * self._sum_cosines(checkpoint, batch) / count_J
        match_K = match_KJ.masked_fill(count_J == 0, -torch.inf).amax(1)
        count = len(self.checkpoints)
        measured = [
            _cost(micro, forwards=count, backwards=count) | {"match": match if match > -np.inf else np.nan}
            for micro, match in zip(batch, match_K.tolist(), strict=True)
        ]
        for name, value in before.items():
            measured[0][name] += value
        return measured

    def _sum_cosines(self, checkpoint: Checkpoint, batch: Sequence[MicroBatch]) -> Tensor:
        """Sum each candidate's cosines with a sub-task's examples of other problems, float64 [K, J]."""
        self._set_weights(checkpoint.weights)
        first_d, second_d = checkpoint.first_d.to(self.device), checkpoint.second_d.to(self.device)
        others_Jk = checkpoint.target_Jk.to(self.device, copy=True)
        direction_Kk = others_Jk.new_empty(len(batch), others_Jk.shape[1])
        together = _count_buffered_rows(self.parameters_in_use)
        for i in range(0, len(batch), together):
            block = batch[i : i + together]
            gradient_Md = compute_flat_gradients(self.student_model, block, self.parameters_in_use)
            self._add_unit_gradients(others_Jk, block, gradient_Md, sign=-1)
            gradient_Md = compute_adam_direction(
                gradient_Md, first_d, second_d, betas=checkpoint.betas, eps=checkpoint.eps
            )
            direction_Kk[i : i + together] = self._normalize(gradient_Md)
        return compute_inner_products(direction_Kk, others_Jk)

    def _add_unit_gradients(
        self, sum_Jk: Tensor, block: Sequence[MicroBatch], gradient_Md: Tensor, *, sign: int
    ) -> None:
        """Add the unit gradients of those of the trajectories that are examples to their sub-tasks' sums, or take
        them away.
        """
        examples = [i for i, micro in enumerate(block) if micro.rows[0] in self.task_of]
        if examples:
            task = torch.tensor([self.task_of[block[i].rows[0]] for i in examples], device=sum_Jk.device)
            sum_Jk.index_add_(0, task, self._normalize(gradient_Md[examples]), alpha=sign)

    def _normalize(self, gradient_Md: Tensor) -> Tensor:
        """Divide the gradients, projected if they are to be, by their norms."""
        wanted = self.wanted
        if wanted.dimensions is not None:
            gradient_Md = project_gradients(
                gradient_Md, self.parameters_in_use, dimensions=wanted.dimensions, seed=wanted.projection_seed
            )
        return F.normalize(gradient_Md, dim=1, eps=torch.finfo(torch.float32).tiny)

    def _set_weights(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for (_, parameter), value in zip(self.parameters_in_use, weights, strict=True):
                parameter.copy_(value)

    def _read_checkpoint(self, path: Path, rate: float) -> Checkpoint:
        """Read a checkpoint and add up the validation examples' gradients there."""
        chosen = self.parameters_in_use
        saved = torch.load(path, map_location="cpu", weights_only=True)
        weights = [saved["state_dict"][f"student_model.{name}"] for name, _ in chosen]
        (optimizer,) = saved["optimizer_states"]
        settings = optimizer["param_groups"][0]
        first_d, second_d = read_adam_moments(optimizer, chosen)
        self._set_weights(weights)
        return Checkpoint(
            weights=weights,
            first_d=first_d,
            second_d=second_d,
            betas=tuple(settings["betas"]),
            eps=settings["eps"],
            rate=rate,
            target_Jk=self._sum_examples(),
        )

    def _sum_examples(self) -> Tensor:
        """Sum the examples' unit gradients at the present weights, by sub-task, float32 [J, k]."""
        chosen, together = self.parameters_in_use, _count_buffered_rows(self.parameters_in_use)
        size = self.wanted.dimensions or sum(p.numel() for _, p in chosen)
        target_Jk = torch.zeros(len(self.count_J), size, device=self.device)
        for i in range(0, len(self.examples), together):
            block = self.collate_each(self.examples[i : i + together])
            self._add_unit_gradients(
                target_Jk, block, compute_flat_gradients(self.student_model, block, chosen), sign=1
            )
        return target_Jk.cpu()
