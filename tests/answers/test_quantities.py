from fractions import Fraction
from operator import add, mul, sub, truediv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark.answers.quantities import is_same_quantity, parse_number, parse_quantity, to_plain_notation


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        (r"1,\! 234", "1234"),
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
        (r"\frac12", "1/2"),
        ("3 1/2", "7/2"),
        (r"-3\frac{1}{2}", "-7/2"),
        ("\N{MINUS SIGN}5", "-5"),
        ("1e9", "1000000000"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        ("2:00 PM", "2"),
        (r"90^\circ", "90"),
        (r"5\text{ cm}^2", "5"),
        ("18 km/h", "18"),
        ("**18**", "18"),
        ("x = 5", "5"),
        ("50%", "50"),
        ("answer: 5", "5"),
    ],
)
def test_numbers_with_what_stands_around_them(text, same):
    assert parse_number(text) == parse_number(same) is not None


@pytest.mark.parametrize(
    "text",
    [
        *("", "$", "cm", "five", "٣", "5\0", "5\ud800"),
        *("1e999", "1E999999999", "9" * 101, "1" * 9999, "1" * 100 + ".0"),
        *("1/0", "1,00", "5 5", "3 4/2", "2^3", "5x", "5 x", r"5\pi", "5!", r"5 \pm 1", "> 5", "2:30"),
        *("5 or 6", "5-6", "5 to 6", "5, 6", "5 and a half", "5 feet 6 inches"),
        *("5 = x", "x = 5 = 6", "x = 5 y = 6", "2x = 6"),
    ],
)
def test_what_is_not_one_plain_number_is_refused(text):
    assert parse_number(text) is None
    assert parse_quantity(text, equations=True) is None or text == "5-6"


@given(st.fractions(min_value=-(10**6), max_value=10**6))
def test_fractions_survive_writing(value):
    assert parse_number(f"{value.numerator}/{value.denominator}") == value
    assert parse_number(rf"\frac{{{value.numerator}}}{{{value.denominator}}}") == value


def _combine(left, operator, right):
    """(text, value) of a calculation; None is the value of a division by zero and of all that contains one."""
    text = f"({left[0]} {operator} {right[0]})"
    if left[1] is None or right[1] is None or (operator == "/" and right[1] == 0):
        return text, None
    operate = {"+": add, "-": sub, "*": mul, "/": truediv}[operator]
    return text, operate(left[1], right[1])


@given(
    st.recursive(
        st.integers(0, 99).map(lambda number: (str(number), Fraction(number))),
        lambda part: st.builds(_combine, part, st.sampled_from("+-*/"), part),
        max_leaves=6,
    )
)
def test_calculations_have_the_value_of_exact_arithmetic(calculation):
    text, value = calculation
    quantity = parse_quantity(f"{text} + 0", equations=True)
    assert (None if quantity is None else quantity.written) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"9 \times 2 = 18", 18),
        (r"\frac{1}{2} \times 36 = 18", 18),
        ("The total is 2 * 9 = 18 dollars", 18),
        ("The game lasted 53 minutes.", 53),
        ("The change is -5", -5),
        ("220 + 90 + 60", 370),
        ("0.1 + 0.2", Fraction(3, 10)),
        (r"x = \frac{16}{3} \approx 5.33", Fraction(16, 3)),
    ],
)
def test_answers_may_be_equations_and_sentences(text, value):
    quantity = parse_quantity(text, equations=True)
    assert quantity is not None and quantity.written == value
    assert parse_quantity(text) is None or "approx" in text


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("50", "50%", True),
        ("0.5", "50%", True),
        ("50%", "0.5", True),
        ("50", "0.5", False),
        ("5 cm", "50 mm", True),
        ("5 cm", "5 m", False),
        ("5 cm", "5", True),
        ("$18", "€18", False),
        ("24", "2 dozen", True),
        ("5 million", "5 thousand", False),
        ("5", "5 million", False),
        ("5 million", "5", False),
        ("60", "60 dozen", False),
        ("5000000", "5 million", True),
        ("50%", "50 million", False),
        ("50%", "50%", True),
        ("2 pm", "2 am", False),
        ("2 pm", "2 pm", True),
        ("x = 5", "y = 5", False),
        ("5", "y = 5", True),
    ],
)
def test_equal_as_written_or_in_value(gold, answer, same):
    wanted, stated = parse_quantity(gold), parse_quantity(answer)
    assert wanted is not None and stated is not None
    assert is_same_quantity(wanted, stated) is same


@given(st.text(alphabet="5./,+-*()=% $\\{}abor^x\n", max_size=60))
def test_any_text_is_read_or_refused(text):
    for equations in (False, True):
        quantity = parse_quantity(text, equations=equations)
        assert quantity is None or is_same_quantity(quantity, quantity)


def test_plain_notation():
    assert to_plain_notation(r"**$\text{ (B) } 10\,000$**") == "(B) 10000"
    assert to_plain_notation(r"\sqrt{2}") == r"\sqrt{2}"
