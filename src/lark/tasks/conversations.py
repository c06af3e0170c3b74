"""Rows of others' data sets read as candidates: which columns hold the problem, the trajectories and the verdicts."""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lark.answers.extract import find_boxed
from lark.pool.rows import RowError

Turn = dict[str, str]

# What data sets call the speaker -> the role here.
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

    def list_names(self) -> list[str]:
        """List the names of all columns that are set."""
        return [name for spec in fields(self) for name in _list_names(getattr(self, spec.name))]


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
        """Return what the last turn of the user asks."""
        return next((turn["content"] for turn in reversed(self.prompt) if turn["role"] == "user"), "")


def read_candidates(
    row: Any,
    columns: Columns,
    *,
    problem: Mapping[str, Any] | None = None,
    system: str | None = None,
    teacher: str | None = None,
) -> Iterator[Candidate | RowError]:
    """Yield the candidates of a row, or a RowError in place of one that cannot be read.

    problem: its text and answer (`problem`, `answer`), where the row has none.
    system: system turn of prompts that are made of a problem's text.
    teacher: who wrote the trajectories where no column says it.
    Raises RowError for the whole row.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError("row", "no object", f"is {type(row).__name__}: a row is an object of columns")
    problem = problem or {}
    turns = _read_turns(row, columns, problem.get("problem"), system)
    identifier = row.get(columns.problem_id)
    shared: dict[str, Any] = {
        "problem_id": str(identifier) if isinstance(identifier, str | int) else None,
        "answer": _read_answer(row, columns, problem.get("answer")),
        "further": {name: row[name] for name in columns.keep if row.get(name) is not None},
    }
    names = _list_names(columns.trajectory)
    if any(row.get(name) is not None for name in names):
        prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        trajectories = [(number, name, row.get(name)) for number, name in enumerate(names)]
    elif (names and columns.messages is None) or turns[-1]["role"] != "assistant":
        where = ", ".join(names) or str(columns.messages)
        raise RowError(where, "empty trajectory", "holds no trajectory: fill it or take the row out")
    else:
        prompt = turns[:-1]
        trajectories = [(0, str(columns.messages), turns[-1]["content"])]
    for number, name, value in trajectories:
        texts = value if isinstance(value, list) else [value]
        for i, text in enumerate(texts):
            place = (number, i, len(texts))
            try:
                written_by = _read_beside(row, columns.teacher, 0, i, len(texts))
                yield Candidate(
                    prompt=prompt,
                    trajectory=_join_thoughts(_read_beside(row, columns.reasoning, *place), text, name),
                    teacher=written_by
                    if isinstance(written_by, str) and written_by
                    else (name if len(names) > 1 else teacher),
                    correct=_read_verdict(_read_beside(row, columns.correct, *place), str(columns.correct)),
                    **shared,
                )
            except RowError as error:
                yield error


def parse_turns(value: Any, name: str) -> list[Turn]:
    """Return a conversation as {role, content} turns. Raises RowError."""
    if isinstance(value, str):
        value = _parse_text(value, name)
    if not isinstance(value, list) or not value:
        raise RowError(name, "no messages", f"is {type(value).__name__}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowError(name, "faulty turn", f"turn {number} is {type(turn).__name__}, not an object")
        speaker = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise RowError(name, "unknown role", f"turn {number} is by {speaker!r}, not one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise RowError(name, "faulty turn", f"turn {number} has {type(content).__name__} as content, not text")
        turns.append({"role": _ROLES[speaker], "content": content})
    return turns


def _parse_text(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # data sets saved from tables hold Python's own notation
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        message = f"is text that is neither JSON nor a Python list: {text[:40]!r}"
        raise RowError(name, "unreadable messages", message) from error


def _read_turns(row: dict, columns: Columns, problem: str | None, system: str | None) -> list[Turn]:
    if (messages := row.get(columns.messages)) is not None:
        return parse_turns(messages, str(columns.messages))
    text = row.get(columns.problem)
    text = problem if text is None else text
    if not isinstance(text, str) or not text.strip():
        name = columns.problem or columns.messages or "problem"
        raise RowError(name, "no problem", "is missing, empty or not text: give the problem, or messages")
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]


def _read_answer(row: dict, columns: Columns, known: Any) -> Any:
    answer = row.get(columns.answer)
    if answer is None and isinstance(solution := row.get(columns.solution), str):
        answer = find_boxed(solution)
    return known if answer is None else answer


def _read_beside(row: dict, names: str | list[str] | None, number: int, i: int, count: int) -> Any:
    """Return what goes along with trajectory `i` of `count` in trajectory column `number`."""
    listed = _list_names(names)
    if not listed:
        return None
    name = listed[number] if number < len(listed) else listed[0]
    value = row.get(name)
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise RowError(name, "unequal lists", f"has {len(value)} values for {count} trajectories: give each its own")
    return value[i]


def _join_thoughts(thoughts: Any, text: Any, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RowError(name, "empty trajectory", "is empty or not text: fill it or take the row out")
    has_thoughts = isinstance(thoughts, str) and bool(thoughts.strip())
    return f"<think>\n{thoughts.strip()}\n</think>\n\n{text}" if has_thoughts else text


def _read_verdict(value: Any, name: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise RowError(name, "faulty correct", f"is {value!r}: set it to true, false, 1, 0 or null")


def _list_names(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value
