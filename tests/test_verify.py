import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark.verify import Answer, Checker, extract_answer, find_boxed, parse_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"a line\\\boxed{7}", "7"),
        (r"escaped twice \\boxed{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"a stray { and \boxed{9}", "9"),
        (r"a stray } and \boxed{9}}", "9"),
        (r"\boxed{3} but then \boxed{4", "3"),
        (r"write it within \boxed{}", None),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        ("no answer", None),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> so one", None),
        (r"\boxed{1}</think> so \boxed{2}", "2"),
        (r"<think>first \boxed{1}", None),
        (r"\boxed{1} <think>wait \boxed{2}", "1"),
        (r"<think>a</think> \boxed{1} <think>b</think> \boxed{2}", "2"),
    ],
)
def test_last_balanced_box_outside_thought(text, answer):
    assert find_boxed(text) == answer
    assert extract_answer(text) == answer


@given(st.text(alphabet="a5{} ", max_size=30), st.text(alphabet="xy {}", max_size=20))
def test_a_box_is_found_whatever_stands_around_it(before, inside):
    balanced = inside.replace("{", "").replace("}", "") + "{z}"
    assert find_boxed(f"{before}\\boxed{{{balanced}}}") == balanced.strip()


def test_pattern_speaks_only_where_no_box_does():
    pattern = r"answer is (\d+)"
    assert extract_answer("the answer is 3, no, the answer is 4", pattern) == "4"
    assert extract_answer(r"\boxed{5}; the answer is 4", pattern) == "5"
    assert extract_answer("<think>the answer is 3</think>", pattern) is None
    assert extract_answer("I do not know", pattern) is None


@pytest.mark.parametrize("pattern", [r"(\d+", r"answer is \d+"])
def test_faulty_pattern_is_named(pattern):
    with pytest.raises(ValueError, match=r"task\.pattern"):
        Checker("exact", pattern=pattern)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 150_000,
        r"\boxed{" + "{" * 500_000 + "}" * 500_000,
        r"\boxed{1}" + "{" * 1_000_000,
        "\\" * 1_000_000 + "boxed",
        r"\boxed " + " " * 1_000_000,
        "<think>" * 150_000,
    ],
    ids=["boxes", "nested", "open", "backslashes", "spaces", "thoughts"],
)
def test_a_megabyte_of_braces_takes_linear_time(text):
    start = time.process_time()
    find_boxed(text)
    assert time.process_time() - start < 5  # quadratic time would be hours


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        ("007", "7"),
        ("27.0", "27"),
        ("27.", "27"),
        (".5", "1/2"),
        ("-0", "0"),
        ("+3", "3"),
        ("$18", "18"),
        (r"\$18", "18"),
        ("$18$", "18"),
        (r"\frac{2}{4}", "0.5"),
        (r"-\dfrac{1}{4}", "-0.25"),
        (r"\frac{-1}{4}", "-1/4"),
        ("\N{MINUS SIGN}5", "-5"),
        ("1" * 100 + ".00", "1" * 100),
    ],
)
def test_equal_numbers(text, same):
    if len(text) > 100:  # 102 digits: beyond the limit
        assert parse_number(text) is None
    else:
        assert parse_number(text) == parse_number(same) is not None


@pytest.mark.parametrize(
    "text", ["", "1e9", "1E999999999", "2^3", "9" * 101, "1/0", "1,00", "five", "5 5", "٣", "1" * 9999]
)
def test_what_is_no_plain_number_is_refused(text):
    assert parse_number(text) is None


@given(st.fractions(min_value=-(10**6), max_value=10**6))
def test_fractions_survive_writing(value):
    assert parse_number(f"{value.numerator}/{value.denominator}") == value


def boxed(answer, gold, **fields):
    return Answer(text=rf"\boxed{{{answer}}}", gold=gold, **fields)


def test_exact_and_number_use_no_worker():
    items = [boxed("27.0", "27"), boxed("27", "27"), boxed("28", "27"), Answer(text="none", gold="27")]
    with Checker("exact") as exact, Checker("number") as number:
        assert [v.correct for v in exact.check(items)] == [False, True, False, False]
        verdicts = number.check(items)
        assert exact._pool is None and number._pool is None
    assert [v.correct for v in verdicts] == [True, True, False, False]
    assert [v.answer for v in verdicts] == ["27.0", "27", "28", None]


def test_math_in_workers_and_a_tower_of_exponents_is_cut_off():
    cases = [
        (r"\frac{1}{2}", "0.5", True),
        (r"x^2 + 2x + 1", "(x+1)^2", True),
        (r"\left(3, \frac{\pi}{2}\right)", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("p - q", "p - q", True),
        (r"\text{east}", r"\text{west}", False),
        ("6", "5", False),
        ("9^{9^{9^{9}}}", "5", False),
        (r"\frac{", "5", False),
    ]
    items = [boxed(answer, gold) for answer, gold, _ in cases]
    with Checker("math", time_limit=1.5, workers=1) as checker:
        verdicts = checker.check(items)
        again = checker.check(items[:2])  # the worker that was killed has been replaced
    assert [v.correct for v in verdicts] == [correct for _, _, correct in cases]
    assert [v.timed_out for v in verdicts] == [False] * 6 + [True, False]
    assert [v.correct for v in again] == [True, True]


def test_math_takes_gold_first():
    # math-verify is not symmetric: the last side of a chain of equations is what a text states.
    with Checker("math", workers=1) as checker:
        verdicts = checker.check([boxed("2+3=5", "5"), boxed("5", "2+3=5")])
    assert [v.correct for v in verdicts] == [True, False]


def test_reasoning_gym_uses_the_verifier_of_the_data_set():
    chain = [boxed(a, "1000", source_dataset="chain_sum") for a in ("+01,000.00", "1001", "1E9")]
    incomplete = boxed("cold,cord", "cold,cord,card", source_dataset="word_ladder")  # its verifier wants metadata
    with Checker("reasoning_gym", workers=1) as checker:
        assert [v.correct for v in checker.check(chain)] == [True, False, False]
        with pytest.raises(ValueError, match=r"word_ladder.*start_word"):
            checker.check([incomplete])


@pytest.mark.parametrize(
    ("kind", "item", "named"),
    [
        ("number", boxed("1", "one"), "task.checker"),
        ("reasoning_gym", boxed("1", "1"), "source_dataset"),
        ("reasoning_gym", boxed("1", "1", source_dataset="no_such"), "no_such"),
    ],
)
def test_gold_answers_that_cannot_be_checked_are_refused(kind, item, named):
    with pytest.raises(ValueError, match=named):
        Checker(kind).validate([item])


def test_unknown_kind_and_limits_are_named():
    with pytest.raises(ValueError, match=r"task\.checker='sympy'"):
        Checker("sympy")
    with pytest.raises(ValueError, match=r"evaluation\.time_limit=0"):
        Checker("math", time_limit=0)
    with pytest.raises(ValueError, match=r"evaluation\.workers=0"):
        Checker("math", workers=0)


def test_workers_end_with_the_block():
    with Checker("math", workers=1) as checker:
        checker.check([boxed("1", "2")])
        assert checker._pool is not None
        pids = list(checker._pool._pool_manager.worker_manager.workers)
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
