"""Multiruns: every rule from the passes it needs and no more, nothing computed twice, at once, killed and gone on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lark_command import SMALL, Done, lark

from lark.common.cache import read_json
from lark.config import list_options
from lark.student.student import Student

FORWARD = (
    "casl",
    "drop_first",
    "entropy",
    "lark",
    "lark_length",
    "likelihood",
    "perplexity_high",
    "rank",
    "rho_length",
    "rsr",
)
"""The rules that the one forward pass serves."""
FREE = ("all", "correct", "longest", "random", "rule_quality", "shortest", "teacher", "teacher_matched_random")
SELECTION = ("stop_after=selection", "task.limit=24", "logger=csv")


def sweep(logs: Path, *words: str) -> Done:
    done = lark("-m", f"paths.logs={logs}", *words)
    assert done.code == 0, done.err + done.out
    return done


def logged(logs: Path) -> str:
    """What all jobs logged."""
    return "".join(path.read_text() for path in logs.glob("multiruns/*/*/run.log"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rows that went through a scoring student."""
    rows: list[tuple[int, ...]] = []
    load = Student.load_model

    def hook(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        rows.extend(map(tuple, keywords["input_ids"].tolist()))

    def hooked(self: Student, dtype: torch.dtype, **settings: bool):
        model = load(self, dtype, **settings)
        model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
        return model

    monkeypatch.setattr(Student, "load_model", hooked)
    return rows


@pytest.mark.slow
def test_every_forward_rule_comes_from_one_pass(seen: list, tmp_path: Path) -> None:
    """The student sees each row once, whatever the rules, seeds and clips of the sweep (eager attention takes
    one row a forward pass).
    """
    baselines = ",".join(FORWARD)
    sweep(tmp_path, *SELECTION, f"baseline={baselines}", "seed=0,1", "model.attention=eager")
    assert logged(tmp_path).count("statistics: scoring") == 1
    (table,) = {pq.read_table(path).num_rows for path in tmp_path.glob("multiruns/*/*/statistics.parquet")}
    assert len(seen) == table > 100
    (manifest,) = tmp_path.glob("cache/statistics/*/manifest.json")
    assert sum(map(len, seen)) == read_json(manifest)["forward_tokens"]
    seen.clear()
    sweep(
        tmp_path,
        *SELECTION,
        "selector=rsr",
        "selector.score.clip=50,500,null",
        "baseline=none",
        "model.attention=eager",
    )
    assert seen == []


@pytest.mark.slow
def test_rules_that_need_no_student_get_none(seen: list, tmp_path: Path) -> None:
    sweep(tmp_path, *SELECTION, "selector=longest", f"baseline={','.join(FREE)}")
    assert seen == []
    assert not (tmp_path / "cache" / "statistics").exists()
    for job, rule in enumerate(FREE):  # every score under its rule's name, also beside a column of that name
        columns = pq.read_table(next(tmp_path.glob(f"multiruns/*/{job}/statistics.parquet"))).column_names
        assert {"longest", "teacher (score)" if rule == "teacher" else rule} <= set(columns)


@pytest.mark.slow
def test_each_further_pass_runs_once(tmp_path: Path) -> None:
    """Rules that share a pass share its cache, and a cached pass loads no student."""
    words = [*SELECTION, "task.limit=6", "selector=longest", "baseline=local_likelihood,ifd,lark_exact,grad_norm"]
    sweep(tmp_path, *words)
    for name in ("statistics", "local windows", "content alone", "gradients"):
        assert logged(tmp_path).count(f" {name}: scoring") == 1, name
    sweep(tmp_path, *words)
    assert logged(tmp_path).count(": scoring") == 4


def test_every_rule_is_in_these_lists_or_has_a_pass_of_its_own(tmp_path: Path) -> None:
    own = {"coverage", "grace", "grad_match", "grad_norm", "ifd", "judge", "lark_exact", "lark_head"}
    own |= {"local_likelihood", "loss_drop", "custom"}
    assert {*FORWARD, *FREE, *own} == set(list_options("selector"))


# ---- at once, killed, failed


def start(logs: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lark.run", "-m", *SMALL, f"paths.logs={logs}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def jobs(logs: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in logs.glob("multiruns/*/*/summary.json")}


def trained(logs: Path) -> int:
    return len(list(logs.glob("arms/*/trained.json")))


@pytest.mark.slow
def test_two_jobs_at_once_train_nothing_twice_and_end_with_the_comparison(tmp_path: Path) -> None:
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "baseline=random,longest,shortest", "seed=0"]
    out, _ = (process := start(tmp_path, *words)).communicate(timeout=240)
    assert process.returncode == 0, out
    finished = jobs(tmp_path)
    assert {job["status"] for job in finished.values()} == {"finished"} and len(finished) == 3
    actions = [arm["action"] for job in finished.values() for arm in job["arms"].values()]
    assert actions.count("train") == trained(tmp_path) == 4, "the selector's student and three baselines'"
    assert actions.count("evaluate") == 1, "the untrained student"
    assert logged(tmp_path).count("statistics: scoring") == 1
    assert len(list(tmp_path.glob("multiruns/*"))) == 1
    for rule in ("random", "longest", "shortest"):
        assert f"lark - {rule}" in out


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    words = ["baseline=random,longest", "seed=0,1"]
    process = start(tmp_path, *words)
    deadline = time.monotonic() + 200
    while trained(tmp_path) < 3:
        assert process.poll() is None and time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("arms/*/trained.json")}
    out, _ = (again := start(tmp_path, *words)).communicate(timeout=240)
    assert again.returncode == 0, out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert trained(tmp_path) == 6
    assert {job["status"] for job in jobs(tmp_path).values()} == {"finished"} and len(jobs(tmp_path)) == 4
    assert logged(tmp_path).count("statistics: scoring") == 1
