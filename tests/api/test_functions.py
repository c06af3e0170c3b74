"""import lark: the same choices as the data module's, whatever a pool is given as; training, evaluation, comparison."""

import subprocess
import sys
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import rows_of_a_pool

import lark
from lark.api.functions import evaluate  # lark.evaluate is the module where another test imported it
from lark.common.errors import LarkError
from lark.selection.policies import TopB
from lark.selection.rule import Rule
from lark.selection.scores.statistics import Length

TASK: dict[str, Any] = {"checker": "number", "max_length": 256, "held_out": 0.25}
PROBLEMS = [{"problem_id": str(i), "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)]
QUICK = {"samples": 2, "checker": "number", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return lark.load_pool(rows_of_a_pool(), cache=tmp_path_factory.mktemp("cache"), **TASK)


@pytest.fixture(scope="module")
def scores(pool, student_folder):
    return lark.score(pool, student_folder, batch_tokens=600)


def test_importing_takes_no_time_and_help_is_a_page():
    code = "import time; t = time.time(); import lark; print(time.time() - t, 'torch' in __import__('sys').modules)"
    seconds, has_torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert float(seconds) < 0.1 and has_torch == "False"
    page = str(lark.__doc__)
    assert all(f"lark.{name}" in page and name in dir(lark) for name in lark.__all__)
    with pytest.raises(AttributeError, match="lod_pool"):
        _ = lark.lod_pool  # type: ignore[attr-defined]


def test_the_choice_is_the_data_modules(scores, make_data):
    data = make_data()
    data.prepare_data()
    data.setup("fit")
    chosen = lark.select(scores, budget=2, filter=None)
    control = lark.select(scores, "random", budget=2, filter=None, like=chosen)
    for mine, name in ((chosen, "selector"), (control, "baseline")):
        np.testing.assert_array_equal(mine.selection.row, data.selections[name].row)
        np.testing.assert_array_equal(mine.selection.weight, data.selections[name].weight)
    np.testing.assert_array_equal(scores["loss"], data.candidates["loss"])


def test_whatever_the_pool_is_given_as(pool, tmp_path):
    rows = rows_of_a_pool()
    path = tmp_path / "pool.jsonl"
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    for source in (path, [str(path)], datasets.Dataset.from_list(rows), pd.DataFrame(rows), iter(rows)):
        assert lark.load_pool(source, cache=tmp_path / "cache", **TASK).rows["messages"] == pool.rows["messages"]
    for source in (datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}), rows[0], 5):
        with pytest.raises(LarkError):
            lark.load_pool(source, cache=tmp_path / "cache")


def test_tables(scores, tmp_path):
    chosen = lark.select(scores, budget=2, filter=None)
    table, rows = chosen.to_pandas(), chosen.to_dataset()
    assert len(table) == len(rows) == len(chosen) and table.weight.mean() == pytest.approx(1)
    assert rows["weight"] == table.weight.tolist()
    assert [meta["candidate_id"] for meta in rows["meta"]] == table.candidate_id.tolist()
    by_key = scores.to_pandas().set_index(["problem_id", "candidate_id"]).loss
    assert table.loss.tolist() == by_key.loc[list(zip(table.problem_id, table.candidate_id, strict=True))].tolist()
    assert chosen.save(tmp_path / "mine").read_text().count("\n") == len(chosen)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(name="shortest", score=Length(sign=-1), policy=TopB(budget=1)),
        lambda candidates: -candidates["num_tokens"],
        "shortest",
        "operator:length_hint",
    ],
)
def test_rules_of_every_kind(scores, rule):
    if rule == "operator:length_hint":  # gives one number for all: not a score
        with pytest.raises(LarkError, match="length_hint"):
            lark.select(scores, rule)
        return
    settings = {} if isinstance(rule, Rule) else {"policy": {"kind": "top_b"}, "filter": lambda c: c["num_tokens"] > 0}
    table = lark.select(scores, rule, budget=1, **settings).to_pandas()
    shortest = scores.to_pandas().groupby("problem_id").num_tokens.min()
    assert table.set_index("problem_id").num_tokens.to_dict() == shortest.to_dict()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda scores: lark.select(scores, "larc"), "larc"),
        (lambda scores: lark.select(scores, "lark", score={"lenght": 1}), "lenght"),
        (lambda scores: lark.select(scores, "lark", budget=0), "budget"),
        (lambda scores: lark.score(scores.pool, "no-such-student"), "no-such-student"),
        (lambda scores: lark.load_student("tiny", dtipe="float32"), "dtipe"),
        (lambda scores: lark.load_pool([{"a": 1}], cache=scores.pool.cache), "trajectory"),
    ],
)
def test_mistakes_name_what_is_wrong(scores, call, named):
    with pytest.raises(LarkError, match=named):
        call(scores)


def test_nothing_to_compare_by(scores):
    pool = lark.load_pool(rows_of_a_pool(), cache=scores.pool.cache, checker="number", max_length=256)
    chosen = lark.select(lark.score(pool, scores.data.student), "longest")
    with pytest.raises(LarkError, match="held_out"):
        lark.compare(chosen, chosen)


@pytest.mark.slow
def test_training_evaluating_comparing(scores, monkeypatch):
    chosen = lark.select(scores, budget=2)
    control = lark.select(scores, "random", like=chosen)
    recipe = {"steps": 2, "batch_size": 4, "lr": 1e-3}
    compared = lark.compare(chosen, control, PROBLEMS, seeds=(0, 1), evaluation=QUICK, **recipe)
    assert list(compared.table.index) == ["before", "baseline: random", "selector: lark"]
    assert compared.differences["eval"].seeds == 2 and "selector - baseline" in str(compared)
    monkeypatch.setattr("lark.api.functions.train_arm", lambda *_, **__: pytest.fail("trained again"))
    trained = lark.train(chosen, **recipe)
    assert trained.checkpoint.is_dir() and trained.facts["steps"] == 2
    losses = compared.table["held-out loss"].to_dict()
    again = [lark.train(chosen, seed=seed, **recipe).held_out_loss for seed in (0, 1)]
    assert losses["selector: lark"] == pytest.approx(np.mean(again))
    evaluated = evaluate(trained, PROBLEMS, cache=scores.pool.cache, **QUICK)
    assert set(evaluated.average_by_problem("eval")) == {"0", "1", "2"} and len(evaluated.to_pandas()) == 1
