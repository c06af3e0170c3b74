"""The cheap figures of a run's choices, on the small pool."""

import numpy as np
import pytest
from conftest import rows_of_a_pool
from scipy import stats

from lark.diagnostics.correlations import describe_choice, list_stock_scores
from lark.selection.scores.statistics import Length, Random


@pytest.fixture
def chosen(make_data):
    def make(**settings):
        data = make_data(rows_of_a_pool(problems=8, candidates=4), **settings)
        data.prepare_data()
        data.setup("fit")
        return data, describe_choice(data, resamples=100)

    return make


def test_all_scores_with_loss_length_and_correctness(chosen):
    data, found = chosen()
    assert set(found["correlations"]) == {*list_stock_scores(data), "rho"}
    for targets in found["correlations"].values():
        assert list(targets) == ["loss", "length", "correct"]
    likelihood = found["correlations"]["likelihood"]["loss"]["within"]
    assert (likelihood.mean, likelihood.chance) == (pytest.approx(-1), 0)
    assert found["correlations"]["shortest"]["length"]["pooled"].mean == pytest.approx(-1)
    own = data.candidates
    score_N = data.selections["selector"].score_N
    pairs = [(score_N[rows], own["num_tokens"][rows]) for rows in own.groups.split()]
    by_problem = np.array([stats.spearmanr(*pair)[0] for pair in pairs], float)
    assert found["correlations"]["lark"]["length"]["within"].mean == pytest.approx(np.mean(by_problem))


def test_selections_and_overlaps_with_every_rule(chosen):
    data, found = chosen()
    assert list(found["selections"]) == ["selector", "baseline"]
    assert found["selections"]["baseline"]["score"] == "random"
    mine = {row["b"] if row["a"] == "lark" else row["a"] for row in found["overlaps"] if "lark" in (row["a"], row["b"])}
    assert mine == {*list_stock_scores(data)} - {"lark"}
    selection = data.selections["selector"]
    assert found["selections"]["selector"]["concentration"]["effective_sample_size"] == pytest.approx(
        selection.record["effective_sample_size"]
    )
    assert set(found["selections"]["selector"]["coverage"]) == {"loss", "correct"}


def test_a_rule_compared_with_itself_has_two_names(chosen):
    data, _ = chosen()
    data.rules["baseline"] = data.rules["selector"]
    data.selections["baseline"] = data.selections["selector"]
    found = describe_choice(data, resamples=100)
    assert [one["score"] for one in found["selections"].values()] == ["lark", "lark (baseline)"]
    (pair,) = (row for row in found["overlaps"] if {row["a"], row["b"]} == {"lark", "lark (baseline)"})
    assert pair["mean"] == 1


def test_without_a_forward_pass_there_are_fewer_scores(chosen):
    data, found = chosen(selector=Length(sign=1), baseline=Random(seed=3))
    assert found["without_forward_pass"] and set(list_stock_scores(data)) == {"shortest", "longest", "random"}
    assert list(found["correlations"]["longest"]) == ["length", "correct"]
    assert found["selections"]["selector"]["score"] == "lark"  # the rule's name in this fixture: a score of its own
    assert found["selections"]["baseline"]["score"] == "random (baseline)"  # of another seed than the stock one
    assert found["correlations"]["lark"]["length"]["within"].mean == pytest.approx(1)
