r"""Clusters of a problem's sampled answers that are one answer, for maj@k."""

import re
from collections.abc import Sequence
from fractions import Fraction

from lark.answers.quantities import parse_number, to_plain_notation

NO_ANSWER = -1
"""The cluster of a sample that states no answer."""

_SPACING = re.compile(r"\s+|\\left\b|\\right\b")
_RIGHT = object()


def cluster_answers(answers: Sequence[str | None], correct: Sequence[bool], *, one_right: bool = True) -> list[int]:
    """Number the answers of a problem's samples, [N]: equal numbers are one answer, -1 is none.

    Answers that the checker accepts are all equal to the right one, and so to each other; others are one answer where
    their `normalise_answer` is the same.

    Args:
        answers: as they were extracted; None: the sample states none.
        correct: the checker's verdicts on them.
        one_right: False where a problem may have several right answers: those are then told apart too.
    """
    seen: dict[object, int] = {}
    numbers = []
    for answer, accepted in zip(answers, correct, strict=True):
        if answer is None:
            numbers.append(NO_ANSWER)
            continue
        key = _RIGHT if accepted and one_right else normalise_answer(answer)
        numbers.append(seen.setdefault(key, len(seen)))
    return numbers


def normalise_answer(answer: str) -> Fraction | str:
    r"""Return the number an answer states (without unit and percent sign), else its text in plain notation without
    spaces, \left and \right; letters keep their case.
    """
    number = parse_number(answer)
    return _SPACING.sub("", to_plain_notation(answer)) if number is None else number
