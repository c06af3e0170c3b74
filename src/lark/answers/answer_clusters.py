r"""Votes: which answers of a problem's samples are one answer, for maj@k."""

import re
from collections.abc import Sequence
from fractions import Fraction

from lark.answers.quantities import parse_number, plain_notation

NONE = -1
"""The vote of a sample that states no answer."""

_SPACING = re.compile(r"\s+|\\left\b|\\right\b")
_RIGHT = object()


def votes(answers: Sequence[str | None], correct: Sequence[bool], *, one_right: bool = True) -> list[int]:
    """A number for the answer of each of a problem's samples, [N]: equal numbers are one answer, -1 is none.

    Answers that the checker accepts are all equal to the right one, and so to each other; others are one answer where
    their `normal_form` is the same.

    Args:
        answers: as they were extracted; None: the sample states none.
        correct: the checker's verdicts on them.
        one_right: False where a problem may have several right answers: those are then told apart too.
    """
    seen: dict[object, int] = {}
    numbers = []
    for answer, accepted in zip(answers, correct, strict=True):
        if answer is None:
            numbers.append(NONE)
            continue
        key = _RIGHT if accepted and one_right else normal_form(answer)
        numbers.append(seen.setdefault(key, len(seen)))
    return numbers


def normal_form(answer: str) -> Fraction | str:
    r"""The number an answer states (without unit and percent sign), else its text in plain notation and without white
    space, \left and \right; letters keep their case.
    """
    number = parse_number(answer)
    return _SPACING.sub("", plain_notation(answer)) if number is None else number
