"""What every test runs under (one thread, no network, caches of its own), and a small student with a small pool."""

import json
import os
import random
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

_HOME = tempfile.mkdtemp(prefix="lark-tests-")
os.environ |= {  # read when torch and transformers are first imported
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _HOME,
    "WANDB_MODE": "offline",
}


def pytest_unconfigure():
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="module")
def browser():
    """A real headless Chromium, which `make test` installs where it may (root on Debian). No index of Python packages
    has one, so elsewhere it is the user's to install; what could not be tried is named in the summary, with how to.
    """
    from browser import MISSING, chromium, launched

    if chromium() is None:
        pytest.skip(MISSING)
    with launched() as started:
        yield started


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections to anything but this machine fail, whoever makes them."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise PermissionError(f"a test connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    """A random student of two layers that reads bytes, as a folder to load from."""
    from tiny_student import byte_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("student")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of_a_pool(problems=8, candidates=4):
    """Sums, each solved at different length; problem 0's verdicts are left to the checker."""
    rng = random.Random(0)
    rows = []
    for problem in range(problems):
        a, b = rng.randrange(90), rng.randrange(90)
        for candidate in range(candidates):
            steps = [f"{word} {a} and {b}.\n" for word in rng.choices(["Take", "Add", "Now", "See"], k=candidate)]
            correct = rng.random() < 0.7
            text = "".join(steps) + f"So \\boxed{{{a + b + (not correct)}}}"
            rows.append(
                {
                    "problem_id": str(problem),
                    "candidate_id": str(candidate),
                    "teacher": f"teacher {candidate}",
                    "messages": [
                        {"role": "user", "content": f"What is {a} + {b}?"},
                        {"role": "assistant", "content": text},
                    ],
                    "answer": str(a + b),
                    "correct": None if problem == 0 else correct,
                    "truth": correct,
                }
            )
    return rows


def write_pool(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_student(student_folder):
    from lark.student.student import Student

    return lambda **settings: Student(**{"name": "small", "path": str(student_folder), **settings})


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Trainer that says and writes nothing."""


@pytest.fixture
def make_trainer(tmp_path):
    from lightning import Trainer

    return lambda **settings: Trainer(**QUIET | {"default_root_dir": tmp_path} | settings)


@pytest.fixture
def make_data(tmp_path, make_student, make_trainer):
    """A TrajectoryDataModule over the small pool; settings go to the part they are named after, and `selector` and
    `baseline` may be other scores than lark's and random, `scorer` another student to ask."""
    from lark.scoring.pass_module import ScoringSettings
    from lark.selection.policies import Chi2, TopB
    from lark.selection.rule import Rule
    from lark.selection.scores.statistics import Lark, Random
    from lark.tasks.task import Task
    from lark.training.datamodule import TrajectoryDataModule
    from lark.training.recipe import Recipe

    def make(rows=None, *, cache="cache", task=None, probe=None, recipe=None, student=None, trainer=None, **rules):
        pool = write_pool(tmp_path / f"{cache}.jsonl", rows_of_a_pool() if rows is None else rows)
        fixed = {"name": "sums", "pool": str(pool), "checker": "number", "held_out": 0.25, "max_length": 256}
        return TrajectoryDataModule(
            task=Task(**fixed | (task or {})),
            student=make_student(**student or {}),
            scorer=rules.get("scorer"),
            selector=Rule(name="lark", score=rules.get("selector", Lark()), policy=Chi2(budget=2)),
            baseline=Rule(name="random", score=rules.get("baseline", Random(seed=0)), policy=TopB(budget=2)),
            recipe=Recipe(**{"steps": 4, "batch_size": 6, "lr": 1e-3} | (recipe or {})),
            probe=replace(ScoringSettings(batch_tokens=600), **probe or {}),
            seed=0,
            cache=tmp_path / cache,
            make_trainer=lambda label: make_trainer(**{"inference_mode": False} | (trainer or {})),
        )

    return make
