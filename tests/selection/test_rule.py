"""Filters and scores of a rule, of ours and of the user's own, and what is said of wrong ones."""

import math
import sys

import numpy as np
import pytest
from selection.test_selection import pool, rule

from lark.selection.policies import Chi2
from lark.selection.rule import Between, Rule
from lark.selection.selection import select


def test_filters_of_every_kind(tmp_path, monkeypatch):
    rows = pool()
    (tmp_path / "my_filter_in_cwd.py").write_text("def short(rows):\n    return rows['num_tokens'] < 200\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    number_N = np.array([math.nan if x is None else x for x in rows["quality"]])
    filters = {
        "correct": rows["correct"] == 1,
        "not_wrong": (rows["correct"] == 1) | np.isnan(rows["correct"]),
        "my_filter_in_cwd:short": rows["num_tokens"] < 200,
        Between(column="num_tokens", min=100, max=300): (rows["num_tokens"] >= 100) & (rows["num_tokens"] <= 300),
        Between(column="quality", min=0.5): number_N >= 0.5,
        Between(column="quality"): ~np.isnan(number_N),
        (lambda candidates: [None, *[True] * (len(candidates) - 1)]): np.arange(len(rows)) > 0,
        None: np.ones(len(rows), bool),
    }
    for which, expected in filters.items():
        mine = rule(filter=which)
        assert mine.compute_mask(rows).tolist() == expected.tolist(), which
        selection = select(mine, rows, seed=0)
        assert expected[selection.row - 100].all()
        assert np.isnan(selection.score_N[~expected]).all()


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda rows: None, "the score of selector mine is None for .* candidates; return one number a row"),
        (lambda rows: np.zeros((len(rows), 2)), r"the score of selector mine has shape \(\d+, 2\) for"),
        (lambda rows: 0.5, r"has shape \(\) for"),
        (lambda rows: np.zeros(len(rows) - 1), r"has shape .* return one number a row"),
        (lambda rows: [[0.0], [0.0, 1.0]] * len(rows), "is not one number for each of"),
        (
            lambda rows: ["high"] * len(rows),
            r"is not one number for each of \d+ candidates \(could not convert string to float",
        ),
        (lambda rows: np.full(len(rows), math.inf), r"is \+inf or beyond"),
        (lambda rows: np.full(len(rows), math.nan), r"selector mine chose nothing of \d+ candidates \(0 filtered"),
    ],
)
def test_a_custom_score_that_is_not_one_number_a_row_is_one_sentence(score, message):
    with pytest.raises(ValueError, match=message) as error:
        select(rule(score), pool(), seed=0)
    assert "\n" not in str(error.value)


def test_what_a_custom_score_or_filter_raises_is_one_sentence_with_its_line():
    def broken(candidates):
        return candidates["num_tokens"] + None

    line = broken.__code__.co_firstlineno + 1
    for wrong, what in ((rule(broken), "score"), (rule(filter=broken), "filter")):
        said = rf"the {what} of selector mine raised TypeError \(test_rule.py, line {line}\): .* \(correct it; HYDRA"
        with pytest.raises(ValueError, match=said):
            select(wrong, pool(), seed=0)


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("num_tokens", "the filter of selector mine must be true, false or missing, but is .*Between"),
        ("label", "the filter of selector mine is not one number for each of .*'good'"),
        (Between(column="label"), "selector.filter.column=label is not one number for each of .*'good'"),
        (Between(column="num_tokens", min=1000), r"chose nothing of (\d+) candidates \(\1 filtered, 0 without a score"),
        (lambda rows: None, "the filter of selector mine is None"),
    ],
)
def test_a_filter_that_is_no_mask_or_lets_nothing_through_is_one_sentence(filter, message):
    with pytest.raises(ValueError, match=message):
        select(rule(filter=filter), pool(), seed=0)


def test_settings_of_a_rule_are_checked():
    with pytest.raises(ValueError, match=r"selector\.filter\.min=5 is above selector\.filter\.max=4"):
        Between(column="num_tokens", min=5, max=4)
    with pytest.raises(ValueError, match=r"selector\.score=None is not a score"):
        Rule(name="mine", score=None, policy=Chi2(budget=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"selector\.filter=\['correct'\] is not a filter"):
        rule(filter=["correct"])
    with pytest.raises(ValueError, match=r"selector\.score='loss' names no function"):
        rule("loss")
