"""Students too large for one device: their layers are divided over all ranks, for scoring and for training.

FSDP2: a rank keeps 1/W of every layer's weights; a layer is gathered from the W ranks when it runs, and dropped again.

Scoring: embedding, head and what else stands outside the layers stay whole on every rank: the head is needed whole for
every batch, as its logits are computed in chunks outside a forward pass, and a tied embedding is the same tensor. They
cost V x D weights a rank, twice that if not tied (2.2 GB for Qwen2.5-7B in bfloat16, 4.2 GB for Llama-3.1-70B).
Training: they are divided too, as their gradients and the optimizer's state would cost many times that.

Loading: every rank opens the whole student on the CPU and keeps its part. Weights that are stored in the student's
dtype are memory-mapped, so that the ranks of a host share one copy; others (a .gguf file, another dtype) take a whole
copy a rank until they are divided.

Shapes: W ranks, V vocabulary, D hidden size.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lark.common.errors import LarkError
from lark.scoring.gradients import decoder_layers
from lark.scoring.passes import GradientMatches, Gradients, LossDrops, Pass, ProjectedGradients
from lark.selection.selection import Rule
from lark.student.student import get_base_model

NEED_GRADIENTS = (Gradients, LossDrops, ProjectedGradients, GradientMatches)
TRAINED = StateDictOptions(ignore_frozen_params=True, cpu_offload=True)
META = "meta.pt"  # Lightning's name for what is neither weights nor the optimizer's state


class ShardedStrategy(ModelParallelStrategy):
    """What trainer.strategy=fsdp stands for: one dimension of parallelism, over all ranks of all nodes."""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of what is trained: each rank its part."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=TRAINED)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A folder of `save_checkpoint`'s, written by any number of ranks."""
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


def check_sharded(strategy: Strategy, *, rules: Mapping[str, Rule]) -> None:
    """ValueError where a run under trainer=fsdp would come to what it cannot do, to be called before it computes."""
    if isinstance(strategy, ShardedStrategy):
        for name, rule in rules.items():
            for need in rule.needs:
                check_forward_only(need, f"{name}={rule.name}")


def check_forward_only(wanted: Pass, asked_by: str) -> None:
    """LarkError for a pass that needs gradients."""
    if isinstance(wanted, NEED_GRADIENTS):
        raise LarkError(
            f"{asked_by} needs the student's gradients, which trainer=fsdp does not give; set trainer=ddp, or choose a "
            "rule that needs forward passes only, such as lark, lark_head or rsr"
        )


class Lockstep:
    """The ranks' parts of a student's layers, and the means to keep the ranks in step.

    A forward pass of the decoder takes all ranks, whatever each computes in it. Ranks have different numbers of forward
    passes to run, so each is announced; a rank that is done (`finish`) takes part in the others' with one token.
    """

    def __init__(self, model: Any, mesh: DeviceMesh):
        """Divides the layers of `model` over `mesh` [W], in place. Raises LarkError for a student without layers."""
        self.decoder: Any = get_base_model(model).get_decoder()
        self.mesh, self.running, self._hooks = mesh, False, []
        layers = decoder_layers(model)
        if not layers:
            raise LarkError(
                f"trainer=fsdp divides a student's decoder layers, but {type(model).__name__} has none that are known; "
                "set trainer=ddp"
            )
        self.layer_bytes = sum(p.nbytes for layer in layers for p in layer.parameters())
        self.other_bytes = sum(p.nbytes for p in model.parameters()) - self.layer_bytes
        if mesh.size() > 1:
            self._divide(layers)

    def _divide(self, layers: list[nn.Module]) -> None:
        gc.collect()  # an earlier pass's student refers to itself: it would stay on the device
        for layer in layers:
            fully_shard(layer, mesh=self.mesh, reshard_after_forward=True)
        # The decoder itself has nothing to gather. As the layers' root it lets a layer be gathered while another runs.
        divided = {p for layer in layers for p in layer.parameters()}
        fully_shard(self.decoder, mesh=self.mesh, ignored_params=set(self.decoder.parameters()) - divided)
        self._hooks = [
            self.decoder.register_forward_pre_hook(self._begin, prepend=True),
            self.decoder.register_forward_hook(self._end),
        ]

    def describe(self) -> str:
        ranks = self.mesh.size()
        layers, each, rest = (x / 2**20 for x in (self.layer_bytes, self.layer_bytes / ranks, self.other_bytes))
        return (
            f"sharded     the layers' {layers:,.1f} MiB over {ranks} rank{'s' * (ranks > 1)}, {each:,.1f} MiB each; "
            f"embedding, head and norm, {rest:,.1f} MiB, whole on every rank"
        )

    def finish(self) -> None:
        """To be called by every rank once it has no forward pass left to run; returns when no rank has one."""
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
        """How many ranks have a forward pass to run now."""
        total = torch.full((), count, device=self._device)
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    @property
    def _device(self) -> torch.device:
        return next(self.decoder.parameters()).device
