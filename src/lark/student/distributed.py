"""How a student is spread over devices: whole on each of them (ddp), or divided over all of them (fsdp: FSDP2).

A divided student keeps 1/W of every layer's weights on a rank; a layer is gathered from the W ranks when it runs, and
dropped again. `Parallelism` is the one object that knows; nothing else asks which strategy it is.

Scoring: embedding, head and what else stands outside the layers stay whole on every rank: the head is needed whole for
every batch, as its logits are computed in chunks outside a forward pass, and a tied embedding is the same tensor. They
cost V x D weights a rank, twice that if not tied (2.2 GB for Qwen2.5-7B in bfloat16, 4.2 GB for Llama-3.1-70B).
Training: they are divided too, as their gradients and the optimizer's state would cost many times that.

Loading: every rank opens the whole student on the CPU and keeps its part. Weights that are stored in the student's
dtype are memory-mapped, so that the ranks of a host share one copy; others (a .gguf file, another dtype) take a whole
copy a rank until they are divided.

Shapes: W ranks, P parameters, V vocabulary, D hidden size.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lark.common.errors import LarkError
from lark.common.log import logger
from lark.common.ranks import COLLECTIVE_LIMIT
from lark.student.model_parts import decoder_layers, get_base_model
from lark.student.token_statistics import Head

SUM_BYTES = 64 * 2**20  # of gradients that are summed over ranks at a time
WHOLE_GRADIENTS = 2 * 2**30  # bytes of them that a rank keeps whole until a step's last micro-batch (LoRA's, mostly)
TRAINED = StateDictOptions(ignore_frozen_params=True, cpu_offload=True)
META = "meta.pt"  # Lightning's name for what is neither weights nor the optimizer's state


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for trainer.strategy=fsdp: one dimension of parallelism, over all ranks of all nodes."""

    def setup_environment(self) -> None:
        """Set the mesh's sizes, which Lightning would otherwise guess."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collect what is trained: each rank its part."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=TRAINED)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder of `save_checkpoint`'s, written by any number of ranks."""
        assert self.model is not None and len(self.optimizers) == 1
        path, optimizer = Path(self.broadcast(checkpoint_path)), self.optimizers[0]
        saved = {name for name, _ in self.model.named_parameters()}  # a tied weight has one name there
        weights = get_model_state_dict(self.model, options=TRAINED)
        state = {
            "state_dict": {name: value for name, value in weights.items() if name in saved},
            "optimizer_0": get_optimizer_state_dict(self.model, optimizer),
        }
        load(state, checkpoint_id=path)
        self.model.load_state_dict(state["state_dict"], strict=False)
        set_optimizer_state_dict(self.model, optimizer, state["optimizer_0"])
        return torch.load(path / META, weights_only=True)


def make_strategy(name: str) -> Any:
    """Make what a Trainer takes for trainer.strategy=`name`; a new one for each, as it keeps what it has set up."""
    if name == "ddp":
        return DDPStrategy(timeout=COLLECTIVE_LIMIT)
    # Lightning's own of that name is FSDP's first version
    return ShardedStrategy(timeout=COLLECTIVE_LIMIT) if name == "fsdp" else name


class Parallelism:
    """Spreads a student over a Trainer's devices, and adds up what ranks computed."""

    def __init__(self, trainer: Trainer | None = None):
        """Read the strategy of `trainer`; None: a student that is whole, in one process."""
        self.strategy = None if trainer is None else trainer.strategy
        self.world_size = 1 if trainer is None else trainer.world_size
        self.precision = None if trainer is None else trainer.precision
        self.is_divided = isinstance(self.strategy, ShardedStrategy) and self.world_size > 1
        """Whether every forward and backward pass takes all ranks."""
        self._lockstep: Lockstep | None = None
        self._sums_once = False

    def check_gradients(self, asked_by: str) -> None:
        """Raise LarkError where `asked_by` (a setting or pass) cannot have the student's gradients outside training."""
        if isinstance(self.strategy, ShardedStrategy):
            raise LarkError(
                f"{asked_by} needs the student's gradients, which trainer=fsdp does not give; set trainer=ddp, or "
                "choose what needs forward passes only, such as selector=lark, lark_head or rsr"
            )

    # ---- scoring

    def divide_layers(self, model: Any) -> None:
        """Divide the layers of a frozen student over the ranks, in place, where it is to be divided."""
        if self.is_divided:
            self._lockstep = Lockstep(model, self._mesh)
            logger.info("the student's layers are divided over %d ranks", self.world_size)

    def finish_forward_passes(self) -> None:
        """Take part in the other ranks' forward passes until no rank has one left; every rank calls this once."""
        if self._lockstep is not None:
            self._lockstep.finish()
            self._lockstep = None  # it holds the student

    # ---- training

    def divide_for_training(self, model: Any, method: str) -> None:
        """Divide all parameters of `model` over the ranks, in place, where it is to be divided.

        Each layer is gathered when it runs, forwards and backwards, and what stands outside them (embedding, norm,
        head; a tied one once) for as long as a micro-batch takes. Weights, gradients and the optimizer's state stay in
        the weights' dtype; with precision=bf16-mixed, bfloat16 copies are what is gathered and multiplied. `method` is
        the name of the method by which the model is called.
        """
        if not self.is_divided:
            return
        kept: dict[str, Any] = {}
        if self.precision == "bf16-mixed":
            kept = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        for layer in _known_layers(model):
            fully_shard(layer, mesh=self._mesh, mp_policy=MixedPrecisionPolicy(**kept))
        # What the root is called with are the loss's coefficients, which bfloat16 would round.
        fully_shard(model, mesh=self._mesh, mp_policy=MixedPrecisionPolicy(**kept, cast_forward_inputs=False))
        register_fsdp_forward_method(model, method)
        whole = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        self._sums_once = whole <= WHOLE_GRADIENTS

    def set_last(self, model: Any, is_last: bool) -> None:
        """Tell a divided student whether the micro-batch to come is the step's last, after which it sums its gradients
        over ranks; where they would take much memory until then, it sums them at every micro-batch.
        """
        if self.is_divided and self._sums_once:
            model.set_requires_gradient_sync(is_last)

    @property
    def loss_factor(self) -> int:
        """Factor of a loss: FSDP takes the mean over ranks, and the coefficients are the global batch's."""
        return self.world_size if self.is_divided else 1

    def keep_gradients_local(self) -> AbstractContextManager[None]:
        """Keep a data-parallel wrapper from synchronising gradients at every micro-batch."""
        strategy: Any = self.strategy
        is_wrapped = isinstance(strategy, ParallelStrategy) and not isinstance(strategy, ShardedStrategy)
        return strategy.block_backward_sync() if is_wrapped else nullcontext()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum the gradients of all ranks, in place. (A divided student has done so in its backward passes.)"""
        if self.world_size > 1 and not self.is_divided:
            sum_over_ranks(parameters)

    def gather_objects(self, found: Any) -> list[Any]:
        """Collect every rank's `found`, in the order of ranks."""
        gathered: list[Any] = [found] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, found)
        return gathered

    def find_least(self, count: int) -> int:
        """Find the least of all ranks' `count`."""
        return min(self.gather_objects(count))

    def find_refusal(self, reason: str | None) -> str | None:
        """Find a reason that any rank gives, the first one's; None where no rank gives one."""
        return next((found for found in self.gather_objects(reason) if found is not None), None)

    def collect_state(self, model: nn.Module) -> dict[str, Any] | None:
        """Put a divided student's state dict together on the CPU of rank 0 (empty elsewhere); None: it is whole. All
        ranks take part.
        """
        if not self.is_divided:
            return None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        # Gathered, a tied weight is there under each of its names, and they no longer share memory: keep the first.
        again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        again -= {name for name, _ in model.named_parameters()}
        return {name: value for name, value in state.items() if name not in again}

    @property
    def _mesh(self) -> DeviceMesh:
        strategy: Any = self.strategy
        return strategy.device_mesh["data_parallel"]  # of two dimensions fully_shard would only copy over the first


def call_as_method(model: Any, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call `function(model, *arguments)`, as a method of a divided model: it gathers what stands outside its layers for
    its own methods only.
    """
    if FSDPModule not in type(model).__mro__:
        return function(model, *arguments)
    setattr(model, function.__name__, MethodType(function, model))
    register_fsdp_forward_method(model, function.__name__)
    return getattr(model, function.__name__)(*arguments)


def gather_head(head: Head) -> Head:
    """Put the head of a divided student together, without its gradient; all ranks take part."""
    whole = {name: _gather(tensor) for name, tensor in (("weight_VD", head.weight_VD), ("bias_V", head.bias_V))}
    return replace(head, **whole)


def _gather(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def sum_over_ranks(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of all ranks, in place; what has none on any rank stays without."""
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
    """Scale all gradients together so that their norm does not exceed `largest`; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class Lockstep:
    """Divides a student's layers for forward passes, and keeps the ranks in step.

    A forward pass of the decoder takes all ranks, whatever each computes in it. Ranks have different numbers of forward
    passes to run, so each is announced; a rank that is done (`finish`) takes part in the others' with one token.
    """

    def __init__(self, model: Any, mesh: DeviceMesh):
        """Divide the layers of `model` over `mesh` [W], in place. Raises LarkError for a student without layers."""
        self.decoder: Any = get_base_model(model).get_decoder()
        self.mesh, self.running = mesh, False
        layers = _known_layers(model)
        gc.collect()  # an earlier pass's student refers to itself: it would stay on the device
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The decoder itself has nothing to gather. As the layers' root it lets a layer be gathered while another runs.
        divided = {p for layer in layers for p in layer.parameters()}
        fully_shard(self.decoder, mesh=mesh, ignored_params=set(self.decoder.parameters()) - divided)
        self._hooks = [
            self.decoder.register_forward_pre_hook(self._begin, prepend=True),
            self.decoder.register_forward_hook(self._end),
        ]

    def finish(self) -> None:
        """Take part in the other ranks' forward passes until no rank has one left."""
        for hook in self._hooks:
            hook.remove()
        token_RL = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        while self._announce(0).item() > 0:
            with torch.inference_mode():
                self.decoder(input_ids=token_RL, use_cache=False)

    def _begin(self, *_: Any) -> None:
        if self.running:
            # The other ranks wait inside the pass that this one left: it cannot be tried again in smaller parts.
            raise torch.OutOfMemoryError("a forward pass of a sharded student has failed, for want of memory it seems")
        self.running = True
        self._announce(1)

    def _end(self, *_: Any) -> None:
        self.running = False

    def _announce(self, count: int) -> Tensor:
        """Add up how many ranks have a forward pass to run now."""
        total = torch.full((), count, device=self._device)
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    @property
    def _device(self) -> torch.device:
        return next(self.decoder.parameters()).device


def _known_layers(model: Any) -> list[nn.Module]:
    layers = decoder_layers(model)
    if not layers:
        raise LarkError(
            f"trainer=fsdp divides a student's decoder layers, but {type(model).__name__} has none that are known; "
            "set trainer=ddp"
        )
    return layers
