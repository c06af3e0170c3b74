"""Equality of LaTeX expressions by math-verify, with comparisons of our own for numbers and for roots and logarithms.

math-verify compares numbers within absolute tolerances, by which 1/2^99 is 1/2^98, and takes symbols for any real
number, by which the square root of 1/n is not 1 over that of n. Its functions for these two questions are replaced, so
that elements of sets, tuples, matrices and both sides of relations are compared in the same way.

Runs in worker processes (lark.answers.workers): a power of large integers may take any time. Importing this module
imports sympy.
"""

from fractions import Fraction
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, grader, parse, verify
from sympy.matrices import MatrixBase

from lark.answers.quantities import is_same_number

_DIGITS = 60  # significant ones, to which irrational numbers are computed
_MAX_SYMBOLS = 6

_is_zero_difference = grader.sympy_symbolic_eq


def is_math_equal(gold: str, answer: str) -> bool:
    """Tell whether the LaTeX expressions are equal; not symmetric, as math-verify is not."""
    # Boxed, because math-verify looks for LaTeX in text, and only at that one place: else it takes any number it finds
    # in what it cannot read ("5 or 6" would be 6).
    unlimited: Any = None  # its annotation says int, its documentation None
    wanted, found = (
        parse(
            rf"\boxed{{{text}}}",
            extraction_config=[LatexExtractionConfig()],
            extraction_mode="first_match",
            parsing_timeout=unlimited,
        )
        for text in (gold, answer)
    )
    return bool(verify(wanted, found, timeout_seconds=None, allow_set_relation_comp=True))


def compare_numbers(gold: Any, answer: Any, *_: int) -> bool:
    """Tell whether two sympy numbers, or matrices of them, are equal; False for what has symbols.

    Decimals are the fractions they were written as. A percent sign may be meant or not, as in `is_same_quantity`.
    """
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(map(compare_numbers, gold.flat(), answer.flat()))
    if isinstance(gold, MatrixBase) or isinstance(answer, MatrixBase):
        return False
    without_percent = [_replace_percent(side) for side in (gold, answer)]
    return _is_same_value(gold, answer) or (without_percent != [gold, answer] and _is_same_value(*without_percent))


def compare_expressions(gold: Any, answer: Any) -> bool:
    """Tell whether two sympy expressions are equal, or are where all symbols are positive and one of them is negative,
    as far as both have real values there: the root of 1/n is 1 over that of n, but x is not |x|.
    """
    if _is_zero_difference(gold, answer):
        return True
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    has_root = any(not power.exp.is_integer for side in (gold, answer) for power in side.atoms(sympy.Pow))
    if not 0 < len(symbols) <= _MAX_SYMBOLS or not (has_root or gold.has(sympy.log) or answer.has(sympy.log)):
        return False
    positive = {symbol: sympy.Dummy(str(symbol), positive=True) for symbol in symbols}
    difference = sympy.expand_log((gold - answer).doit().xreplace(positive))
    if sympy.simplify(difference) != 0:
        return False
    # Equal where all symbols are positive, as x is the root of x^2: where one is negative, too?
    point = {symbol: sympy.Rational(k + 3, 7) for k, symbol in enumerate(symbols)}
    for symbol in symbols:
        flipped = point | {symbol: -point[symbol]}
        one, other = _evaluate(gold, flipped), _evaluate(answer, flipped)
        if one is not None and other is not None and abs(one - other) > 1e-9 * abs(one):
            return False
    return True


def _evaluate(side: Any, point: dict[Any, Any]) -> Any:
    """Return the value at the point, or None where a part of the expression is not real."""
    parts: list[Any] = list(sympy.preorder_traversal(side.doit()))
    values = [part.xreplace(point).evalf() for part in parts]
    return values[0] if all(value.is_real for value in values) else None


grader.sympy_numeric_eq = compare_numbers
grader.sympy_symbolic_eq = compare_expressions


def _replace_percent(side: Any) -> Any:
    return side.replace(sympy.UnevaluatedExpr(sympy.Rational(1, 100)), sympy.Integer(1))


def _is_same_value(gold: Any, answer: Any) -> bool:
    values: list[Any] = []
    for side in (gold, answer):
        decimals = {number: sympy.Rational(str(number)) for number in side.atoms(sympy.Float)}
        values.append(side.xreplace(decimals).doit())
    if any(not value.is_number for value in values):
        return False
    if values[0] == values[1]:
        return True
    if not all(value.is_Rational for value in values):
        if not all(value.is_real for value in values):  # left to algebra
            return False
        values = [value if value.is_Rational else sympy.Rational(value.evalf(_DIGITS)) for value in values]
        if abs(values[0] - values[1]) * 10 ** (_DIGITS - 10) <= abs(values[0]):
            return True
    return is_same_number(*(Fraction(int(value.p), int(value.q)) for value in values))
