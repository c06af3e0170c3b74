"""Runs that must agree: resumed and uninterrupted, one process and two, killed and left alone.

The other invariants stand beside what they are about: test_sft_module.py (micro-batches, packing, weights),
test_statistics_pass.py (batch composition, cached = fresh), test_datamodule.py (order of the pool).
"""

from functools import partial
from pathlib import Path
from subprocess import Popen

import lark_process
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import rows_of_a_pool, write_pool
from lark_process import TWO_DEVICES, TWO_RANKS, finish, kill_when, terminate_when
from safetensors.torch import load_file

from lark.common.cache import read_json
from lark.training.callbacks import CheckpointSaver
from lark.training.sft_module import SFTModule

COMMAND = (
    *(
        "logger=csv",
        "task=jsonl",
        "task.checker=number",
        "task.max_length=256",
        "sft.steps=5",
        "sft.lr=1e-4",
        "sft.validations=5",
        "sft.checkpoint_every=1",
    ),
    *("probe.batch_tokens=1000", "probe.shard_rows=20", "stop_after=training"),
)


# ---- inside one process


class StopError(Exception):
    pass


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}])
@pytest.mark.parametrize("stop", [4, 5])  # on a held-out point, and between two
def test_resumed_equals_uninterrupted(lora, stop, make_data, make_trainer, tmp_path):
    steps = 8

    class Stops(SFTModule):
        stop_at = steps

        def training_step(self, batch, batch_idx):
            if self.global_step == self.stop_at:
                raise StopError
            super().training_step(batch, batch_idx)

    def train(folder, stop_at, resume):
        data = make_data(student={"lora": lora})
        module = Stops(student=data.student, recipe=data.recipe, steps=steps, seed=0, folder=folder)
        module.stop_at = stop_at
        trainer = make_trainer(
            max_steps=steps,
            callbacks=[CheckpointSaver(folder / "last.ckpt", every=1, validate_every=2)],
            num_sanity_val_steps=-1,
            val_check_interval=2,
            check_val_every_n_epoch=None,
        )
        path = folder / "last.ckpt" if resume else None
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        return module

    whole = train(tmp_path / "whole", steps, resume=False)
    with pytest.raises(StopError):
        train(tmp_path / "parts", stop, resume=False)
    resumed = train(tmp_path / "parts", steps, resume=True)
    assert [point["step"] for point in whole.curve] == [0, 2, 4, 6, 8]
    assert (tmp_path / "whole" / "loss.csv").read_bytes() == (tmp_path / "parts" / "loss.csv").read_bytes()
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoints_are_written_also_without_held_out_problems(make_data, make_trainer, tmp_path):
    data = make_data(task={"held_out": 0.0})
    module = SFTModule(student=data.student, recipe=data.recipe, steps=5, seed=0, folder=tmp_path)
    saver = CheckpointSaver(tmp_path / "last.ckpt", every=2, validate_every=None)
    make_trainer(max_steps=5, callbacks=[saver], val_check_interval=2, check_val_every_n_epoch=None).fit(module, data)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert module.curve == [] and not (tmp_path / "loss.csv").exists()


# ---- whole commands


def _start(student: Path, pool: Path, logs: Path, *words: str, launcher: tuple[str, ...] = ()) -> Popen[str]:
    places = (f"model.path={student}", f"task.pool={pool}", f"paths.logs={logs}")
    return lark_process.start(*COMMAND, *places, *words, program=(*launcher, "-m", "lark.run"))


def arms(logs: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in logs.glob("runs/**/trained.json")}


def assert_same(logs: Path, expected: Path, *, tolerance: float) -> None:
    ours, theirs = arms(logs), arms(expected)
    assert set(ours) == set(theirs) == {"selector", "baseline"}
    for name, folder in ours.items():
        for file in ("selection.jsonl", "selection.json"):
            assert (folder / file).read_bytes() == (theirs[name] / file).read_bytes(), (name, file)
        a, b = (load_file(f / "checkpoint" / "model.safetensors") for f in (folder, theirs[name]))
        assert set(a) == set(b)
        for tensor in a:
            torch.testing.assert_close(
                a[tensor], b[tensor], rtol=0, atol=tolerance, msg=lambda m, t=tensor: f"{t}: {m}"
            )
        a, b = (read_json(f / "trained.json")["curve"] for f in (folder, theirs[name]))
        assert [p["step"] for p in a] == [p["step"] for p in b] == list(range(6))
        losses = [[p["held_out/loss"] for p in curve] for curve in (a, b)]
        assert losses[0] == pytest.approx(losses[1], abs=tolerance)


@pytest.fixture(scope="module")
def start(student_folder, tmp_path_factory):
    pool = write_pool(tmp_path_factory.mktemp("pool") / "pool.jsonl", rows_of_a_pool(problems=40))
    return partial(_start, student_folder, pool)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, start):
    """One process, left alone."""
    logs = tmp_path_factory.mktemp("uninterrupted")
    finish(start(logs))
    return logs


def _count_resumed(logs):
    """Count the trainings that went on from a checkpoint."""
    return sum(path.read_text().count("selector goes on from") for path in logs.glob("runs/**/run.log"))


@pytest.mark.slow
def test_two_ranks_equal_one(uninterrupted, start, tmp_path):
    finish(start(tmp_path, *TWO_RANKS))
    assert_same(tmp_path, uninterrupted, tolerance=1e-5)


@pytest.mark.slow
def test_two_ranks_of_torchrun_equal_one(uninterrupted, start, tmp_path):
    # a folder each, as when the clock's second changes between the two
    each_its_own = "hydra.run.dir=${paths.logs}/runs/rank${oc.env:RANK}"
    output = finish(
        start(tmp_path, *TWO_RANKS, each_its_own, launcher=("-m", "torch.distributed.run", "--nproc-per-node=2"))
    )
    assert output.count("\nscoring ") == 1, "one rank speaks"
    assert_same(tmp_path, uninterrupted, tolerance=1e-5)


@pytest.mark.slow
def test_two_ranks_choose_by_gradients_as_one_does(start, tmp_path):
    """Passes of several kinds, and a warm-up arm that is trained before one of them."""
    words = ("filter=null", "selector=lark_exact", "baseline=grad_match", "baseline.score.validation_problems=4")
    columns = {}
    for name, ranks in (("one", ()), ("two", TWO_RANKS)):
        finish(start(tmp_path / name, *words, *ranks, "stop_after=selection"))
        (folder,) = (path.parent for path in tmp_path.glob(f"{name}/runs/**/statistics.parquet"))
        table = pq.read_table(folder / "statistics.parquet")
        columns[name] = [np.array(table[rule].to_pylist()) for rule in ("lark_exact", "grad_match")]
        assert len(list(tmp_path.glob(f"{name}/arms/*/epochs/*.ckpt"))) == 4
    spread = np.ptp(columns["one"][1])
    assert spread > 0.1 * np.abs(columns["one"][1]).mean() > 0
    np.testing.assert_allclose(columns["two"][0], columns["one"][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(columns["two"][1], columns["one"][1], rtol=0, atol=1e-3 * spread)


@pytest.mark.slow
def test_killed_while_scoring_and_while_training_it_goes_on(uninterrupted, start, tmp_path):
    parts = partial(tmp_path.glob, "cache/statistics/*/part-*")
    kill_when(start(tmp_path), lambda: any(parts()))
    kept = {path.name for path in parts()}
    assert kept and not any(tmp_path.glob("cache/statistics/*/manifest.json"))

    checkpoint = partial(tmp_path.glob, "arms/*/training/last.ckpt")
    kill_when(start(tmp_path), lambda: any(checkpoint()))
    (manifest,) = tmp_path.glob("cache/statistics/*/manifest.json")
    assert read_json(manifest)["resumed_rows"] >= 20
    assert not any(tmp_path.glob("arms/*/trained.json"))

    output = finish(start(tmp_path))
    assert "found in the cache" in output and _count_resumed(tmp_path) == 1
    assert_same(tmp_path, uninterrupted, tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("trainer=fsdp", *TWO_DEVICES), TWO_RANKS], ids=["fsdp", "ddp"])
def test_two_ranks_stopped_by_sigterm_while_scoring_and_while_training_go_on(ranks, uninterrupted, start, tmp_path):
    """A divided student's checkpoint is a folder that each rank writes its part of."""
    parts = partial(tmp_path.glob, "cache/statistics/*/part-*")
    terminate_when(start(tmp_path, *ranks), lambda: any(parts()))
    assert any(parts()) and not any(tmp_path.glob("cache/statistics/*/manifest.json"))
    output = terminate_when(start(tmp_path, *ranks), lambda: any(tmp_path.glob("arms/*/training/last.ckpt")))
    assert output.count("by SIGTERM after optimizer step") == 1, output
    finish(start(tmp_path, *ranks))
    assert _count_resumed(tmp_path) == 1
    assert_same(tmp_path, uninterrupted, tolerance=1e-5)
