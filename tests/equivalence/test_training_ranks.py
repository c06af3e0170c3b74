"""Training over several ranks: two real processes against one, whole students (ddp) and divided ones (fsdp)."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUIET, rows_of_a_pool, write_pool
from lightning import Trainer
from torch.multiprocessing.spawn import spawn

from lark.scoring.pass_module import ScoringSettings
from lark.selection.policies import Chi2
from lark.selection.rule import Rule
from lark.selection.scores.statistics import Lark
from lark.student.distributed import ShardedStrategy
from lark.student.student import Student, save_student
from lark.tasks.task import Task
from lark.training.recipe import Recipe
from lark.training.sft_module import SFTModule

pytestmark = pytest.mark.slow  # two real processes
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
STEPS = 5
UNEVEN = {"batch_size": 7, "micro_batch_tokens": 150, "average": "token"}
ON_ONE: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"student": {"lora": LORA}},
    "uneven": {"recipe": UNEVEN},
    "memory": {"recipe": {"batch_size": 7, "micro_batch_tokens": 800}},
}
ON_TWO_RANKS = {
    **{f"{name}-ddp": words | {"strategy": "ddp"} for name, words in ON_ONE.items() if name != "memory"},
    **{f"{name}-fsdp": words | {"strategy": "fsdp"} for name, words in ON_ONE.items() if name != "memory"},
    "memory-ddp": ON_ONE["memory"] | {"strategy": "ddp", "fails": {"rank": 1, "most": 220}},
}


def make(folder: Path, student: dict[str, Any], recipe: dict[str, Any], trainer):
    from lark.training.datamodule import TrajectoryDataModule

    return TrajectoryDataModule(
        task=Task(name="sums", pool=str(folder / "pool.jsonl"), checker="number", held_out=0.25, max_length=256),
        student=Student(**{"name": "small", **student}),
        selector=Rule(name="lark", score=Lark(), policy=Chi2(budget=2)),
        baseline=None,
        recipe=Recipe(**{"steps": STEPS, "batch_size": 4, "lr": 1e-4, "micro_batch_tokens": 1} | recipe),
        probe=ScoringSettings(batch_tokens=600),
        seed=0,
        cache=folder / "cache",
        make_trainer=lambda label: trainer,
    )


def train(folder: Path, results: Path, words: dict[str, Any], *, devices: int = 1) -> None:
    """Train a student on the folder's pool; rank 0 leaves its weights and curve in `results`."""
    strategy = ShardedStrategy() if words.get("strategy") == "fsdp" else words.get("strategy", "auto")
    steps = {"max_steps": STEPS, "num_sanity_val_steps": -1, "use_distributed_sampler": False}
    settings: dict[str, Any] = QUIET | {"strategy": strategy, "devices": devices, "default_root_dir": results} | steps
    trainer = Trainer(**settings)
    data = make(folder, words["student"], words.get("recipe", {}), trainer)
    data.prepare_data()
    data.score()  # from the cache
    data.select()
    selection = data.selections["selector"]
    uneven = np.random.default_rng(0).uniform(0.2, 3, len(selection.row))
    data.selections["selector"] = type(selection)(**{**vars(selection), "weight": uneven})
    module = SFTModule(student=data.student, recipe=data.recipe, steps=STEPS, seed=0, folder=results)
    if "fails" in words:
        _fail(module, **words["fails"])
    trainer.fit(module, datamodule=data)
    state = module.parallelism.collect_state(module.student_model)
    kept = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in module.student_model.parameters())
    if trainer.is_global_zero:
        weights = module.student_model.state_dict() if state is None else state
        names = [name for name, _ in module.student_model.named_parameters()]  # a tied weight once
        torch.save({name: weights[name] for name in names}, results / "weights.pt")
        save_student(module.student_model, data.trajectories.chat, results / "student", state=state)
        facts = {"curve": module.curve, "totals": module.totals, "kept": kept, "budget": module.budget}
        (results / "facts.json").write_text(json.dumps(facts))


def _fail(module: SFTModule, *, rank: int, most: int) -> None:
    """Of that rank, micro-batches of more tokens than `most`."""
    loss = module.loss

    def failing(micro, coefficient_CR):
        if module.trainer.training and module.global_rank == rank and micro.tokens > most:
            raise torch.OutOfMemoryError("out of memory")
        return loss(micro, coefficient_CR)

    module.loss = failing


def _rank(rank: int, port: int, folder: Path, results: Path, student: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    for name, words in ON_TWO_RANKS.items():
        train(folder, results / name, _with_path(words, student), devices=2)
    torch.distributed.destroy_process_group()


def _with_path(words: dict[str, Any], student: str) -> dict[str, Any]:
    return {**words, "student": {"path": student, **words.get("student", {})}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, student_folder):
    """A pool whose statistics are known, so that ranks have nothing to score."""
    folder = tmp_path_factory.mktemp("ranks")
    write_pool(folder / "pool.jsonl", rows_of_a_pool(problems=20))
    trainer = Trainer(**QUIET, inference_mode=False)
    data = make(folder, {"path": str(student_folder)}, {}, trainer)
    data.prepare_data()
    data.score()
    return folder


@pytest.fixture(scope="module")
def trained(folder, student_folder, tmp_path_factory):
    """By name, the weights and facts of what two ranks trained (all in one pair of processes), and of one process."""
    results = tmp_path_factory.mktemp("trained")
    for name in (*ON_TWO_RANKS, *ON_ONE):
        (results / name).mkdir()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    spawn(_rank, (port, folder, results, str(student_folder)), nprocs=2)
    for name, words in ON_ONE.items():
        train(folder, results / name, _with_path(words, str(student_folder)))

    def read(name: str):
        weights = torch.load(results / name / "weights.pt", weights_only=True)
        return weights, json.loads((results / name / "facts.json").read_text())

    read.folder = results  # type: ignore[attr-defined]
    return read


def assert_same(ours, theirs):
    (weights, facts), (expected, expected_facts) = ours, theirs
    assert set(weights) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(facts["curve"], expected_facts["curve"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("trains", ["full", "lora"])
def test_two_ranks_of_two_micro_batches_equal_one_of_four(strategy, trains, trained):
    two = trained(f"{trains}-{strategy}")
    one = trained(trains)
    share = two[1]["kept"] / one[1]["kept"]  # of the student, on rank 0
    assert share == 1 if strategy == "ddp" else share == pytest.approx(0.5, rel=0.01)  # rows may be odd in number
    assert_same(two, one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_with_different_numbers_of_micro_batches(strategy, trained):
    assert_same(trained(f"uneven-{strategy}"), trained("uneven"))


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_a_divided_student_is_saved_whole(trains, trained, student_folder):
    student = Student(name="small", path=str(student_folder), lora=ON_ONE[trains].get("student", {}).get("lora"))
    folders = [trained.folder / name / "student" for name in (f"{trains}-fsdp", trains)]
    ours, theirs = (student.load_trained(one, torch.float32).state_dict() for one in folders)
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_out_of_memory_on_one_rank_halves_the_micro_batches_of_both(trained):
    two = trained("memory-ddp")
    assert two[1]["totals"]["halvings"] >= 1 and two[1]["budget"] <= 220
    assert_same(two, trained("memory"))
