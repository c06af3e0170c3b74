"""Rows of benchmarks, in the layouts people have them in, made into problems: bare text, gold answer, options."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

from lark.answers.extract import find_boxed, parse_number
from lark.common.errors import LarkError
from lark.pool.rows import RowError
from lark.tasks.conversations import fold_name

# Names of columns, without case, blanks, hyphens and underscores; the first one that a row has is taken.
_ID = ("problemid", "id", "uniqueid", "recordid", "problemidx")
_PROBLEM = ("problem", "question")
_ANSWER = ("answer", "expectedanswer", "solution")
_SUBJECT = ("subject", "type", "highleveldomain")
_OPTIONS = ("options", "choices")
_RIGHT, _WRONG = "correctanswer", ("incorrectanswer1", "incorrectanswer2", "incorrectanswer3")

Gold = Callable[[str], str]
"""Makes the gold answer of what a file states as answer; raises LarkError saying what is wrong with it."""


def read_problem(raw: dict[str, Any], number: int, gold: Gold | None) -> dict[str, Any]:
    """Read a benchmark's row: `problem_id`, `problem`, `answer`, and `level`, `subject`, `options` if known.

    number: of the row, from 0: the problem's id where no column gives one.
    gold: conversion of the answer; None: the row has options, and the answer is the letter of the right one.

    Raises:
        RowError: a field is missing or cannot be read.
    """
    columns = {fold_name(name): value for name, value in raw.items() if value is not None}
    row: dict[str, Any] = {"problem_id": str(_find_first(columns, _ID, number)), "problem": _read_problem_text(columns)}
    if gold is None:
        row |= _read_choice(row["problem"], columns)
    else:
        stated = _find_first(columns, _ANSWER)
        if not isinstance(stated, str | int | float) or isinstance(stated, bool) or not str(stated).strip():
            raise RowError("answer", "no answer", f"is missing; name the right answer's column {_ANSWER[0]}")
        if _find_first(columns, _ANSWER[:-1]) is None:  # a worked solution alone states its answer in a box
            stated = find_boxed(str(stated)) or ""
        try:
            row["answer"] = gold(str(stated).strip())
        except ValueError as error:
            raise RowError("answer", "faulty answer", f"{str(stated)[:80]!r} {error}") from error
    if (level := columns.get("level")) is not None:
        found = re.fullmatch(r"(?:level )?(\d+)", str(level).strip(), re.IGNORECASE)
        row["level"] = int(found[1]) if found else level
    if isinstance(subject := _find_first(columns, _SUBJECT), str):
        row["subject"] = subject
    return row


def read_text_gold(stated: str) -> str:
    """Return the answer as it stands, in LaTeX or words."""
    if not stated:
        raise LarkError("is empty: give the right answer")
    return stated


def read_number_gold(stated: str) -> str:
    r"""Read a number, of what follows the last ####: "... #### 1,234" is 1234, 27.0 is 27, 336^\circ is 336."""
    text = re.sub(r"\^\s*(\\circ|\{\s*\\circ\s*\})", "", stated.rpartition("####")[2]).strip()
    value = parse_number(text)
    if value is None:
        raise LarkError("is not a number: correct it or take the row out")
    return str(value.numerator) if value.denominator == 1 else text


def read_contest_gold(stated: str) -> str:
    """Read the answer to an AIME problem, an integer from 0 to 999, without leading zeros."""
    text = read_number_gold(stated)
    if not text.isdecimal() or int(text) > 999:
        raise LarkError("is not an integer from 0 to 999, as AIME's answers are: correct it or take the row out")
    return text


def get_letter(index: int) -> str:
    """Return A for 0, B for 1, ..."""
    assert 0 <= index < 26
    return chr(ord("A") + index)


def order_options(problem: str, options: list[str]) -> list[str]:
    """Order the options as they are asked: by a hash of the question and the option.

    So the order is the same in every run and whatever order a file lists them in, and no letter is favoured.
    """
    salt = "options-1\n" + " ".join(problem.split())
    return sorted(options, key=lambda option: hashlib.sha256(f"{salt}\n{' '.join(option.split())}".encode()).digest())


def _read_problem_text(columns: dict[str, Any]) -> str:
    if isinstance(body := columns.get("body"), str) and isinstance(question := columns.get("question"), str):
        body = body.strip()  # SVAMP tells the story in one column and asks in another, often without a stop between
        return f"{body}{'.' if body[-1:].isalnum() else ''} {question.strip()}".strip()
    problem = _find_first(columns, _PROBLEM)
    if not isinstance(problem, str) or not problem.strip():
        raise RowError("problem", "no problem", f"is missing, empty or not text; name its column {_PROBLEM[0]}")
    return problem.strip()


def _read_choice(problem: str, columns: dict[str, Any]) -> dict[str, Any]:
    """Return the options as they are asked, and the letter of the right one."""
    listed = [columns[_RIGHT], *map(columns.get, _WRONG)] if _RIGHT in columns else _find_first(columns, _OPTIONS)
    options = [option.strip() for option in listed if isinstance(option, str)] if isinstance(listed, list) else []
    if not 2 <= len(options) <= 26 or len(options) < len(listed) or not all(options):
        known = "the columns Correct Answer and Incorrect Answer 1 to 3, or a list options and an answer"
        raise RowError("options", "no options", f"are missing or not texts; give them in {known}")
    right = options[0] if _RIGHT in columns else _find_named_option(columns.get("answer"), options)
    asked = order_options(problem, options)
    return {"options": asked, "answer": get_letter(asked.index(right))}


def _find_named_option(stated: Any, options: list[str]) -> str:
    """Find the option that an answer names: by its place from 0, its letter or its text."""
    if isinstance(stated, int) and not isinstance(stated, bool) and 0 <= stated < len(options):
        return options[stated]
    letters, text = [get_letter(i) for i in range(len(options))], str(stated).strip()
    if text in letters:
        return options[letters.index(text)]
    if options.count(text) != 1:
        message = f"{text[:80]!r} names none of the options, or several; give the right one's letter, text or place"
        raise RowError("answer", "faulty answer", message)
    return text


def _find_first(columns: dict[str, Any], names: tuple[str, ...], default: Any = None) -> Any:
    return next((columns[name] for name in names if name in columns), default)
