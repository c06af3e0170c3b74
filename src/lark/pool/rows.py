"""Rows of a pool: the fields they have, how each is normalised, and faults with file, line and field."""

import ast
import datetime
import decimal
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Turn = dict[str, str]
"""A turn of a conversation: role and content."""
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
"""Names of speakers -> the role here."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn that hold the thoughts which come before its content."""
_TURN_KEYS = (("role", "from"), ("content", "value"), THOUGHTS)
_NOTHING = (None, "", [], {})  # as Parquet and exports write the keys that other turns have
VERDICTS = {True: True, "true": True, "yes": True, "1": True, False: False, "false": False, "no": False, "0": False}
"""Ways to write a verdict, apart from case; 1 and 0 equal true and false."""
SHOWN_FAULTS = 20
"""Kinds of mistakes that a message shows."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing wrong with a row, or with a file as a whole."""

    file: str
    """The file, named relative to the folder that all files read together share."""
    line: int | None
    """Line in JSONL and CSV, row in JSON and Parquet, counted from 1; None: the file as a whole."""
    field: str
    """Name of the faulty field; "row" where the line cannot be read as a row."""
    reason: str
    """The kind of fault in a few fixed words, under which dropped rows are counted."""
    message: str
    """What is wrong and what to do about it."""

    def __str__(self) -> str:
        place = "" if self.line is None else f", {self.unit} {self.line}"
        return f"{self.file}{place}, {self.field}: {self.message}"

    @property
    def unit(self) -> str:
        """Name what `line` counts."""
        return "row" if self.file.lower().endswith((".json", ".parquet")) else "line"


class RowError(Exception):
    """Why a row, or the rest of a file, cannot be used; `at` makes it a `Fault` once its place is known."""

    def __init__(self, field: str, reason: str, message: str, line: int | None = None):
        super().__init__(field, reason, message, line)
        self.field, self.reason, self.message, self.line = field, reason, message, line

    def at(self, file: str, line: int | None) -> Fault:
        return Fault(file=file, line=self.line or line, field=self.field, reason=self.reason, message=self.message)


def describe_faults(faults: Sequence[Fault]) -> list[str]:
    """Describe faults in one line for each kind of mistake: the first in full, the others by their places."""
    kinds: dict[tuple[str, str, str], list[Fault]] = defaultdict(list)
    for fault in faults:  # messages of one kind differ in the value that they show and have the same remedy
        kinds[fault.field, fault.reason, fault.message.rpartition(": ")[2]].append(fault)
    lines = []
    for first, *others in list(kinds.values())[:SHOWN_FAULTS]:
        places = [f"{fault.unit} {fault.line}" if fault.file == first.file else fault.file for fault in others[:5]]
        more = ", ..." if len(others) > 5 else ""
        lines.append(f"{first}" + (f" ({len(others):,} more like this: {', '.join(places)}{more})" if others else ""))
    if len(kinds) > SHOWN_FAULTS:
        lines.append(f"... and {len(kinds) - SHOWN_FAULTS} further kinds of mistakes")
    return lines


def parse_json(text: str, field: str) -> Any:
    """Return the value of a JSON text that stands in `field`. Raises RowError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise RowError(field, "broken JSON", f"broken JSON at {place}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise RowError(field, "broken JSON", f"JSON that cannot be read: {error}") from error


def normalise_row(raw: Any) -> tuple[dict[str, Any], list[RowError]]:
    """Return the valid fields of a pool's row, normalised, and what is wrong with the others."""
    if not isinstance(raw, dict):
        return {}, [RowError("row", "no object", f"is {_show(raw)}: a row is an object of fields")]
    row, errors = {}, []
    for name, read in FIELDS.items():
        try:
            row[name] = read(name, raw)
        except RowError as error:
            errors.append(error)
    return row, errors


def _show(value: Any) -> str:
    return "null" if value is None else f"the {type(value).__name__} {str(value)[:40]!r}"


def _show_field(name: str, raw: dict[str, Any]) -> str:
    return f"is {_show(raw[name])}" if name in raw else "is missing"


def _check_unicode(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = f"character {error.start + 1} is half of a surrogate pair, which UTF-8 cannot hold: replace it"
        raise RowError(name, "invalid Unicode", message) from error
    return value


def _read_id(name: str, raw: dict[str, Any]) -> str:
    value = raw.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return _check_unicode(name, value)
    remedy = {
        "problem_id": "number the problems of the pool, by string or integer",
        "candidate_id": "number the candidates of each problem, by string or integer",
    }[name]
    raise RowError(name, f"no {name}", f"{_show_field(name, raw)}: {remedy}")


def _read_messages(name: str, raw: dict[str, Any]) -> list[Turn]:
    if raw.get(name) is None:
        shown = _show_field(name, raw)
        raise RowError(name, "no messages", f'{shown}: set it to a list of {{"role": ..., "content": ...}}')
    messages = read_turns(raw[name], name)
    if messages[-1]["role"] != "assistant":
        message = f"ends with a turn of the {messages[-1]['role']}: its last turn is the assistant's trajectory"
        raise RowError(name, "no assistant turn", message)
    if not messages[-1]["content"].strip():
        raise RowError(name, "empty trajectory", "the assistant's last turn is empty: fill it or take the row out")
    if not any(message["role"] == "user" for message in messages):
        raise RowError(name, "no user turn", "has no turn of the user: put the problem there")
    return messages


def read_turns(value: Any, name: str) -> list[Turn]:
    """Return a conversation as {role, content} turns. Raises RowError.

    value: a list of {role, content} or {from, value}, or that list as text (JSON, or Python's notation).
    name: the field it stands in.

    Thoughts beside an assistant's content (`THOUGHTS`) are put before it, between <think> and </think>. Any other key
    that says something is a fault: it would not be trained on.
    """
    if isinstance(value, str):
        value = _parse_list(value, name)
    if not isinstance(value, list) or not value:
        message = f'is {_show(value)}: set it to a list of {{"role": ..., "content": ...}}'
        raise RowError(name, "no messages", message)
    return [_read_turn(name, number, turn) for number, turn in enumerate(value, start=1)]


def _parse_list(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # data sets saved from tables hold Python's own notation
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        message = f"is text that is neither JSON nor a Python list: {text[:40]!r}"
        raise RowError(name, "unreadable messages", message) from error


def _read_turn(name: str, number: int, turn: Any) -> Turn:
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise RowError(name, "faulty turn", f'{where} is {_show(turn)}: write {{"role": ..., "content": ...}}')
    keys = [next((key for key in names if turn.get(key) is not None), names[0]) for names in _TURN_KEYS]
    speaker, content, thoughts = map(turn.get, keys)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(name, "unknown role", f"{where} has as role {_show(speaker)}: use {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(name, "faulty turn", f"{where} has as content {_show(content)}: use a string")
    further = [key for key, value in turn.items() if key not in keys and value not in _NOTHING]
    if thoughts not in _NOTHING and role != "assistant":
        further.append(keys[2])
    if further:
        remedy = "it would not be trained on, so move it into content or take it out"
        raise RowError(name, "faulty turn", f"{where} has the further key {further[0]}: {remedy}")
    return {"role": role, "content": _check_unicode(name, join_thoughts(thoughts, content, name))}


def join_thoughts(thoughts: Any, content: str, name: str) -> str:
    """Put thoughts that stand apart before the content, between <think> and </think>. Raises RowError."""
    if thoughts is None or (isinstance(thoughts, str) and not thoughts.strip()):
        return content
    if not isinstance(thoughts, str):
        raise RowError(name, "faulty thoughts", f"has as thoughts {_show(thoughts)}: use a string")
    if "<think>" in content:
        raise RowError(name, "thoughts twice", "has thoughts in its content and beside it: keep one of them")
    return f"<think>\n{thoughts.strip()}\n</think>\n\n{content}"


def _read_teacher(name: str, raw: dict[str, Any]) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(name, "faulty teacher", f"is {_show(value)}: set it to a name or null")
    return value if value is None else _check_unicode(name, value)


def _read_answer(name: str, raw: dict[str, Any]) -> str | None:
    value = raw.get(name)
    known = isinstance(value, str | int | float | decimal.Decimal) and not isinstance(value, bool)
    if value is not None and (not known or (isinstance(value, float) and not math.isfinite(value))):
        raise RowError(name, "faulty answer", f"is {_show(value)}: set it to a string, a number or null")
    return value if value is None else _check_unicode(name, format_answer(value))


def format_answer(value: Any) -> str:
    """Return an answer as text: tables make floats of a column of integers with a gap, so 42.0 was 42."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _read_correct(name: str, raw: dict[str, Any]) -> bool | None:
    return read_verdict(raw.get(name), name)


def read_verdict(value: Any, name: str) -> bool | None:
    """Return a verdict as true, false or None, whichever of `VERDICTS` it is written as. Raises RowError."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    known = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(known, str | int | float) or (verdict := VERDICTS.get(known)) is None:
        raise RowError(name, "faulty correct", f"is {_show(value)}: set it to true, false (yes, no, 1, 0) or null")
    return verdict


def _read_extra(_: str, raw: dict[str, Any]) -> str:
    """Return the further columns as one JSON object, so that files with different ones fit into one table."""
    further = []
    for name in sorted(raw.keys() - COLUMNS):
        value = raw[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        try:
            text = json.dumps({name: value}, default=_make_plain, ensure_ascii=False, sort_keys=True)
        except TypeError as error:
            raise RowError(name, "faulty column", f"{error}: store it as text or take the column out") from error
        further.append(_check_unicode(name, text)[1:-1])
    return "{" + ", ".join(further) + "}"


def _make_plain(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):  # Parquet has them, JSON has not
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be carried along")


FIELDS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "problem_id": _read_id,
    "candidate_id": _read_id,
    "teacher": _read_teacher,
    "messages": _read_messages,
    "answer": _read_answer,
    "correct": _read_correct,
    "extra": _read_extra,
}
"""The fields of a normalised row; each function returns its field of the row as read, or raises RowError."""
COLUMNS = FIELDS.keys() - {"extra"}
"""The columns of a pool that have a meaning; every other one is a further column."""
