"""Rows of others' data sets read as candidates: which columns hold the problem, the trajectories and the verdicts."""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lark.answers.extract import find_boxed
from lark.pool.rows import RowError

Turn = dict[str, str]

# What data sets call the one who speaks -> the role here.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a data set hold what; null: none does.

    A row is one problem with one or several trajectories: one column of text, one column of lists of texts, or several
    such columns. `teacher`, `reasoning` and `correct` go along with them: one value for all, or a list of as many.
    """

    problem: str | None = None
    """Text of the problem: the user's turn."""
    problem_id: str | None = None
    """Id of the problem; without it, problems are told apart by their text."""
    messages: str | None = None
    """A conversation as a list of {role, content} or {from, value}, or that list as text (JSON or Python). Its last
    turn is the trajectory, unless `trajectory` is set: then it is the prompt."""
    trajectory: str | list[str] | None = None
    """Trajectories: texts or lists of texts."""
    reasoning: str | list[str] | None = None
    """Thoughts, where they stand apart from the trajectory: put before it between <think> and </think>."""
    teacher: str | None = None
    """Who wrote it; without it, with several columns of trajectories, the name of the column."""
    answer: str | None = None
    """The right answer."""
    solution: str | None = None
    """A reference solution, whose last \\boxed{...} is the right answer where `answer` has none."""
    correct: str | list[str] | None = None
    """Verdicts on the trajectories: true or false, 1 or 0, null."""
    keep: list[str] = field(default_factory=list)
    """Further columns that the pool carries along, for filters, priors and checkers."""

    def named(self) -> list[str]:
        """The names of all columns that are set."""
        values = [getattr(self, spec.name) for spec in fields(self)]
        return [name for value in values for name in _listed(value)]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trajectory as a row of a data set gives it."""

    prompt: list[Turn]
    trajectory: str
    problem_id: str | None
    teacher: str | None
    answer: Any
    correct: bool | None
    further: dict[str, Any]

    @property
    def question(self) -> str:
        """What the last turn of the user asks."""
        return next((turn["content"] for turn in reversed(self.prompt) if turn["role"] == "user"), "")


def read_candidates(
    row: Any,
    columns: Columns,
    *,
    problem: Mapping[str, Any] | None = None,
    system: str | None = None,
    teacher: str | None = None,
) -> Iterator[Candidate | RowError]:
    """The candidates of a row, or a RowError in place of one that cannot be read. Raises RowError for the whole row.

    problem: its text and answer (`problem`, `answer`), where the row has none.
    system: system turn of prompts that are made of a problem's text.
    teacher: who wrote the trajectories where no column says it.
    """
    if not isinstance(row, dict):
        raise RowError("row", "no object", f"is {type(row).__name__}: a row is an object of columns")
    problem = problem or {}
    turns = _conversation(row, columns, problem.get("problem"), system)
    answer = _value(row, columns.answer)
    if answer is None and isinstance(solution := _value(row, columns.solution), str):
        answer = find_boxed(solution)
    if answer is None:
        answer = problem.get("answer")
    identifier = _value(row, columns.problem_id)
    shared = {
        "problem_id": str(identifier) if isinstance(identifier, str | int) else None,
        "answer": answer,
        "further": {name: row[name] for name in columns.keep if row.get(name) is not None},
    }
    names = _listed(columns.trajectory)
    if not any(_value(row, name) is not None for name in names):
        if (names and columns.messages is None) or not turns or turns[-1]["role"] != "assistant":
            where = ", ".join(names) or columns.messages
            raise RowError(str(where), "empty trajectory", "holds no trajectory: fill it or take the row out")
        yield Candidate(
            prompt=turns[:-1],
            trajectory=turns[-1]["content"],
            teacher=_text(_value(row, columns.teacher)) or teacher,
            correct=_verdict(_value(row, next(iter(_listed(columns.correct)), None)), str(columns.correct)),
            **shared,
        )
        return
    prompt = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    for number, name in enumerate(names):
        texts = _value(row, name)
        texts = texts if isinstance(texts, list) else [texts]
        for i, text in enumerate(texts):
            try:
                yield Candidate(
                    prompt=prompt,
                    trajectory=_whole(text, _beside(row, columns.reasoning, number, i, len(texts)), name),
                    teacher=_text(_beside(row, columns.teacher, 0, i, len(texts)))
                    or (name if len(names) > 1 else teacher),
                    correct=_verdict(_beside(row, columns.correct, number, i, len(texts)), str(columns.correct)),
                    **shared,
                )
            except RowError as error:
                yield error


def parse_turns(value: Any, name: str) -> list[Turn]:
    """A conversation as {role, content} turns. Raises RowError."""
    if isinstance(value, str):
        value = _parsed(value, name)
    if not isinstance(value, list) or not value:
        raise RowError(name, "no messages", f"is {type(value).__name__}, not a list of turns")
    return [_turn(turn, number, name) for number, turn in enumerate(value, start=1)]


def _conversation(row: dict[str, Any], columns: Columns, problem: str | None, system: str | None) -> list[Turn]:
    if (messages := _value(row, columns.messages)) is not None:
        return parse_turns(messages, str(columns.messages))
    text = _value(row, columns.problem)
    text = problem if text is None else text
    if not isinstance(text, str) or not text.strip():
        name = columns.problem or columns.messages or "problem"
        raise RowError(name, "no problem", "is missing, empty or no text: give the problem, or messages")
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # data sets saved from tables hold Python's own notation
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        message = f"is text that is neither JSON nor a Python list: {text[:40]!r}"
        raise RowError(name, "unreadable messages", message) from error


def _turn(turn: Any, number: int, name: str) -> Turn:
    if not isinstance(turn, dict):
        raise RowError(name, "faulty turn", f"turn {number} is {type(turn).__name__}, not an object")
    speaker = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RowError(name, "unknown role", f"turn {number} is by {speaker!r}, not one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise RowError(name, "faulty turn", f"turn {number} has {type(content).__name__} as content, not text")
    return {"role": _ROLES[speaker], "content": content}


def _value(row: dict[str, Any], name: str | None) -> Any:
    return None if name is None else row.get(name)


def _beside(row: dict[str, Any], names: str | list[str] | None, number: int, i: int, count: int) -> Any:
    """What goes along with trajectory `i` of `count` in trajectory column `number`."""
    listed = _listed(names)
    if not listed:
        return None
    name = listed[number] if number < len(listed) else listed[0]
    value = row.get(name)
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise RowError(name, "unequal lists", f"has {len(value)} values for {count} trajectories: give each its own")
    return value[i]


def _whole(text: Any, thoughts: Any, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RowError(name, "empty trajectory", "is empty or no text: fill it or take the row out")
    return (
        f"<think>\n{thoughts.strip()}\n</think>\n\n{text}" if isinstance(thoughts, str) and thoughts.strip() else text
    )


def _verdict(value: Any, name: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise RowError(name, "faulty correct", f"is {value!r}: set it to true, false, 1, 0 or null")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value
