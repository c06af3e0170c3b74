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
        (r"0.\overline{3}", "1/3"),
    ],
)
def test_forms_of_one_answer(one, other):
    assert normalise_answer(one, "math") == normalise_answer(other, "math")


@pytest.mark.parametrize(("one", "other"), [("27", "28"), ("x", "X"), ("x+1", "x-1"), ("(1,2)", "[1,2]"), ("$", "$$")])
def test_other_answers(one, other):
    assert normalise_answer(one, "math") != normalise_answer(other, "math")


def test_what_the_checker_accepts_is_one_answer():
    answers, correct = ["x+1", "1+x", None, "x", "2", "2.0"], [True, True, False, False, False, False]
    assert cluster_answers(answers, correct, "math") == [0, 0, NO_ANSWER, 1, 2, 2]
    assert cluster_answers(answers, correct, "reasoning_gym") == [0, 1, NO_ANSWER, 2, 3, 3]  # may have several
    assert cluster_answers(["27.0", "27"], [False, True], "exact") == [0, 1]  # a checker that tells them apart


def test_wrong_choices_are_one_answer_in_all_their_forms():
    answers = ["(B)", "B. the sun", "**b**", "C", "42", "B"]
    assert cluster_answers(answers, [False] * 6, "choice") == [0, 0, 0, 1, 2, 0]
    assert cluster_answers(answers[:2], [False] * 2, "math") == [0, 1]


@given(st.lists(st.one_of(st.none(), st.text(max_size=12))))
def test_equal_numbers_are_equal_answers(answers):
    numbers = cluster_answers(answers, [False] * len(answers), "math")
    for i, one in enumerate(answers):
        assert (numbers[i] == NO_ANSWER) == (one is None)
        for j, other in enumerate(answers):
            if one is not None and other is not None:
                assert (numbers[i] == numbers[j]) == (normalise_answer(one, "math") == normalise_answer(other, "math"))
