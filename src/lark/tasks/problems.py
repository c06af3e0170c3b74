"""Problems of an evaluation set: rows read and checked, their prompts, the answers to them."""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from lark.answers.checker import KINDS, Answer
from lark.answers.extract import compile_pattern, find_boxed
from lark.common.errors import LarkError
from lark.common.log import logger
from lark.pool.files import find_files, read_rows
from lark.pool.rows import Fault, RowError, describe_faults, format_answer, read_turns
from lark.tasks.conversations import find_column, find_marked_answer, show_names


def read_problems(path: str | Path, *, limit: int | None = None, setting: str = "task.eval") -> list[dict[str, Any]]:
    """Read the rows of an evaluation file, with `problem_id` and `answer` as strings; other columns are carried along.

    A row has `problem` (text) or `messages` (ending with the user's turn), and `answer`, under these names or others by
    which they are recognised (`lark.tasks.conversations.NAMES`): question and prompt, expected_answer, solution, whose
    last \\boxed{...} is the answer. It may have `problem_id` or `id` (else problems are numbered), `level` (by which
    metrics are given too), `system`, `prompt` (the name of the prompt's version), and `checker` and `pattern`, which
    take the place of the task's.

    Args:
        path: .jsonl, .json, .parquet or .csv.
        limit: read at most this many problems.
        setting: the setting that named the file, for messages.

    Raises:
        LarkError: the file is missing or holds no problem, or rows are faulty (with file, line and field of each).
    """
    if limit is not None and limit < 1:
        raise LarkError(f"task.eval_limit={limit} leaves no problem; set it to 1 or more, or null for all")
    numbers, layouts = count(), set[str]()
    problems = read_each(
        find_files(path, setting=setting),
        lambda raw: _read_problem(raw, next(numbers), layouts),
        setting=f"{setting}={path}",
        limit=limit,
    )
    for layout in sorted(layouts):
        _log_layout(f"{setting}={path}", layout)
    return problems


@cache
def _log_layout(file: str, layout: str) -> None:
    """Log once how a file is read, which is read several times."""
    logger.info("%s is read as %s", file, layout)


def read_each(
    files: Mapping[str, Path],
    convert: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    setting: str,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Read problems from files, in order.

    convert: makes a problem of a row, or raises RowError.
    setting: with its value, for messages.

    Raises:
        LarkError: there is no problem, or rows are faulty (with file, line and field of each).
    """
    problems: dict[str, dict[str, Any]] = {}
    faults: list[Fault] = []
    for name, file in files.items():
        line = None
        try:
            for line, raw in read_rows(file):
                if limit is not None and len(problems) >= limit:
                    break
                try:
                    if isinstance(raw, RowError):
                        raise raw
                    if not isinstance(raw, dict):
                        raise RowError("row", "no object", "is not an object of fields")
                    problem = convert(raw)
                    if problem["problem_id"] in problems:
                        message = f"{problem['problem_id']!r} stands in an earlier row too: give each problem its own"
                        raise RowError("problem_id", "repeated", message)
                    problems[problem["problem_id"]] = problem
                except RowError as error:
                    faults.append(error.at(name, line))
        except RowError as error:
            faults.append(error.at(name, line))
    if faults:
        shown = "\n  ".join(describe_faults(faults))
        raise LarkError(f"{setting} has {len(faults)} faulty rows; correct or remove them:\n  {shown}")
    if not problems:
        raise LarkError(f"{setting} holds no problem; set it to a file with rows")
    return list(problems.values())


def _read_problem(raw: dict[str, Any], number: int, layouts: set[str]) -> dict[str, Any]:
    """Return the problem of a row; what was recognised by another name is added to `layouts`."""
    raw = {key: value for key, value in raw.items() if value == value}  # tables write NaN where nothing stands
    try:
        json.dumps(raw, allow_nan=False)
    except (TypeError, ValueError) as error:
        message = f"holds what JSON cannot ({error}): store it as text or take the column out"
        raise RowError("row", "faulty column", message) from error
    known = [name for name, value in raw.items() if value is not None]
    among = f"is missing among the columns {show_names(raw)}, or"
    identifier = next((raw[name] for name in ("problem_id", "id") if name in known), number)
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise RowError("problem_id", "no id", "is neither a string nor an integer: number the problems")
    asked, right, solution = (find_column(known, role) for role in ("problem", "answer", "solution"))
    answer = raw[right] if right else None
    if isinstance(answer, str):
        answer = find_marked_answer(answer) or answer
    elif answer is None and solution and isinstance(worked := raw[solution], str):
        right, answer = solution, find_boxed(worked) or find_marked_answer(worked)
    if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
        raise RowError("answer", "no answer", f"{among} neither text nor number: give the right answer")
    row = raw | {"problem_id": str(identifier), "answer": format_answer(answer)}
    turns = "messages" if "messages" in known else asked if asked and isinstance(raw[asked], list) else None
    if turns:
        row["messages"] = read_turns(raw[turns], turns)
        if row["messages"][-1]["role"] != "user":
            raise RowError(turns, "faulty messages", "ends with another turn than the user's: take what follows out")
    elif asked and isinstance(raw[asked], str) and raw[asked].strip():
        row["problem"] = raw[asked]
    else:
        raise RowError("problem", "no problem", f"{among} empty or not text: give the problem, or messages")
    if (turns or asked) == "prompt":
        del row["prompt"]  # elsewhere it names the prompt's version
    _check_optional(row)
    if (turns or asked, right) not in (("messages", "answer"), ("problem", "answer")):
        layouts.add(f"problem: {turns or asked}, answer: {right}")
    return row


def _check_optional(raw: dict[str, Any]) -> None:
    level, kind, pattern, prompt = (raw.get(name) for name in ("level", "checker", "pattern", "prompt"))
    if level is not None and (not isinstance(level, str | int | float) or isinstance(level, bool)):
        raise RowError("level", "faulty level", "is neither text nor a number: correct it or leave it out")
    if kind is not None and kind not in KINDS:
        raise RowError("checker", "unknown checker", f"{kind!r} is unknown: set it to one of {', '.join(KINDS)}")
    if prompt is not None and not isinstance(prompt, str):
        raise RowError("prompt", "faulty prompt", "is not text: give the name of the prompt's version, or leave it out")
    if pattern is not None and not isinstance(pattern, str):
        raise RowError("pattern", "faulty pattern", "is not text: give a regular expression, or leave it out")
    try:
        compile_pattern(pattern)
    except ValueError as error:
        raise RowError("pattern", "faulty pattern", str(error).replace("task.pattern=", "")) from error


def make_prompt(problem: dict[str, Any], system: str | None) -> list[dict[str, str]]:
    """Return the prompt of a problem: its own messages, or a system turn (its own, or `system`) and the problem."""
    if problem.get("messages"):
        return problem["messages"]
    system = problem.get("system") or system
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": problem["problem"]}]


def read_level(problem: Mapping[str, Any]) -> str | None:
    """Return the problem's level as text, such as "5" for 5 and for "Level 5"; None if it has none."""
    level = problem.get("level")
    return None if level is None else re.sub(r"^level\s+(?=\S)", "", str(level).strip(), flags=re.IGNORECASE)


def make_answer(problem: dict[str, Any], text: str) -> Answer:
    """Return what a checker is asked about a text that answers the problem."""
    return Answer(
        text=text,
        gold=problem["answer"],
        source_dataset=problem.get("source_dataset"),
        metadata=problem.get("metadata"),
        kind=problem.get("checker"),
        pattern=problem.get("pattern"),
    )
