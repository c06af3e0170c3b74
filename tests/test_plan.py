"""What rank 0 decides and the others learn, and what a job leaves in the environment.

Ranks that run together, launched by Lightning or by torchrun, are in test_equivalence.py.
"""

import os

import pytest
import torch.distributed as dist

from lark.cache import read_json, write_json
from lark.plan import RUN_VARIABLE, Plan, leave_ranks, start_ranks


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (RUN_VARIABLE, "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
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
    monkeypatch.setattr("lark.plan.is_main", lambda: False)
    write_json(tmp_path / "plan.json", {"score": False})
    plan = Plan(tmp_path)
    plan.share(score=True)  # what it found itself does not count
    assert plan["score"] is False


def test_nothing_is_joined_without_a_launcher():
    start_ranks()
    assert not dist.is_initialized()
