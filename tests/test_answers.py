import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark.answers import compile_pattern, extract_answer, find_boxed, parse_number


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
        compile_pattern(pattern)


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
