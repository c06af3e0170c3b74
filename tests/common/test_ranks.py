"""What rank 0 decides and the others learn, and what a job leaves in the environment.

Ranks that run together, launched by Lightning or by torchrun, are in test_equivalence.py, by SLURM in test_cluster.py.
"""

import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from lark.common.cache import read_json, write_json
from lark.common.ranks import RUN_VARIABLE, Plan, barrier, check_ranks, environment, leave_ranks, start_ranks

SRUN = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "lark", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    known = (*SRUN, "SLURM_STEP_ID", "SLURM_NTASKS_PER_NODE", RUN_VARIABLE, "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
    for name in known:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the code under test sets
        monkeypatch.delenv(name)


def test_rank_0_writes_what_it_knows_and_shows_the_folder_to_children(tmp_path):
    plan = Plan(tmp_path)
    plan.share(score=True)
    plan.share(arms={"selector": {"hash": "a", "action": "train"}})
    assert read_json(tmp_path / "plan.json") == plan.values == {"score": True, "arms": plan["arms"]}
    assert os.environ[RUN_VARIABLE] == str(tmp_path)
    leave_ranks()
    assert RUN_VARIABLE not in os.environ


def test_a_rank_launched_later_obeys_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lark.common.ranks.is_main", lambda: False)
    write_json(tmp_path / "plan.json", {"score": False})
    plan = Plan(tmp_path)
    plan.share(score=True)  # what it found itself does not count
    assert plan["score"] is False


def test_nothing_is_joined_without_a_launcher():
    start_ranks()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        (SRUN, SLURMEnvironment),
        (SRUN | {"SLURM_NTASKS": "1"}, LightningEnvironment),  # it starts the ranks of a job with one task itself
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, LightningEnvironment),
        (SRUN | {"TORCHELASTIC_RUN_ID": "1"}, None),  # torchrun inside a job of SLURM's
    ],
)
def test_who_starts_the_ranks(settings, expected, monkeypatch):
    for name, value in ({"SLURM_NTASKS_PER_NODE": "2"} | settings if settings else {}).items():
        monkeypatch.setenv(name, value)
    found = environment()
    assert type(found) is (expected or type(None))
    assert not getattr(found, "auto_requeue", False), "it would leave a checkpoint that the next arm takes for its own"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SRUN | {"SLURM_NTASKS_PER_NODE": "2"}, "SLURM has 2 tasks for this job, but none of them was started"),
        (SRUN | {"SLURM_STEP_ID": "0"}, "set --ntasks-per-node=<devices a node>"),
    ],
)
def test_what_would_wait_for_ever_is_an_error(settings, words, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        start_ranks()


def test_a_rank_of_another_scheduler_is_told_what_works(monkeypatch):
    monkeypatch.setattr("lark.common.ranks.is_main", lambda: False)
    with pytest.raises(ValueError, match=r"torchrun -m lark\.run"):
        start_ranks()


def test_ranks_that_trainers_do_not_use(tmp_path):
    check_ranks(4, "ddp")  # nobody was started yet: the Trainer starts four
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check_ranks(1, "auto")
        with pytest.raises(ValueError, match=r"1 process was started, but trainer=ddp uses 2; .* or start 2 processes"):
            check_ranks(2, "ddp")
    finally:
        dist.destroy_process_group()


def _rank_that_keeps_the_other_waiting(rank: int, folder: Path) -> None:
    rank_zero_only.rank = rank
    a_moment = timedelta(seconds=1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=a_moment)
    plan = Plan(folder)
    plan.share(first=rank)
    time.sleep(2 if rank == 0 else 0)
    plan.share(second=rank)
    time.sleep(2 if rank == 1 else 0)
    barrier()
    assert plan.values == {"first": 0, "second": 0}


def test_ranks_wait_for_the_plan_longer_than_for_a_gradient(tmp_path):
    """Rank 0 may wait for hours for an arm that another job trains."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank_that_keeps_the_other_waiting, args=(rank, tmp_path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
