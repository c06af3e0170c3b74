"""What a run will do, decided once by rank 0 and obeyed by the others.

Ranks must not look at caches or locks of their own accord: another job may complete a cache between rank 0's look and
theirs. Under ddp the first Trainer that needs it re-executes the command for every further rank: rank 0 writes
plan.json into the run folder before the first Trainer; a child process finds the folder in LARK_RUN. Ranks that
torchrun or SLURM's srun started run from the start, and get the plan sent.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from lark.common.cache import hold_lock, read_json, write_json
from lark.common.errors import LarkError

RUN_VARIABLE = "LARK_RUN"
_LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", RUN_VARIABLE)
_NO_LIMIT = timedelta(days=7)
COLLECTIVE_LIMIT = timedelta(minutes=30)
"""Limits how long a rank waits for the others in a sum of gradients or a gathering of weights."""

Claim = Callable[[str, Path, Callable[[], bool]], AbstractContextManager[bool]]
"""Takes (name, folder, is_done); yields true where the work is to be done here, under a lock until the block ends."""


@contextmanager
def claim_alone(name: str, folder: Path, is_done: Callable[[], bool]) -> Iterator[bool]:
    """Serve as the `Claim` of a process that works alone."""
    yield not is_done()


def is_main() -> bool:
    return rank_zero_only.rank == 0


def say(text: str) -> None:
    """Derived facts, once (not once a rank)."""
    if is_main():
        print(text, flush=True)


def world_size() -> int:
    """Processes that run this job together; 1 before Lightning has launched any."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@cache
def gloo_group_without_limit(world: Any) -> Any:
    """All ranks of `world` once more, for what may take hours: rank 0 waits while another job trains an arm that this
    one needs too, and the group that gradients go through gives up after half an hour at most.
    """
    assert world is dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=_NO_LIMIT)


def barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier(group=gloo_group_without_limit(dist.group.WORLD))


class Plan:
    """plan.json: whether each pass and arm is run, trained or reused, by name and hash, and `arms` (name -> hash and
    action) once they are known.
    """

    def __init__(self, folder: Path):
        self.path = folder / "plan.json"
        self.values: dict[str, Any] = {}

    def share(self, **values: Any) -> None:
        """On rank 0 write `values` into the plan; on the others learn them. Ranks that already run get them sent (under
        torchrun each was started with a run folder of its own), those launched later read them from the file.
        """
        if is_main():
            os.environ[RUN_VARIABLE] = str(self.path.parent.resolve())  # for children launched from here on
            self.values |= values
            write_json(self.path, self.values)
        if dist.is_available() and dist.is_initialized():
            sent = [self.values]
            dist.broadcast_object_list(sent, src=0, group=gloo_group_without_limit(dist.group.WORLD))
            self.values = sent[0]
        elif not is_main():
            self.values = read_json(self.path)

    def decide(self, key: str, value: Any) -> Any:
        """Return on every rank what rank 0 passes as `value`, and keep it in the plan."""
        self.share(**{key: value})
        return self.values[key]

    @contextmanager
    def claim(self, name: str, folder: Path, is_done: Callable[[], bool]) -> Iterator[bool]:
        """Yield whether a piece of work is to be done, which rank 0 finds out; it then holds the folder's lock until
        the block ends.
        """
        with ExitStack() as held:
            if is_main() and not is_done():
                held.enter_context(hold_lock(folder))
            yield self.decide(f"{name} {folder.name}", "reuse" if is_main() and is_done() else "run") == "run"

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def _of_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _of_srun() -> bool:
    """Tell if SLURM started this process as one of several. Jobs of these two names are shells, for Lightning too."""
    several = int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return several and not _of_torchrun() and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def environment() -> ClusterEnvironment | None:
    """What every Trainer of the job takes as a plugin; None: as Lightning finds.

    Left to itself inside SLURM, Lightning would requeue the job by itself, with a checkpoint in the run folder that the
    next arm then took for its own; and it would wait for srun to start the ranks of a job that has one task.
    """
    if _of_srun():
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment() if "SLURM_NTASKS" in os.environ and not _of_torchrun() else None


def start_ranks() -> None:
    """Join the ranks that torchrun or srun (one task a device) started, so that they can wait for rank 0's plan.

    Raises LarkError where a scheduler started them in a way that is not supported.
    """
    if _of_torchrun() and not dist.is_initialized():
        dist.init_process_group(timeout=COLLECTIVE_LIMIT)
    if _of_srun() and not dist.is_initialized():
        _check_srun()
        slurm = SLURMEnvironment(auto_requeue=False)
        dist.init_process_group(
            init_method=f"tcp://{slurm.main_address}:{slurm.main_port}",
            rank=slurm.global_rank(),
            world_size=slurm.world_size(),
            timeout=COLLECTIVE_LIMIT,
        )
    if not is_main() and not dist.is_initialized() and RUN_VARIABLE not in os.environ:
        raise LarkError(
            f"this process is rank {rank_zero_only.rank} of several that a scheduler started, which only torchrun and "
            "SLURM's srun (in a job whose name is not bash or interactive) are supported for; start one task a node "
            "and let it run torchrun -m lark.run ... trainer=ddp"
        )


def _check_srun() -> None:
    tasks = os.environ["SLURM_NTASKS"]
    if "SLURM_STEP_ID" not in os.environ:
        raise LarkError(
            f"SLURM has {tasks} tasks for this job, but none of them was started: srun is missing; put srun before "
            "python -m lark.run ..., or srun --ntasks=1 for one process"
        )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise LarkError(
            f"SLURM started {tasks} tasks without saying how many a node; set --ntasks-per-node=<devices a node> in "
            "place of --ntasks"
        )


def check_ranks(used: int, trainer: str) -> None:
    """LarkError unless the ranks that were started are the `used` ones that Trainers of the option `trainer` count on;
    to be called before the first Trainer launches any itself.
    """
    started = world_size()
    if started != used and dist.is_initialized():
        raise LarkError(
            f"{started} process{'es were' if started > 1 else ' was'} started, but trainer={trainer} uses {used}; set "
            "trainer=ddp trainer.devices=<processes a node> trainer.num_nodes=<nodes>, or start "
            f"{'one process' if used == 1 else f'{used} processes'}"
        )


@contextmanager
def in_ranks(*, out_of_memory: str) -> Iterator[None]:
    """A job, from joining its ranks to leaving them. Raises LarkError with the remedy `out_of_memory` where a device
    runs out of memory.
    """
    start_ranks()
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LarkError(f"the device ran out of memory; {out_of_memory}") from error
    finally:
        leave_ranks()


def leave_ranks() -> None:
    """End of a job: what launched its ranks must not leak into the next job of a multirun in this process."""
    launched_here = os.environ.pop(RUN_VARIABLE, None) and not (_of_torchrun() or _of_srun())
    if launched_here:
        if dist.is_available() and dist.is_initialized():
            gloo_group_without_limit.cache_clear()
            dist.destroy_process_group()
        for name in _LAUNCH_VARIABLES:
            os.environ.pop(name, None)
