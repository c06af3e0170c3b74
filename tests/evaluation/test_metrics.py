from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lark.evaluation.metrics import (
    AverageAtK,
    MajorityAtK,
    PassAtK,
    ProblemMean,
    average_at_k,
    majority_at_k,
    pass_at_k,
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
    assert pass_at_k(torch.tensor(rows), k).tolist() == pytest.approx(expected, abs=1e-12)


@given(verdicts)
def test_ends_of_pass_at_k(rows):
    correct_PN = torch.tensor(rows)
    torch.testing.assert_close(pass_at_k(correct_PN, 1), average_at_k(correct_PN))
    assert pass_at_k(correct_PN, len(rows[0])).tolist() == [float(any(row)) for row in rows]


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
    metric = MajorityAtK()
    for i in range(len(problems)):
        metric.update(vote_PN[i : i + 1], correct_PN[i : i + 1])
    assert metric.compute().item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)


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


@given(verdicts)
def test_updates_add_up_over_batches_and_ranks(rows):
    correct_PN = torch.tensor(rows)
    for metric, vector_P in (
        (AverageAtK(), average_at_k(correct_PN)),
        (PassAtK(1), pass_at_k(correct_PN, 1)),
        (ProblemMean(), correct_PN.double().mean(1)),
    ):
        for row in correct_PN:  # uneven batches must not weigh their problems unevenly
            metric.update(row[None])
        assert metric.compute().item() == pytest.approx(vector_P.mean().item(), abs=1e-12)


def gather_from_two_ranks(other):
    """A stand-in for all_gather on the rank whose fellow holds the states of `other`, in the order of the states."""
    states = iter([other.total, other.problems])
    return lambda state, group=None: [state, next(states)]


def test_ranks_with_unequal_shares_are_summed():
    there = PassAtK(1)
    there.update(torch.tensor([[False, False]]))
    here = PassAtK(1, dist_sync_fn=gather_from_two_ranks(there), distributed_available_fn=lambda: True)
    here.update(torch.tensor([[True, True], [True, True], [False, True]]))
    assert here.compute().item() == 2.5 / 4
