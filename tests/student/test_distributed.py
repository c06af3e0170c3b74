"""Passes over several ranks: a student divided over them (trainer=fsdp), and a whole student on each (ddp)."""

import json
import re
import weakref
from pathlib import Path
from subprocess import Popen
from typing import Any

import lark_process
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from lark_command import lark
from lark_process import TWO_DEVICES, finish, kill_when
from lightning import Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from lark.common.cache import read_json
from lark.common.errors import LarkError
from lark.common.table_cache import read_row_numbers
from lark.scoring.passes import Gradients
from lark.scoring.statistics_pass import PassModule
from lark.student.distributed import Lockstep, ShardedStrategy
from lark.student.student import Student, compute_hidden_states, get_base_model, get_head

SHARD_ROWS = 10
COMMAND = (
    *("task.limit=12", "logger=csv", "stop_after=selection", "baseline=local_likelihood"),
    *("probe.batch_tokens=300", f"probe.shard_rows={SHARD_ROWS}"),
)
TRACED = """
import os, time
from lark import run
from lark.scoring.statistics_pass import PassModule

step = PassModule.predict_step

def traced(self, batch, batch_idx):
    result = step(self, batch, batch_idx)
    with open(os.environ["TRACE"], "a") as file:
        file.write(f"{self.global_rank} {' '.join(map(str, batch[0]))}\\n")
    if batch_idx + 1 == int(os.environ["STOP"]):
        time.sleep(600)
    return result

PassModule.predict_step = traced
run.main()
"""
"""The command; says which rows a rank has measured, and goes to sleep after so many units."""


# ---- one student, divided


def _rank_of_two(rank: int, folder: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = Student(name="small", path=folder).load_model(torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 256, (rows, 40), generator=generator) for rows in (1, 4, 2)]
    head = get_head(model).weight_VD
    layers: Any = get_base_model(model).get_decoder().layers

    with torch.inference_mode():
        whole = [compute_hidden_states(model, ids_RL, None) for ids_RL in batches]
    before = [weakref.ref(p) for p in layers.parameters()]
    lockstep = Lockstep(model, mesh)
    not_freed = sum(p() is not None for p in before)
    with torch.inference_mode():
        mine = range(3) if rank == 0 else ()  # rank 1 has nothing to do
        divided = [compute_hidden_states(model, batches[i], None) for i in mine]
    lockstep.finish()
    dist.barrier()  # nobody still waits in a forward pass
    found = {
        "difference": max((float((a - b).abs().max()) for a, b in zip(divided, whole, strict=False)), default=0.0),
        "passes": len(divided),
        "kept": sum(p.to_local().numel() for p in layers.parameters()),
        "all": sum(p.numel() for p in layers.parameters()),
        "not_freed": not_freed,
        "head_is_whole": get_head(model).weight_VD is head and type(head) is torch.nn.Parameter,
        "raised": [],
    }

    model = Student(name="small", path=folder).load_model(torch.float32).eval().requires_grad_(False)
    lockstep = Lockstep(model, mesh)
    layers = get_base_model(model).get_decoder().layers
    layers[1].mlp.forward = _out_of_memory
    for ids_RL in (batches[1], batches[1][:2]):  # a batch, and half of it
        try:
            with torch.inference_mode():
                compute_hidden_states(model, ids_RL, None)
        except torch.OutOfMemoryError as error:
            found["raised"].append(str(error))
    Path(results, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.slow
def test_two_ranks_keep_half_the_layers_each_and_may_have_uneven_work(student_folder, tmp_path):
    spawn(_rank_of_two, (str(student_folder), str(tmp_path)), nprocs=2)
    for rank, passes in enumerate((3, 0)):
        found = read_json(tmp_path / f"{rank}.json")
        assert found["difference"] == 0 and found["passes"] == passes
        assert found["kept"] == found["all"] / 2 and found["not_freed"] == 0 and found["head_is_whole"]
        # the other ranks wait inside the pass that failed: a smaller one is not what they wait for
        assert found["raised"][0] == "no memory" and "of a sharded student has failed" in found["raised"][1]


# ---- what it is not for


def test_a_pass_with_gradients_is_refused_before_the_student_is_loaded(make_data, tmp_path, monkeypatch):
    data = make_data()
    data.prepare_data()
    monkeypatch.setattr(Student, "load_model", lambda *_: pytest.fail("the student was loaded"))
    module = PassModule(wanted=Gradients(), work=data._work(), folder=tmp_path)
    module.trainer = Trainer(strategy=ShardedStrategy(), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(LarkError, match="trainer=fsdp"):
        module.configure_model()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("baseline=lark_exact",), r"baseline=lark_exact needs the student's gradients, which trainer=fsdp"),
        (("selector=grad_match",), r"selector=grad_match needs the student's gradients, which trainer=fsdp"),
    ],
)
def test_a_run_that_would_take_gradients_of_a_divided_student_is_refused_at_once(words, message, tmp_path):
    done = lark(*COMMAND, "trainer=fsdp", *TWO_DEVICES, f"paths.logs={tmp_path}", *words)
    assert done.code == 1 and not (tmp_path / "cache" / "pools").exists()
    assert re.search(message, done.err), done.err


# ---- whole commands


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run folder of one process, left alone."""
    done = lark(*COMMAND, "trainer=cpu", f"paths.logs={tmp_path_factory.mktemp('one')}")
    assert done.code == 0, done.err
    return done.folder


def start(logs: Path, script: Path, *words: str, stop: int = 0) -> Popen[str]:
    """The command in processes of its own; rank r's units go to <logs>/trace."""
    script.write_text(TRACED)
    words = (*COMMAND, *TWO_DEVICES, f"paths.logs={logs}", *words)
    return lark_process.start(*words, program=(str(script),), TRACE=str(logs / "trace"), STOP=str(stop))


def trace(logs: Path) -> list[tuple[int, list[int]]]:
    """(rank, rows) of every unit that was measured."""
    lines = (logs / "trace").read_text().splitlines() if (logs / "trace").exists() else []
    return [(int(line.split()[0]), [int(row) for row in line.split()[1:]]) for line in lines]


def assert_same_run(logs: Path, expected: Path) -> None:
    (folder,) = (path.parent for path in logs.glob("runs/**/summary.json") if read_json(path)["status"] == "finished")
    ours, theirs = (pq.read_table(path / "statistics.parquet") for path in (folder, expected))
    assert ours.column_names == theirs.column_names and len(ours) == len(theirs) > 60
    for name in theirs.column_names:
        a, b = (table[name].to_numpy(zero_copy_only=False) for table in (ours, theirs))
        if a.dtype == object and len(a) and isinstance(a[0], np.ndarray):
            a, b = np.concatenate(a), np.concatenate(b)
        if a.dtype == object:
            assert a.tolist() == b.tolist(), name
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    for arm in ("selector", "baseline"):
        ours, theirs = (_chosen(path / arm / "selection.jsonl") for path in (folder, expected))
        assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, abs=1e-4), arm


def _chosen(path: Path) -> dict[str, float]:
    rows = map(json.loads, path.read_text().splitlines())
    return {json.dumps(row["messages"]): row["weight"] for row in rows}


@pytest.mark.slow
def test_a_student_divided_over_two_ranks_killed_midway_goes_on_and_agrees_with_one(one_process, tmp_path):
    """Both ranks are killed after four units each; their passes have different numbers of forward passes."""
    script = tmp_path / "traced.py"
    process = start(tmp_path, script, "trainer=fsdp", stop=4)
    kill_when(process, lambda: len(trace(tmp_path)) == 8)
    (folder,) = tmp_path.glob("cache/statistics/*/")
    kept = set(read_row_numbers(folder).tolist())
    assert not (folder / "manifest.json").exists()
    for rank in (0, 1):
        measured = {row for by, rows in trace(tmp_path) for row in rows if by == rank}
        assert measured & kept and len(measured - kept) < SHARD_ROWS, "a shard at most is lost"

    (tmp_path / "trace").unlink()
    finish(start(tmp_path, script, "trainer=fsdp"))
    assert read_json(folder / "manifest.json")["resumed_rows"] == len(kept)
    everything = pq.read_table(folder / "statistics.parquet")["row"].to_pylist()
    computed = sorted(row for _, rows in trace(tmp_path) for row in rows)
    assert computed == sorted([*(row for row in everything if row not in kept), *everything]), "and the second pass"
    assert_same_run(tmp_path, one_process)


@pytest.mark.slow
def test_ranks_and_batches_change_no_statistic_also_where_a_rank_has_no_batch(one_process, tmp_path):
    output = finish(start(tmp_path, tmp_path / "traced.py", "trainer=ddp", "probe.batch_tokens=100000"))
    assert {rank for rank, _ in trace(tmp_path)} == {0}, output
    assert_same_run(tmp_path, one_process)


@pytest.mark.slow
def test_one_device_has_nothing_to_divide(one_process, tmp_path):
    done = lark(*COMMAND, "trainer=fsdp", "trainer.accelerator=cpu", f"paths.logs={tmp_path}")
    assert done.code == 0, done.err
    assert_same_run(tmp_path, one_process)
