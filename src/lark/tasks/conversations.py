"""Rows of others' data sets read as candidates: which columns hold the problem, the trajectories and the verdicts."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lark.answers.extract import find_boxed
from lark.common.errors import LarkError
from lark.pool.rows import COLUMNS, RowError, Turn, join_thoughts, read_turns, read_verdict


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a data set hold what; null: recognised by its name; '': none does.

    A row is one problem with one or several trajectories: one column of text, one column of lists of texts, or several
    such columns. `teacher`, `reasoning` and `correct` go along with them: one value for all, or a list of as many.
    """

    problem: str | None = None
    """Text of the problem: the user's turn."""
    problem_id: str | None = None
    """Id of the problem; without it, problems are told apart by their text."""
    candidate_id: str | None = None
    """Id of the candidate; without it, they are called by their teacher and numbered."""
    messages: str | None = None
    """A conversation as a list of {role, content} or {from, value}, or that list as text (JSON or Python). Its last
    turn is the trajectory, unless `trajectory` is set: then it is the prompt."""
    system: str | None = None
    """The system turn, where it stands apart."""
    trajectory: str | list[str] | None = None
    """Trajectories: texts, or the assistant's turn as a list of one."""
    reasoning: str | list[str] | None = None
    """Thoughts, where they stand apart from the trajectory: put before it between <think> and </think>."""
    teacher: str | None = None
    """Who wrote it; without it, with several columns of trajectories, the name of the column."""
    answer: str | None = None
    """The right answer."""
    solution: str | None = None
    """A reference solution, whose last \\boxed{...} (or what follows ####) is the right answer where `answer` has none.
    """
    correct: str | list[str] | None = None
    """Verdicts on the trajectories: true or false, yes or no, 1 or 0, null."""
    keep: list[str] | None = None
    """Further columns that the pool carries along, for filters, priors and checkers; null: all."""

    def list_names(self) -> list[str]:
        """List the names of all columns that are set."""
        return [name for spec in fields(self) for name in _list_names(getattr(self, spec.name))]

    def describe(self) -> str:
        """Describe what is read as what, in a line."""
        roles = {role: value for role, value in asdict(self).items() if value and role != "keep"}
        return ", ".join(
            f"{role.replace('_', ' ')}: {' and '.join(_list_names(value))}" for role, value in roles.items()
        )


NAMES = {
    "problem_id": ("problem_id",),
    "candidate_id": ("candidate_id",),
    "problem": ("problem", "question", "instruction", "query", "prompt"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "trajectory": ("trajectory", "generations", "generation", "completion", "response", "generated_solution", "output"),
    "reasoning": ("reasoning", "reasoning_content", "thinking", "thinking_trajectory"),
    "teacher": ("teacher", "model", "model_name", "generator"),
    "answer": ("answer", "expected_answer", "final_answer", "ground_truth", "reference_answer", "gold"),
    "solution": ("solution", "reference_solution"),
    "correct": ("correct", "is_correct", "grade", "verdict", "correctness", "correctness_math_verify"),
}
"""Names by which columns are recognised, without case, spaces, hyphens and underscores; the first one there counts."""
_ATTEMPTS = ("_attempt", "_thinking_trajectory", "_grade")  # of s1K: a trajectory, its thoughts, its verdict


def collect_samples(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the columns of some rows, each with its first value that is not null."""
    samples: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if samples.get(name) is None:
                samples[name] = value
    return samples


def is_pool(samples: Mapping[str, Any]) -> bool:
    """Tell whether rows with these columns are those of a pool, which need not be imported."""
    return samples.keys() >= {"problem_id", "candidate_id", "messages"} and not isinstance(samples.get("system"), str)


def recognise_columns(given: Columns, samples: Mapping[str, Any]) -> Columns:
    """Complete the columns that a user named by those that are recognised by their names.

    samples: name of a column -> a value of it.
    Raises LarkError where no trajectory can be found.
    """
    free = [name for name in samples if name not in given.list_names()]
    found: dict[str, Any] = {role: find_column(free, role) for role in NAMES if getattr(given, role) is None}
    attempts = [name.removesuffix(_ATTEMPTS[0]) for name in samples if name.endswith(_ATTEMPTS[0])]
    if attempts and given.trajectory is None and given.messages is None:
        for role, ending in zip(("trajectory", "reasoning", "correct"), _ATTEMPTS, strict=True):
            if getattr(given, role) is None and all(name + ending in samples for name in attempts):
                found[role] = [name + ending for name in attempts]
    if (prompt := found.get("problem")) and isinstance(samples[prompt], list):  # TRL's, of turns
        found |= {"problem": None, "messages": prompt if found.get("messages") is None else found["messages"]}
    # A conversation that ends with the assistant is its own trajectory, unless a list of several stands beside it.
    if found.get("messages") and found.get("trajectory"):
        if isinstance(found["trajectory"], list) or isinstance(samples[found["trajectory"]], list):
            found["messages"] = found["messages"] if not found.get("problem") else None
        elif _ends_with_trajectory(samples[found["messages"]], found["messages"]):
            found["trajectory"] = None
    columns = replace(given, **{role: name for role, name in found.items() if name is not None})
    if columns.messages:
        return replace(columns, problem=given.problem) if found.get("problem") else columns
    if not columns.trajectory and columns.solution:
        return replace(columns, trajectory=columns.solution)  # a data set of worked solutions
    if not columns.trajectory:
        raise LarkError(
            f"no trajectory is recognised among the columns {show_names(samples)}; name it, as in "
            "task.columns.trajectory=<column> task.columns.problem=<column>, or task.columns.messages=<column of turns>"
        )
    return columns


def _ends_with_trajectory(value: Any, name: str) -> bool:
    try:
        return read_turns(value, name)[-1]["role"] == "assistant"
    except RowError:
        return True  # the fault is told with its line


def find_column(names: Iterable[str], role: str) -> str | None:
    """Find the column that `NAMES` recognises as holding `role`; None: there is none."""
    folded = {fold_name(name): name for name in names}
    return next((folded[name] for name in map(fold_name, NAMES[role]) if name in folded), None)


def fold_name(name: str) -> str:
    """Return a column's name without case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", name).lower()


def show_names(samples: Iterable[str]) -> str:
    return ", ".join(sorted(samples))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trajectory as a row of a data set gives it."""

    prompt: list[Turn]
    trajectory: str
    problem_id: str | None
    candidate_id: str | None
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
    turns = _read_prompt(row, columns, problem.get("problem"), system)
    used = {*columns.list_names(), *COLUMNS}
    keep = [name for name in row if name not in used] if columns.keep is None else columns.keep
    shared: dict[str, Any] = {
        "problem_id": _read_id(row, columns.problem_id),
        "candidate_id": _read_id(row, columns.candidate_id),
        "answer": _read_answer(row, columns, problem.get("answer")),
        "further": {name: row[name] for name in keep if row.get(name) is not None},
    }
    names = _list_names(columns.trajectory)
    if any(row.get(name) is not None for name in names):
        prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        trajectories = [(number, name, row.get(name)) for number, name in enumerate(names)]
    elif (names and not columns.messages) or turns[-1]["role"] != "assistant":
        where = ", ".join(names) or str(columns.messages)
        raise RowError(where, "empty trajectory", "holds no trajectory: fill it or take the row out")
    else:
        prompt = turns[:-1]
        trajectories = [(0, str(columns.messages), turns[-1]["content"])]
    for number, name, value in trajectories:
        one = not isinstance(value, list) or (bool(value) and isinstance(value[0], dict))  # a text, or a list of turns
        texts = [value] if one or not value else value  # an empty list is an empty trajectory
        for i, text in enumerate(texts):
            place = (number, i, len(texts))
            try:
                written_by = _read_beside(row, columns.teacher, 0, i, len(texts))
                thoughts = _read_beside(row, columns.reasoning, *place)
                yield Candidate(
                    prompt=prompt,
                    trajectory=join_thoughts(thoughts, _read_trajectory(text, name), name),
                    teacher=written_by
                    if isinstance(written_by, str) and written_by
                    else (name if len(names) > 1 else teacher),
                    correct=read_verdict(
                        _read_beside(row, columns.correct, *place), _name_beside(columns.correct, number) or ""
                    ),
                    **shared,
                )
            except RowError as error:
                yield error


def _read_prompt(row: dict, columns: Columns, problem: str | None, system: str | None) -> list[Turn]:
    """Return the turns of a row: of its conversation, or made of its problem."""
    own = row.get(columns.system)
    if own is not None and not isinstance(own, str):
        raise RowError(str(columns.system), "faulty system turn", f"is {type(own).__name__}: use a string")
    if (messages := row.get(columns.messages)) is not None:
        turns = read_turns(messages, str(columns.messages))
        if own and turns[0]["role"] == "system" and turns[0]["content"] != own:
            message = f"differs from the first turn of {columns.messages}: keep one of them"
            raise RowError(str(columns.system), "two system turns", message)
        return [{"role": "system", "content": own}, *turns] if own and turns[0]["role"] != "system" else turns
    text = row.get(columns.problem)
    text = problem if text is None else text
    if not isinstance(text, str) or not text.strip():
        name = columns.problem or columns.messages or "problem"
        message = f"is missing, empty or not text in a row of {show_names(row)}: give the problem, or messages"
        raise RowError(name, "no problem", message)
    system = own or system
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]


def _read_id(row: dict, name: str | None) -> str | None:
    value = row.get(name)
    return str(value) if isinstance(value, str | int) and str(value).strip() else None


def _read_answer(row: dict, columns: Columns, known: Any) -> Any:
    answer, solution = row.get(columns.answer), row.get(columns.solution)
    if isinstance(answer, str):
        answer = find_marked_answer(answer) or answer
    elif answer is None and isinstance(solution, str):
        answer = find_boxed(solution) or find_marked_answer(solution)
    return known if answer is None else answer


def find_marked_answer(solution: str) -> str | None:
    """Find what follows the last #### of a solution, as in GSM8K."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip() or None if mark else None


def _read_beside(row: dict, names: str | list[str] | None, number: int, i: int, count: int) -> Any:
    """Return what goes along with trajectory `i` of `count` in trajectory column `number`."""
    name = _name_beside(names, number)
    value = row.get(name)
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise RowError(str(name), "unequal lists", f"has {len(value)} values for {count} trajectories: give each one")
    return value[i]


def _name_beside(names: str | list[str] | None, number: int) -> str | None:
    """Name the column that goes along with trajectory column `number`."""
    listed = _list_names(names)
    return (listed[number] if number < len(listed) else listed[0]) if listed else None


def _read_trajectory(value: Any, name: str) -> str:
    if isinstance(value, list):
        turns = read_turns(value, name)
        if len(turns) > 1 or turns[0]["role"] != "assistant":
            message = f"has {len(turns)} turns, the first by the {turns[0]['role']}: one of the assistant is learned"
            raise RowError(name, "several turns", message)
        value = turns[0]["content"]
    if not isinstance(value, str) or not value.strip():
        raise RowError(name, "empty trajectory", "is empty or not text: fill it or take the row out")
    return value


def _list_names(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) and value else value if isinstance(value, list) else []
