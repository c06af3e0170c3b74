"""The pass that the proxies are judged by: exact gradients of a sample's trajectories, and what a step along each does.

It is `lark.scoring.gradient_passes`' Gram matrix and loss drop from one backward pass a trajectory, with the drop at half the
step beside it and the squared norms by group of layers.

Shapes: K candidates of one problem, d parameters, P groups of parameters.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lark.common.cache import identity_hash, is_complete, read_json
from lark.common.log import logger
from lark.common.ranks import Claim
from lark.common.table_cache import Columns, read_columns
from lark.scoring.gradient_passes import GradientModule
from lark.scoring.gradients import (
    Parameters,
    compute_flat_gradients,
    compute_gram,
    compute_mean_surprisal,
    step_and_restore,
)
from lark.scoring.pass_module import PassInputs, run_pass
from lark.scoring.passes import Gradients, Pass
from lark.student.student import Student, decoder_layers, get_base_model
from lark.training.datamodule import TrajectoryDataModule

THIRDS = ("first third", "middle third", "last third")


@dataclass(frozen=True, kw_only=True)
class ExactGradients(Gradients):
    """Columns: those of `Gradients`; loss_before (L, nats/token); drop and drop_half, (L(theta) - L(theta - e grad L))
    / e at e = eta and eta / 2 (nats/token per unit of step); group_squared_norm (float64 [P], by `layer_groups`).
    """

    module = "lark.diagnostics.exact_gradients:ExactGradientsModule"

    eta: float = 1e-3


class ExactGradientsModule(GradientModule):
    """Always in float32: bfloat16 would round a small step away. Memory: the float32 gradients of one problem's
    candidates, 4 K d bytes, and the parameters that move once more.
    """

    wanted: ExactGradients

    @classmethod
    def resolve_dtype(cls, student: Student, device: torch.device) -> torch.dtype:
        return torch.float32

    def measure(self, rows: np.ndarray) -> list[dict[str, Any]]:
        model, chosen, eta = self.student_model, self.parameters_in_use, self.wanted.eta
        batch = self.collate_each(rows)
        gradient_Kd = compute_flat_gradients(model, batch, chosen)
        gram_PKK = _grams(gradient_Kd, chosen, layer_groups(model, chosen))
        gram_KK = sum(gram_PKK.values())
        assert isinstance(gram_KK, np.ndarray)
        found = []
        for i, micro in enumerate(batch):
            before = compute_mean_surprisal(model, micro)
            row = {
                "row": micro.rows[0],
                "forward_tokens": 4 * micro.tokens,
                "backward_tokens": micro.tokens,
                "squared_norm": gram_KK[i, i],
                "gram": gram_KK[i],
                "gram_rows": rows,
                "group_squared_norm": np.array([gram_KK_of[i, i] for gram_KK_of in gram_PKK.values()]),
                "loss_before": before,
            }
            for name, step in (("drop", eta), ("drop_half", eta / 2)):
                pieces = gradient_Kd[i].split([p.numel() for _, p in chosen])
                along = [piece.view_as(p) for piece, (_, p) in zip(pieces, chosen, strict=True)]
                with step_and_restore(chosen, along, step):
                    row[name] = (before - compute_mean_surprisal(model, micro)) / step
            found.append(row)
        return found

    def list_choices(self) -> dict[str, Any]:
        groups = layer_groups(self.student_model, self.parameters_in_use)
        return super().list_choices() | {"groups": list(dict.fromkeys(groups))}


def layer_groups(model: Any, parameters: Parameters) -> list[str]:
    """Of each parameter: embedding, first, middle or last third (of the decoder's layers), head, or other (norms
    outside the layers). A tied embedding and head are one.
    """
    layers, base = decoder_layers(model), get_base_model(model)
    of: dict[int, str] = {}
    for name, module in (("embedding", base.get_input_embeddings()), ("head", base.get_output_embeddings())):
        for p in module.parameters() if module is not None else ():
            of[id(p)] = name if of.get(id(p), name) == name else "embedding and head"
    for i, layer in enumerate(layers):
        of |= {id(p): THIRDS[min(3 * i // len(layers), 2)] for p in layer.parameters()}
    return [of.get(id(p), "other") for _, p in parameters]


def _grams(gradient_Kd: torch.Tensor, parameters: Parameters, groups: list[str]) -> dict[str, np.ndarray]:
    """The Gram matrix [K, K] over each group's parameters, groups in the order in which they first appear."""
    found: dict[str, np.ndarray] = {}
    for name, piece_Kp in zip(groups, gradient_Kd.split([p.numel() for _, p in parameters], 1), strict=True):
        found[name] = found.get(name, 0.0) + compute_gram(piece_Kp).numpy()
    return found


def measured(
    data: TrajectoryDataModule, wanted: Pass, row_N: np.ndarray, claim: Claim
) -> tuple[Columns, dict[str, Any]]:
    """The columns of a pass over these rows of the pool alone, and its manifest; from the cache or by the student (all
    ranks take part).
    """
    inputs = PassInputs(
        student=data.scorer, settings=data.probe, pool=data.scored_trajectories, rows=row_N, seed=data.seed
    )
    identity = data.pass_identity(wanted, inputs)
    folder: Path = data.cache / "diagnostics" / identity_hash(identity)
    with claim(f"diagnostics {wanted.name}", folder, partial(is_complete, folder)) as to_do:
        logger.info(f"{wanted.name.replace('_', ' ')}: {'of' if to_do else 'cached of'} {len(row_N):,} trajectories")
        if to_do:
            trainer = data.make_trainer(wanted.name.replace("_", " "))
            run_pass(trainer, wanted.load_module()(wanted=wanted, inputs=inputs, folder=folder), identity)
    return read_columns(folder), read_json(folder / "manifest.json")
