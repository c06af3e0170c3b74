"""The diagnostics of a run, from the choice to the bins, on a small pool with a random student."""

import csv
import json
import math
from dataclasses import replace

import pytest
from conftest import rows_of_a_pool
from lark_command import SMALL, lark
from lightning import Trainer

from lark.common.ranks import claim_alone
from lark.diagnostics.diagnostics import Diagnosis, Diagnostics
from lark.student.distributed import ShardedStrategy
from lark.training.arms import make_arm, train


@pytest.fixture
def run(make_data, make_trainer, tmp_path, caplog):
    """A diagnosis over data that has selected, its trained arms, and a function that trains the arms of its bins."""
    caplog.set_level("INFO", logger="lark")
    data = make_data(rows_of_a_pool(problems=10, candidates=4), recipe={"steps": 2})
    data.prepare_data()
    data.setup("fit")

    def make_trained(name, rule):
        arm = make_arm(name, rule, data, recipe=data.recipe, steps=2, arms=tmp_path / "arms")
        train(arm, data, make_trainer=make_trainer)
        return arm

    def start(**settings):
        diagnosis = Diagnosis(Diagnostics(**{"resamples": 100, **settings}), data, tmp_path)
        arms = [make_trained(name, data.rules[name].name) for name in ("baseline", "selector")]

        def train_bins():
            bins = diagnosis.select_bins()
            data.selections |= bins
            trained = [make_trained(name, selection.record["rule"]) for name, selection in bins.items()]
            for name in bins:
                del data.selections[name]
            return trained

        return diagnosis, arms, train_bins

    return start


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_full_from_the_choice_to_the_bins(run, tmp_path, caplog):
    diagnosis, arms, train_bins = run(name="full", problems=5, bins=2)
    diagnosis.diagnose_selections(claim_alone)
    diagnosis.diagnose_arms(arms)
    trained = train_bins()
    assert [arm.name for arm in trained] == ["bin-1", "bin-2"]
    diagnosis.diagnose_bins(trained, {})
    found = json.loads((tmp_path / "diagnostics.json").read_text())
    fidelity = found["fidelity"]
    assert (fidelity["problems"], fidelity["candidates"], fidelity["budget"]) == (5, 20, 2)
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
    figures = diagnosis.list_figures()
    assert (
        figures["diagnostics/fidelity/proxies/lark/g/spearman"] == fidelity["proxies"]["lark"]["g"]["spearman"]["mean"]
    )
    for word in ("correlations", "overlap", "fidelity", "kappa", "held-out loss", "bins"):
        assert word in caplog.text


def test_a_bin_that_diverged_has_no_figures(run):
    diagnosis, _, train_bins = run(name="full", bins=2)
    untrained = [replace(arm, folder=arm.folder.with_name("diverged")) for arm in train_bins()]
    diagnosis.diagnose_bins(untrained, {})
    assert all(math.isnan(row["mean_loss"]) for row in diagnosis.found["bins"]["rows"])


def test_cheap_asks_the_student_nothing(run, tmp_path):
    diagnosis, arms, _ = run(name="cheap")
    diagnosis.diagnose_selections(None)  # there is nothing to claim
    diagnosis.diagnose_arms(arms)
    found = json.loads((tmp_path / "diagnostics.json").read_text())
    assert {"correlations", "selections", "overlaps", "curves"} < set(found)
    assert not {"fidelity", "bins"} & set(found) and diagnosis.select_bins() == {}


def test_none_leaves_nothing(run, tmp_path):
    diagnosis, arms, _ = run(name="none")
    diagnosis.diagnose_selections(None)
    diagnosis.diagnose_arms(arms)
    assert not list(tmp_path.glob("diagnostics*")) and diagnosis.select_bins() == diagnosis.list_figures() == {}


def test_more_bins_than_candidates_are_not_trained(run, caplog):
    diagnosis, *_ = run(name="full", bins=9)
    assert diagnosis.select_bins() == {} and any("diagnostics.bins=9" in line for line in caplog.messages)


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
    assert "fidelity" in done.out
    found = json.loads((done.folder / "diagnostics.json").read_text())
    assert found["fidelity"]["problems"] == 2 and found["fidelity"]["kappa"]["mean"] > 0
