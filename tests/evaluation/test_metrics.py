from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lark.evaluation.metrics import (
    average_at_k,
    compute_metrics,
    majority_at_k,
    pass_at_k,
    summarise_samples,
)

verdicts = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5)
)


@given(verdicts, st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    expected = []
    for row in rows:
        subsets = list(combinations(row, k))
        expected.append(sum(any(subset) for subset in subsets) / len(subsets))
    correct_PN = torch.tensor(rows)
    assert pass_at_k(correct_PN, k).tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(pass_at_k(correct_PN, 1), average_at_k(correct_PN))


def test_many_samples_neither_overflow_nor_lose_digits():
    correct_PN = torch.zeros(1, 2000, dtype=torch.bool)
    correct_PN[0, 0] = True
    assert pass_at_k(correct_PN, 1000).item() == pytest.approx(0.5, abs=1e-15)


samples_of_problems = st.integers(1, 7).flatmap(
    lambda n: st.lists(
        st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=n, max_size=n), min_size=1, max_size=4
    )
)


@given(samples_of_problems)
def test_maj_at_k_is_what_drawing_one_of_the_most_frequent_answers_earns(problems):
    expected = []
    for samples in problems:
        verdicts = {vote: [correct for other, correct in samples if other == vote] for vote, _ in samples if vote >= 0}
        most = max(map(len, verdicts.values()), default=0)
        credits = [sum(of_answer) / most for of_answer in verdicts.values() if len(of_answer) == most]
        expected.append(sum(credits) / len(credits) if credits else 0)
    vote_PN, correct_PN = (torch.tensor([[sample[i] for sample in samples] for samples in problems]) for i in (0, 1))
    assert majority_at_k(vote_PN, correct_PN).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("votes", "correct", "credit"),
    [
        ([0, 0, 1, 2], [1, 1, 0, 0], 1),  # the majority is right
        ([0, 0, 1, 2], [0, 0, 1, 0], 0),
        ([0, 0, 1, 1], [1, 1, 0, 0], 1 / 2),  # a tie of two
        ([0, 1, 2, -1], [1, 0, 0, 0], 1 / 3),  # who says nothing has no vote
        ([-1, -1, -1, 0], [0, 0, 0, 1], 1),  # and is no majority
        ([-1, -1, -1, -1], [0, 0, 0, 0], 0),
    ],
)
def test_majorities_by_hand(votes, correct, credit):
    assert majority_at_k(torch.tensor([votes]), torch.tensor([correct]).bool()).item() == pytest.approx(credit)


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_named(k):
    with pytest.raises(ValueError, match=rf"evaluation\.pass_at={k} .* evaluation\.samples=4"):
        pass_at_k(torch.zeros(2, 4, dtype=torch.bool), k)


def record(problem, correct, *, answer: str | None = "1", stop=True, timed_out=False):
    return dict(
        problem_id=problem,
        correct=correct,
        answer=answer,
        boxed=correct,
        stop=stop,
        truncated=not stop,
        timed_out=timed_out,
        oversized=False,
        num_tokens=10 if stop else 20,
    )


RECORDS = [
    record("a", True),
    record("a", False, answer="2"),
    record("b", False, stop=False, timed_out=True, answer=None),
    record("b", False),
]


def problem(name, **more):
    return {"problem_id": name, "problem": "?", "answer": "1", **more}


def test_metrics_by_hand():
    assert compute_metrics(RECORDS, {"a": "math", "b": "math"}, pass_at=(1, 2)) == {
        "avg@2": 0.25,
        "pass@1": 0.25,
        "pass@2": 0.5,
        "maj@2": 0.25,
        "boxed": 0.25,
        "answered": 0.75,
        "stop": 0.75,
        "truncated": 0.25,
        "tokens": 12.5,
        "timeouts": 1,
        "oversized": 0,
        "problems": 2,
        "samples": 2,
    }
    with pytest.raises(AssertionError):  # not as many samples of every problem
        compute_metrics(RECORDS[:3], {"a": "math", "b": "math"})


def test_levels_in_their_order():
    names = {"a": 10, "b": "2", "c": None, "d": "hard", "e": 2}
    problems = [problem(name, level=level) for name, level in names.items()]
    records = [record(name, name in "be") for name in names for _ in range(2)]
    levels = summarise_samples(records, problems, pass_at=[1], kind="math")["levels"]
    assert list(levels) == ["2", "10", "hard", "none"]
    assert [of["metrics"]["problems"] for of in levels.values()] == [2, 1, 1, 1]
    assert [of["metrics"]["avg@2"] for of in levels.values()] == [1, 0, 0, 0]
    assert levels["2"]["interval"]["low"] < levels["2"]["interval"]["high"] == 1
    assert not summarise_samples(records, [problem(name) for name in names], pass_at=[1], kind="math")["levels"]


def test_right_answers_that_differ_are_one_unless_a_problem_may_have_several():
    records = [record("a", True, answer="1 + 1"), record("a", True, answer="2 + 0")] + 2 * [record("a", False)]
    credit = {"math": 0.5, "reasoning_gym": 0.0}
    for kind, expected in credit.items():
        assert summarise_samples(records, [problem("a")], pass_at=[1], kind=kind)["metrics"]["maj@4"] == expected
        own = summarise_samples(records, [problem("a", checker=kind)], pass_at=[1], kind="exact")
        assert own["metrics"]["maj@4"] == expected


def test_the_interval_and_each_problem():
    found = summarise_samples(RECORDS, [problem("a", level=1), problem("b", level=1)], pass_at=[1], kind="math")
    assert found["metrics"] == found["levels"]["1"]["metrics"]
    assert found["per_problem"] == {"a": 0.5, "b": 0}
    interval = found["interval"]
    assert (interval["metric"], interval["estimate"], interval["problems"]) == ("avg@2", 0.25, 2)
    assert 0 <= interval["low"] <= 0.25 <= interval["high"] <= 1
    one = summarise_samples(RECORDS[:2], [problem("a")], pass_at=[1], kind="math")["interval"]
    assert np.isnan(one["low"]) and one["label"] == "one problem, no interval"
