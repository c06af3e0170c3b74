"""What a run says of its stages, and what it warns of."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from lark.experiment import console
from lark.student.batching import draw_step_rows


@pytest.fixture
def selected(make_data, caplog):
    """Data that has selected, with what was logged since."""
    caplog.set_level("INFO", logger="lark")
    data = make_data()
    data.prepare_data()
    data.setup("fit")
    caplog.clear()
    return data


def list_warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_scoring_is_a_line(selected, make_data, caplog):
    console.announce_scoring(selected)
    assert "scoring" in caplog.messages[-1] and f"{len(selected.scored)} trajectories in " in caplog.messages[-1]
    again = make_data()
    again.prepare_data()
    again.setup("fit")
    console.announce_scoring(again)
    assert "found in the cache" in caplog.messages[-1]


def test_a_score_that_follows_the_loss_and_a_teacher_that_has_all_are_warned_of(selected, caplog):
    record = selected.selections["selector"].record
    record |= {"within_problem_spearman": {"loss": 0.9, "num_tokens": 0.1}, "teacher_share": {"a": 0.8, "b": 0.2}}
    console.announce_selections(selected)
    (text,) = list_warnings(caplog)
    assert "80% of its weight" in text and "follows the loss (+0.90)" in text and "length" not in text
    caplog.clear()
    record |= {"within_problem_spearman": {"loss": None}, "teacher_share": {"a": 1.0}}
    console.announce_selections(selected)
    assert not list_warnings(caplog)


def test_nothing_to_choose_and_nothing_to_compare_are_warned_of(selected, caplog):
    selection = selected.selections["selector"]
    selection.record.update({"within_problem_spearman": {}, "teacher_share": {"a": 1.0}})
    counts = selection.record["counts"]
    counts |= {"chosen": counts["candidates"], "dropped_by_filter": 0, "dropped_without_score": 0}
    selected.selections["baseline"] = replace(selection)
    console.announce_selections(selected)
    assert [text.partition(" ")[0] for text in list_warnings(caplog)] == ["budget=2", "selector"]


def test_unequal_weights_are_said_to_need_a_reader(selected, caplog):
    console.announce_weights(selected.selections["baseline"])
    assert not caplog.messages
    console.announce_weights(selected.selections["selector"])
    assert "WeightedSFTTrainer" in caplog.messages[-1] and "repeat=2" in caplog.messages[-1]


def test_what_is_known_to_be_wrong_is_on_the_line(selected):
    selection = selected.selections["selector"]
    selection.record["known_wrong"] = {"weight": 0.39, "candidates": 0.24}
    assert "39% known wrong (24% of the pool)" in console.describe_choice("lark", selection)
    for nothing in (None, {"weight": 0.0, "candidates": 0.24}):
        selection.record["known_wrong"] = nothing
        assert "wrong" not in console.describe_choice("lark", selection)


def test_arms_that_are_there_are_said_so(selected, caplog):
    arms = {"selector": SimpleNamespace(steps=60), "baseline": SimpleNamespace(steps=60)}
    tracker = SimpleNamespace(describe=lambda: "CSV files")
    console.announce_training(selected, arms, {"selector": "reuse", "baseline": "train"}, tracker)  # type: ignore[arg-type]
    (line,) = (text for text in caplog.messages if text.startswith("training"))
    assert "selector 60 steps (trained before) · baseline 60 steps · CSV files" in line


@pytest.mark.parametrize(("batch_size", "warned"), [(12, False), (13, True)])
def test_a_step_that_visits_a_trajectory_twice_is_warned_of(batch_size, warned, selected, caplog):
    assert len(selected.selections["selector"].row) == 12
    selected.recipe = replace(selected.recipe, batch_size=batch_size)
    tracker = SimpleNamespace(describe=lambda: "CSV files")
    arms = {"selector": SimpleNamespace(steps=5)}
    console.announce_training(selected, arms, {"selector": "train"}, tracker)  # type: ignore[arg-type]
    assert [f"sft.batch_size={batch_size}" in text for text in list_warnings(caplog)] == [True] * warned


def test_visits_are_those_of_the_batches(selected):
    rows, recipe = 12, replace(selected.recipe, batch_size=7)
    drawn = np.concatenate([draw_step_rows(rows, 7, seed=0, step=step) for step in range(5)])
    counts = np.bincount(drawn, minlength=rows)
    assert recipe.count_visits(rows, 5) == (counts.min(), counts.max())


def test_a_busy_machine_is_told_of_threads(monkeypatch, caplog, tmp_path):
    config = OmegaConf.create({"task": {"name": "t"}, "model": {"name": "m"}, "seed": 0})
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 0, 0))
    console.announce_header(config, tmp_path)
    assert not list_warnings(caplog)
    monkeypatch.delenv("OMP_NUM_THREADS")
    console.announce_header(config, tmp_path)
    assert "OMP_NUM_THREADS" in list_warnings(caplog)[0]
