import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark.answers.answer_clusters import NO_ANSWER, cluster_answers, normalise_answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("27", "27.0"),
        ("1,000", "1000"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", "1/2"),
        ("x + 1", "x+1"),
        (r"\left( 1,\, 2 \right)", "(1, 2)"),
        (r"\dfrac{x}{2}", r"\frac{x}{2}"),
        ("$y$", "y"),
        ("blue.", "blue"),
    ],
)
def test_forms_of_one_answer(one, other):
    assert normalise_answer(one) == normalise_answer(other)


@pytest.mark.parametrize(("one", "other"), [("27", "28"), ("x", "X"), ("x+1", "x-1"), ("(1,2)", "[1,2]"), ("$", "$$")])
def test_other_answers(one, other):
    assert normalise_answer(one) != normalise_answer(other)


def test_what_the_checker_accepts_is_one_answer():
    answers, correct = ["x+1", "1+x", None, "x", "2", "2.0"], [True, True, False, False, False, False]
    assert cluster_answers(answers, correct) == [0, 0, NO_ANSWER, 1, 2, 2]
    assert cluster_answers(answers, correct, one_right=False) == [0, 1, NO_ANSWER, 2, 3, 3]
    assert cluster_answers(["27.0", "27"], [False, True]) == [0, 1]  # a checker that tells them apart


@given(st.lists(st.one_of(st.none(), st.text(max_size=12))))
def test_equal_numbers_are_equal_answers(answers):
    numbers = cluster_answers(answers, [False] * len(answers))
    for i, one in enumerate(answers):
        assert (numbers[i] == NO_ANSWER) == (one is None)
        for j, other in enumerate(answers):
            if one is not None and other is not None:
                assert (numbers[i] == numbers[j]) == (normalise_answer(one) == normalise_answer(other))
