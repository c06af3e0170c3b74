import pytest

from lark.answers.equivalence import compare_as_written, tidy_latex


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("$x$", "x"),
        (r"\(x\).", "x"),
        ("3.14...", "3.14..."),
        ("**18**", "18"),
        (r"10,\!000", "10000"),
        (r"(1,\,234)", r"(1234)"),
        (r"(1,\,23)", r"(1,\,23)"),
        ("90°", r"90^\circ"),
        (r"\varnothing", r"\emptyset"),
        ("2√3", r"2\sqrt{3}"),
        (r"\$5", r"\$5"),
    ],
)
def test_tidy_spells_what_math_verify_reads(text, tidied):
    assert tidy_latex(text) == tidied
    assert tidy_latex(tidied) == tidied


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("27", "27.0", True),
        ("27", "28", False),
        (r"\frac{1}{3}", "0.3333333", True),
        ("5 cm", "5 m", False),
        ("x + 1", "x+1", True),
        ("x + 1", "1 + x", None),
        ("23", "2 3", None),
        (r"\text{June 20}", "June 20", True),
        ("2516_8", "2516", True),
        ("2516_8", "2516_7", False),
        ("11110_2", "(1E)_{16}", True),
        ("9_8", "9_7", None),
        ("x_1", "x", None),
        (r"\sqrt{8}", "3", None),
    ],
)
def test_what_shows_without_algebra(gold, answer, equal):
    assert compare_as_written(gold, answer) is equal
