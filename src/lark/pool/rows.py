"""Rows of a pool: the fields they have, how each is normalised, and faults with file, line and field."""

import datetime
import decimal
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
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


def _read_messages(name: str, raw: dict[str, Any]) -> list[dict[str, str]]:
    value = raw.get(name)
    if isinstance(value, str):
        value = parse_json(value, name)
    if not isinstance(value, list) or not value:
        shown = f"is {_show(value)}" if name in raw else "is missing"
        raise RowError(name, "no messages", f'{shown}: set it to a list of {{"role": ..., "content": ...}}')
    messages = [_read_turn(name, number, turn) for number, turn in enumerate(value, start=1)]
    if messages[-1]["role"] != "assistant":
        message = f"ends with a turn of the {messages[-1]['role']}: its last turn is the assistant's trajectory"
        raise RowError(name, "no assistant turn", message)
    if not messages[-1]["content"].strip():
        raise RowError(name, "empty trajectory", "the assistant's last turn is empty: fill it or take the row out")
    if not any(message["role"] == "user" for message in messages):
        raise RowError(name, "no user turn", "has no turn of the user: put the problem there")
    return messages


def _read_turn(name: str, number: int, turn: Any) -> dict[str, str]:
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise RowError(name, "faulty turn", f'{where} is {_show(turn)}: write {{"role": ..., "content": ...}}')
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise RowError(name, "unknown role", f"{where} has as role {_show(role)}: use {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(name, "faulty turn", f"{where} has as content {_show(content)}: use a string")
    for key, value in turn.items():
        if key not in ("role", "content") and value is not None:  # null: how Parquet writes the keys of other rows
            remedy = "it would not be trained on, so move it into content or take it out"
            raise RowError(name, "faulty turn", f"{where} has the further key {key}: {remedy}")
    return {"role": role, "content": _check_unicode(name, content)}


def _read_teacher(name: str, raw: dict[str, Any]) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(name, "faulty teacher", f"is {_show(value)}: set it to a name or null")
    return value if value is None else _check_unicode(name, value)


def _read_answer(name: str, raw: dict[str, Any]) -> str | None:
    value = raw.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables make floats of a column of integers with a gap: 42.0 was 42
    known = isinstance(value, str | int | float | decimal.Decimal) and not isinstance(value, bool)
    if value is not None and (not known or (isinstance(value, float) and not math.isfinite(value))):
        raise RowError(name, "faulty answer", f"is {_show(value)}: set it to a string, a number or null")
    return value if value is None else _check_unicode(name, str(value))


def _read_correct(name: str, raw: dict[str, Any]) -> bool | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise RowError(name, "faulty correct", f"is {_show(value)}: set it to true, false or null")
    return value


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
