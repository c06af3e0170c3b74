"""The diagnostics of a run, from the choice to the bins, on a small pool with a random student."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from conftest import rows_of_a_pool
from lark_command import SMALL, lark
from lightning import Trainer

from lark.common.ranks import claim_alone
from lark.diagnostics.diagnostics import Diagnosis, Diagnostics
from lark.student.distributed import ShardedStrategy
from lark.training.arms import make_arm, train
from lark.training.datamodule import TrajectoryDataModule
from lark.training.divergence import DivergedError


@dataclass
class Finished:
    """Trains arms on `data` without evaluating them, and remembers which."""

    data: TrajectoryDataModule
    make_trainer: Callable[..., Trainer]
    done: list[tuple[str, str]]

    def __call__(self, arm, action):
        self.done.append((arm.name, action))
        if action == "train":
            settings = {"steps": 2, "make_trainer": self.make_trainer, "logger": None, "say": print}
            train(arm, self.data, callbacks=[], **settings)


@pytest.fixture
def run(make_data, make_trainer, tmp_path):
    """A diagnosis with all that a run gives it; what it said."""
    said = []
    data = make_data(rows_of_a_pool(problems=10, candidates=4), recipe={"steps": 2}, say=said.append)
    data.prepare_data()
    data.setup("fit")
    make = partial(
        make_arm,
        data=data,
        steps=2,
        precision="32-true",
        evaluation={"sets": []},
        arms=tmp_path / "arms",
    )

    def start(**settings):
        diagnosis = Diagnosis(Diagnostics(**{"resamples": 100, **settings}), data, tmp_path)
        finish = Finished(data, make_trainer, [])
        arms = [make(name, data.rules[name].name, recipe=data.recipe) for name in ("baseline", "selector")]
        return diagnosis, arms, make, finish, said

    return start


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_full_from_the_choice_to_the_bins(run, tmp_path):
    diagnosis, arms, make, finish, said = run(name="full", problems=5, bins=2)
    diagnosis.of_selections(claim_alone)
    for arm in arms:
        finish(arm, "train")
    diagnosis.of_arms(arms, make, claim_alone, finish, {"sets": []}, True)
    assert finish.done[2:] == [("bin-1", "train"), ("bin-2", "train")]
    found = json.loads((tmp_path / "diagnostics.json").read_text())
    fidelity = found["fidelity"]
    assert (fidelity["problems"], fidelity["candidates"], fidelity["budget"]) == (5, 20, 2)
    assert fidelity["truths"]["rho"]["loss_drop"]["spearman"]["mean"] > 0.9  # a small step comes to its limit
    assert fidelity["step"]["median_change"] < 0.05
    assert fidelity["proxies"]["lark_head"]["g"]["overlap"]["chance"] == 0.5
    assert len(table(tmp_path / "diagnostics-candidates.csv")) == 20
    assert {row["truth"] for row in table(tmp_path / "diagnostics-fidelity.csv")} == {"loss_drop", "rho", "g"}
    bins = found["bins"]["rows"]
    assert [row["trajectories"] for row in bins] == [2 * found["bins"]["problems"]] * 2
    assert [float(row["held_out_loss"]) for row in table(tmp_path / "diagnostics-bins.csv")] == pytest.approx(
        [row["held_out_loss"] for row in bins]
    )
    assert found["curves"]["selector"]["area_ratio"] > 0
    assert set(diagnosis.data.selections) == {"selector", "baseline"}
    figures = diagnosis.figures()
    assert (
        figures["diagnostics/fidelity/proxies/lark/g/spearman"] == fidelity["proxies"]["lark"]["g"]["spearman"]["mean"]
    )
    lines = "\n".join(said)
    for word in ("diagnostics ", "overlap ", "fidelity ", "kappa ", "curve ", "bins "):
        assert f"\n{word}" in lines


def test_bins_are_trained_once(run):
    diagnosis, arms, make, finish, _ = run(name="full", problems=2, bins=2)
    diagnosis.of_arms(arms, make, claim_alone, finish, {"sets": []}, True)
    again = Finished(finish.data, finish.make_trainer, [])
    diagnosis.of_arms(arms, make, claim_alone, again, {"sets": []}, True)
    assert again.done == [("bin-1", "reuse"), ("bin-2", "reuse")]


def test_a_bin_that_diverges_does_not_end_the_run(run):
    diagnosis, arms, make, _, said = run(name="full", bins=2)

    def finish(arm, action):
        raise DivergedError("too fast")

    diagnosis.of_arms(arms, make, claim_alone, finish, {"sets": []}, True)
    assert all(math.isnan(row["mean_loss"]) for row in diagnosis.found["bins"]["rows"])
    assert sum("diverged" in line for line in said) == 2
    assert set(diagnosis.data.selections) == {"selector", "baseline"}


def test_cheap_asks_the_student_nothing(run, tmp_path):
    diagnosis, arms, make, finish, _ = run(name="cheap")
    diagnosis.of_selections(None)  # there is nothing to claim
    diagnosis.of_arms(arms, make, None, finish, {"sets": []}, True)
    found = json.loads((tmp_path / "diagnostics.json").read_text())
    assert {"correlations", "selections", "overlaps", "curves"} < set(found)
    assert not {"fidelity", "bins"} & set(found) and finish.done == []


def test_none_leaves_nothing(run, tmp_path):
    diagnosis, arms, make, finish, _ = run(name="none")
    diagnosis.of_selections(None)
    diagnosis.of_arms(arms, make, None, finish, {"sets": []}, True)
    assert not list(tmp_path.glob("diagnostics*")) and diagnosis.callbacks(arms[0]) == [] and diagnosis.figures() == {}


def test_more_bins_than_candidates_are_said_and_not_trained(run):
    diagnosis, arms, make, finish, said = run(name="full", bins=9)
    diagnosis.of_arms(arms, make, claim_alone, finish, {"sets": []}, True)
    assert finish.done == [] and any("diagnostics.bins=9" in line for line in said)


def test_gradients_are_refused_under_sharding_before_anything_is_computed(run, monkeypatch):
    diagnosis, *_ = run(name="cheap")
    sharded = Trainer(strategy=ShardedStrategy(), accelerator="cpu", devices=1, logger=False)
    monkeypatch.setattr(diagnosis.data, "make_trainer", lambda label: sharded)
    with pytest.raises(ValueError, match="diagnostics=full needs the student's gradients"):
        Diagnosis(Diagnostics(name="full"), diagnosis.data, diagnosis.folder)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", "some"),
        ("resamples", 10),
        ("problems", 0),
        ("parameters", "first:2"),
        ("eta", 0.0),
        ("step_tolerance", 0.0),
        ("bins", 1),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"diagnostics.{setting}={value!r}".replace("'", "'?")):
        Diagnostics(**{setting: value})


def test_a_pool_is_diagnosed_without_training(tmp_path):
    done = lark(
        *SMALL,
        f"paths.logs={tmp_path}",
        "task.limit=12",
        "stop_after=selection",
        "baseline=none",
        "diagnostics=full",
        "diagnostics.problems=2",
        "diagnostics.parameters=last:1",
    )
    assert done.code == 0, done.err
    assert "exact over last:1 parameters" in done.out and "\nbins " not in done.out
    found = json.loads((done.folder / "diagnostics.json").read_text())
    assert found["fidelity"]["problems"] == 2 and set(found["fidelity"]["kappa"]) == {"all", "last third"}
