"""Passes over several ranks: a student divided over them (trainer=fsdp), and a whole student on each (ddp)."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from lark_command import lark
from lark_process import TWO_DEVICES, TWO_RANKS, finish, start
from lightning import Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from lark.common.cache import read_json
from lark.common.errors import LarkError
from lark.scoring.gradient_passes import GradientsModule
from lark.scoring.passes import Gradients
from lark.student.distributed import Lockstep, ShardedStrategy
from lark.student.model_parts import compute_hidden_states, get_base_model, get_head
from lark.student.student import Student

COMMAND = ("task.limit=12", "logger=csv", "stop_after=selection", "baseline=local_likelihood", "probe.batch_tokens=300")


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
    module = GradientsModule(wanted=Gradients(), inputs=data._inputs(), folder=tmp_path)
    module.trainer = Trainer(strategy=ShardedStrategy(), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(LarkError, match="trainer=fsdp"):
        module.configure_model()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["baseline=lark_exact", "selector=grad_match"])
def test_a_run_that_would_take_gradients_of_a_divided_student_is_refused_at_once(rule, tmp_path):
    done = lark(*COMMAND, "trainer=fsdp", *TWO_DEVICES, f"paths.logs={tmp_path}", rule)
    assert done.code == 1 and not (tmp_path / "cache" / "pools").exists()
    assert rule in done.err


# ---- whole commands


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run folder of one process, left alone."""
    done = lark(*COMMAND, "trainer=cpu", f"paths.logs={tmp_path_factory.mktemp('one')}")
    assert done.code == 0, done.err
    return done.folder


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
@pytest.mark.parametrize(
    "words",
    [
        ("trainer=fsdp", *TWO_DEVICES),
        ("trainer=fsdp", "trainer.accelerator=cpu"),  # one device: nothing to divide
        (*TWO_RANKS, "probe.batch_tokens=100000"),  # one rank has no batch
    ],
)
def test_devices_and_batches_change_no_statistic(words, one_process, tmp_path):
    finish(start(*COMMAND, *words, f"paths.logs={tmp_path}"))
    assert_same_run(tmp_path, one_process)
