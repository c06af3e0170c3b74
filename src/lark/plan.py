"""What a run will do, decided once by rank 0 and obeyed by the others.

Under ddp the first Trainer that needs it re-executes the command for every further rank. Those processes must not
look at caches or locks of their own accord: another job may complete a cache between rank 0's look and theirs. So
rank 0 writes plan.json into the run folder before the first Trainer; a child process finds the folder in LARK_RUN.
"""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from lark.cache import read_json, write_json

RUN_VARIABLE = "LARK_RUN"
_LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", RUN_VARIABLE)


def is_main() -> bool:
    return rank_zero_only.rank == 0


def world_size() -> int:
    """Processes that run this job together; 1 before Lightning has launched any."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


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
            dist.broadcast_object_list(sent, src=0)
            self.values = sent[0]
        elif not is_main():
            self.values = read_json(self.path)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def start_ranks() -> None:
    """Under torchrun all ranks run from the start: join them, so that they can wait for rank 0's plan."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group()
    if not is_main() and not dist.is_initialized() and RUN_VARIABLE not in os.environ:
        raise ValueError(
            f"this process is rank {rank_zero_only.rank} of several that a scheduler started, which only torchrun is "
            "supported for; start one task a node and let it run torchrun -m lark.run ... trainer=ddp"
        )


def leave_ranks() -> None:
    """End of a job: what launched its ranks must not leak into the next job of a multirun in this process."""
    launched_here = os.environ.pop(RUN_VARIABLE, None) and "TORCHELASTIC_RUN_ID" not in os.environ
    if launched_here:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        for name in _LAUNCH_VARIABLES:
            os.environ.pop(name, None)
