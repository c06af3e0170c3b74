"""Rows of JSONL, JSON and Parquet files, read one at a time with their place, and the checks of one row of a pool.

A reader yields (line, row), with a `RowError` as the row where that row alone is lost, and raises a `RowError` where
the rest of the file is lost as well.
"""

import datetime
import decimal
import difflib
import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lark.common.errors import LarkError

ROLES = ("system", "user", "assistant")
PARQUET_ROWS = 200  # rows of a Parquet file held at a time
PARQUET_BUFFER = 2**20  # bytes; without it a whole row group is held, which may be the whole file


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing wrong with a row, or with a file as a whole."""

    file: str
    """The file, named relative to the folder that all files read together share."""
    line: int | None
    """Line, counted from 1 (Parquet: row, counted from 1); None: the file as a whole."""
    field: str
    """Name of the faulty field; "row" where the line cannot be read as a row."""
    reason: str
    """The kind of fault in a few fixed words, under which dropped rows are counted."""
    message: str
    """What is wrong and what to do about it."""

    def __str__(self) -> str:
        place = "" if self.line is None else f", {'row' if _suffix(self.file) == '.parquet' else 'line'} {self.line}"
        return f"{self.file}{place}, {self.field}: {self.message}"


class RowError(Exception):
    """Why a row, or the rest of a file, cannot be taken; `at` makes it a `Fault` once its place is known."""

    def __init__(self, field: str, reason: str, message: str, line: int | None = None):
        super().__init__(field, reason, message, line)
        self.field, self.reason, self.message, self.line = field, reason, message, line

    def at(self, file: str, line: int | None) -> Fault:
        return Fault(file=file, line=line, field=self.field, reason=self.reason, message=self.message)


def find_files(source: str | Path | Sequence[str | Path], *, setting: str) -> dict[str, Path]:
    """The files of a file, a folder, a glob or a list of these, in order, each once.

    setting: the name under which the user chose them, such as "task.pool".
    Keys are the names relative to the folder that all files share: unique, and the same wherever that folder lies.
    Raises LarkError naming `setting` for a missing file, an unknown ending, or a folder or glob with no file.
    """
    sources = [source] if isinstance(source, str | Path) else list(source or [])
    if not sources or not all(map(str, sources)):
        raise LarkError(f"{setting} is not set: set it to a {ENDINGS} file, or to a folder or glob of such files")
    paths: dict[Path, None] = {}  # ordered, and each file once where items of a list overlap
    for item in sources:
        path = Path(item).expanduser().absolute()  # not resolved: a hub cache links to files without an ending
        if not path.exists() and not glob.has_magic(str(path)):
            raise LarkError(f"{setting}={item} does not exist: {_closest(path, setting)}")
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        found = [file for match in matches for file in (_inside(match) if match.is_dir() else [match])]
        if not found:
            raise LarkError(f"{setting}={item} holds no {ENDINGS} file: set {setting} to where the rows are")
        paths.update(dict.fromkeys(found))
    for path in paths:
        if _suffix(path) not in READERS:
            raise LarkError(f"{setting}={path} has an unknown ending: convert it to (or name it) {ENDINGS}")
    shared = os.path.commonpath([path.parent for path in paths])
    return {path.relative_to(shared).as_posix(): path for path in paths}


def _suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _suffix(path) in READERS and not path.name.startswith("."))


def _closest(path: Path, setting: str) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}, correct {setting}"
    names = [other.name for other in _inside(path.parent)]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    if close:
        return f"did you mean {path.parent / close[0]}?"
    return f"set {setting} to a {ENDINGS} file ({path.parent} holds {', '.join(names[:5]) or 'none'})"


Advance = Callable[[float], None]
"""Gets of every row the bytes that it takes in its file, roughly."""


def read_rows(path: Path, advance: Advance = lambda taken: None) -> Iterator[tuple[int, Any]]:
    """(line, row) of one file by the ending of its name; rows are whatever JSON stands there, unchecked.

    A JSONL file is read line by line, a Parquet file `PARQUET_ROWS` rows at a time, a JSON list is in memory whole.
    Yields a `RowError` as the row of a line that is broken; raises `RowError` where the rest of the file is lost.
    """
    return READERS[_suffix(path)](path, advance)


def parse_json(text: str, field: str) -> Any:
    """The value of a JSON text that stands in `field`. Raises RowError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(field, "broken JSON", f"broken JSON at column {error.pos + 1}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise RowError(field, "broken JSON", f"JSON that cannot be read: {error}") from error


def _decode(data: bytes, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")  # a byte order mark may open a file, nothing else
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} (0x{data[error.start]:02x}) is not UTF-8: save the file as UTF-8"
        raise RowError("row", "invalid UTF-8", message) from error


def _read_jsonl(path: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:  # in bytes: a broken line must not end the file, and only \n ends a line
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            advance(len(data))
            try:
                row = parse_json(_decode(data.rstrip(), first=line == 1), "row")
            except RowError as error:
                row = error
            yield line, row


def _read_json(path: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    # The text is loaded whole, as the standard library decodes no list from a file piece by piece. Its rows are decoded
    # one at a time, so that their lines are known. A pool too large for this belongs in JSONL or Parquet.
    text = _decode(path.read_bytes(), first=True)
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")

    def skip(position: int) -> int:
        match = space.match(text, position)
        assert match, "the pattern matches the empty string"
        return match.end()

    at = skip(0)
    if at == len(text):
        return
    try:
        if text[at] != "[":
            raise json.JSONDecodeError("Expecting one list of rows (rows one a line belong in a .jsonl file)", text, at)
        at, line, counted = skip(at + 1), 1, 0
        more = not text.startswith("]", at)
        while more:
            line, counted = line + text.count("\n", counted, at), at
            begin, (row, at) = at, decoder.raw_decode(text, at)
            advance(at - begin)
            yield line, row
            at = skip(at)
            more = text.startswith(",", at)
            if more:
                at = skip(at + 1)
            elif not text.startswith("]", at):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if skip(at + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, skip(at + 1))
    except json.JSONDecodeError as error:
        message = f"broken JSON at column {error.colno}: {error.msg}; nothing from here on can be read"
        raise RowError("row", "broken JSON", message, line=error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise RowError("row", "broken JSON", f"JSON that cannot be read: {error}", line=line) from error


def _read_parquet(path: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    count, size = 0, path.stat().st_size
    try:
        with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    count += 1
                    advance(size / file.metadata.num_rows)
                    yield count, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"no row from here on can be read as Parquet: {error}"
        raise RowError("row", "damaged Parquet", message, line=count + 1) from error


READERS: dict[str, Callable[[Path, Advance], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
ENDINGS = ".jsonl, .json or .parquet"


def normalise(raw: Any) -> tuple[dict[str, Any], list[RowError]]:
    """The fields of a pool's row that are valid, normalised, and what is wrong with the others."""
    if not isinstance(raw, dict):
        return {}, [RowError("row", "no object", f"is {_shown(raw)}: a row is an object of fields")]
    row, errors = {}, []
    for name, check in FIELDS.items():
        try:
            row[name] = check(name, raw)
        except RowError as error:
            errors.append(error)
    return row, errors


def _shown(value: Any) -> str:
    return "null" if value is None else f"the {type(value).__name__} {str(value)[:40]!r}"


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = f"character {error.start + 1} is half of a surrogate pair, which UTF-8 cannot hold: replace it"
        raise RowError(name, "invalid Unicode", message) from error
    return value


def _id(name: str, raw: dict[str, Any]) -> str:
    value = raw.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return _text(name, value)
    what = f"is {_shown(value)}" if name in raw else "is missing"
    raise RowError(name, f"no {name}", f"{what}: number the {name[:-3]}s of {_ID_SCOPE[name]}, by string or integer")


_ID_SCOPE = {"problem_id": "the pool", "candidate_id": "each problem"}


def _messages(name: str, raw: dict[str, Any]) -> list[dict[str, str]]:
    value = raw.get(name)
    if isinstance(value, str):
        value = parse_json(value, name)
    if not isinstance(value, list) or not value:
        what = f"is {_shown(value)}" if name in raw else "is missing"
        raise RowError(name, "no messages", f'{what}: set it to a list of {{"role": ..., "content": ...}}')
    messages = [_message(name, turn, message) for turn, message in enumerate(value, start=1)]
    if messages[-1]["role"] != "assistant":
        message = f"ends with a turn of the {messages[-1]['role']}: its last turn is the assistant's trajectory"
        raise RowError(name, "no assistant turn", message)
    if not messages[-1]["content"].strip():
        raise RowError(name, "empty trajectory", "the assistant's last turn is empty: fill it or take the row out")
    if not any(message["role"] == "user" for message in messages):
        raise RowError(name, "no user turn", "has no turn of the user: put the problem there")
    return messages


def _message(name: str, turn: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RowError(name, "faulty turn", f'turn {turn} is {_shown(message)}: write {{"role": ..., "content": ...}}')
    role, content = (message.get(key) for key in ("role", "content"))
    if role not in ROLES:
        raise RowError(name, "unknown role", f"turn {turn} has as role {_shown(role)}: use {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(name, "faulty turn", f"turn {turn} has as content {_shown(content)}: use a string")
    for key, value in message.items():
        if key not in ("role", "content") and value is not None:  # null: how Parquet writes the keys of other rows
            remedy = "it would not be trained on, so move it into content or take it out"
            raise RowError(name, "faulty turn", f"turn {turn} has the further key {key}: {remedy}")
    return {"role": role, "content": _text(name, content)}


def _teacher(name: str, raw: dict[str, Any]) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(name, "faulty teacher", f"is {_shown(value)}: set it to a name or null")
    return value if value is None else _text(name, value)


def _answer(name: str, raw: dict[str, Any]) -> str | None:
    value = raw.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables make floats of a column of integers with a gap: 42.0 was 42
    known = isinstance(value, str | int | float | decimal.Decimal) and not isinstance(value, bool)
    if value is not None and (not known or (isinstance(value, float) and not math.isfinite(value))):
        raise RowError(name, "faulty answer", f"is {_shown(value)}: set it to a string, a number or null")
    return value if value is None else _text(name, str(value))


def _correct(name: str, raw: dict[str, Any]) -> bool | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise RowError(name, "faulty correct", f"is {_shown(value)}: set it to true, false or null")
    return value


def _extra(_: str, raw: dict[str, Any]) -> str:
    further = []
    for name in sorted(raw.keys() - COLUMNS):
        value = raw[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        try:
            text = json.dumps({name: value}, default=_plain, ensure_ascii=False, sort_keys=True)
        except TypeError as error:
            raise RowError(name, "faulty column", f"{error}: store it as text or take the column out") from error
        further.append(_text(name, text)[1:-1])
    return "{" + ", ".join(further) + "}"


def _plain(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):  # Parquet has them, JSON has not
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be carried along")


# The columns of a pool that have a meaning; every other one is a further column.
COLUMNS = {"problem_id", "candidate_id", "teacher", "messages", "answer", "correct"}
# The fields of a normalised row, each with the function that makes it of the row as read, or raises RowError.
FIELDS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "problem_id": _id,
    "candidate_id": _id,
    "teacher": _teacher,
    "messages": _messages,
    "answer": _answer,
    "correct": _correct,
    "extra": _extra,
}
