"""Training over several ranks: students divided over them (FSDP2), gradients summed over them and clipped."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lark.common.errors import LarkError
from lark.scoring.gradients import decoder_layers
from lark.student.student import get_base_model

SUM_BYTES = 64 * 2**20  # of gradients that are summed over ranks at a time


def shard_for_training(model: Any, mesh: DeviceMesh, precision: str) -> None:
    """Divide all parameters of `model` over `mesh` [W], in place: each layer is gathered when it runs, forwards and
    backwards, and what stands outside them (embedding, norm, head; a tied one once) for as long as a micro-batch takes.

    Weights, gradients and the optimizer's state stay in the weights' dtype; with precision=bf16-mixed, bfloat16 copies
    are what is gathered and multiplied. `weighted_surprisal` is the method by which the model is called.
    """
    kept: dict[str, Any] = {}
    if precision == "bf16-mixed":
        kept = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(**kept)
    layers = decoder_layers(get_base_model(model))
    if not layers:
        raise LarkError(
            f"trainer=fsdp divides a student's decoder layers, but {type(model).__name__} has none that are known; "
            "set trainer=ddp"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # What the root is called with are the loss's coefficients, which bfloat16 would round.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**kept, cast_forward_inputs=False))
    register_fsdp_forward_method(model, "weighted_surprisal")


def sum_over_ranks(parameters: list[nn.Parameter]) -> None:
    """The gradients of all ranks together, in place; what has none on any rank stays without."""
    has_P = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(has_P)
    batch: list[Tensor] = []
    for parameter, ranks in zip(parameters, has_P.tolist(), strict=True):
        if not ranks:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if batch and (batch[0].dtype != parameter.grad.dtype or sum(g.nbytes for g in batch) > SUM_BYTES):
            _sum_together(batch)
            batch = []
        batch.append(parameter.grad)
    if batch:
        _sum_together(batch)


def _sum_together(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """The norm of all gradients together, which are scaled so that it does not exceed `largest`."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of a divided `model`, put together on the CPU of rank 0; empty elsewhere. All ranks take part."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
