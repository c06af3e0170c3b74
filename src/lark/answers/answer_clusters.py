r"""Clusters of a problem's sampled answers that are one answer, for maj@k."""

import re
from collections.abc import Sequence
from fractions import Fraction

from lark.answers.extract import parse_choice
from lark.answers.quantities import parse_number, to_plain_notation

NO_ANSWER = -1
"""The cluster of a sample that states no answer."""

_SPACING = re.compile(r"\s+|\\left\b|\\right\b")
_RIGHT = object()


def cluster_answers(answers: Sequence[str | None], correct: Sequence[bool], kind: str) -> list[int]:
    """Number the answers of a problem's samples, [N]: equal numbers are one answer, -1 is none.

    Answers that the checker accepts are all equal to the right one, and so to each other, except under the kind
    reasoning_gym, whose problems may have several; others are one answer where their `normalise_answer` is the same.

    Args:
        answers: as they were extracted; None: the sample states none.
        correct: the checker's verdicts on them.
        kind: the kind of check (`lark.answers.checker.KINDS`).
    """
    seen: dict[object, int] = {}
    numbers = []
    for answer, accepted in zip(answers, correct, strict=True):
        if answer is None:
            numbers.append(NO_ANSWER)
            continue
        key = _RIGHT if accepted and kind != "reasoning_gym" else normalise_answer(answer, kind)
        numbers.append(seen.setdefault(key, len(seen)))
    return numbers


def normalise_answer(answer: str, kind: str) -> Fraction | str:
    r"""Return the letter an answer chooses if the kind is choice, else the number it states (without unit and percent
    sign), else its text in plain notation without spaces, \left and \right; letters keep their case.
    """
    if kind == "choice" and (letter := parse_choice(answer)):
        return letter
    number = parse_number(answer)
    return _SPACING.sub("", to_plain_notation(answer)) if number is None else number
