"""Candidates that come from several places, merged into problems; right answers looked up by a problem's text."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lark.answers.extract import find_boxed
from lark.common.errors import LarkError
from lark.pool.contamination import hash_question
from lark.pool.files import read_rows
from lark.pool.rows import RowError, Turn, format_answer, normalise_row
from lark.tasks.conversations import Candidate, find_marked_answer

PROBLEM, ANSWER, SOLUTION = ("problem", "question"), "answer", "solution"


@dataclass(frozen=True, kw_only=True)
class ReferenceAnswers:
    """Right answers by the hash of a problem's text: 200 bytes a problem, 0.2 GB for NuminaMath-CoT's 860,000."""

    answers: dict[bytes, str] = field(default_factory=dict)
    contradicting: set[bytes] = field(default_factory=set)
    """Problems that stand there with another answer again; the first one holds."""
    without: int = 0
    """Problems without an answer: neither that column nor a \\boxed{...} in the solution."""


def read_reference_answers(files: dict[str, Path], *, shown: str) -> ReferenceAnswers:
    """Read the columns problem (or question), and answer or solution, whose last \\boxed{...} is the answer.

    files: .jsonl, .json or .parquet, by name; of Parquet only these columns are read.   shown: setting and value.
    Raises LarkError for a file that breaks off and if no problem has an answer.
    """
    answers: dict[bytes, str] = {}
    contradicting: set[bytes] = set()
    without = rows = 0
    for file, path in files.items():
        try:
            for line, row in read_rows(path, columns=(*PROBLEM, ANSWER, SOLUTION)):
                if isinstance(row, RowError):
                    raise RowError(row.field, row.reason, row.message, line)
                if not isinstance(row, dict):
                    continue
                rows += 1
                text = next((row[name] for name in PROBLEM if isinstance(row.get(name), str)), None)
                answer = row.get(ANSWER)
                if answer is None and isinstance(row.get(SOLUTION), str):
                    answer = find_boxed(row[SOLUTION]) or find_marked_answer(row[SOLUTION])
                if text is None or answer is None or not str(answer).strip():
                    without += 1
                elif answers.setdefault(hash_question(text), str(answer)) != str(answer):
                    contradicting.add(hash_question(text))
        except RowError as error:
            raise LarkError(f"{shown}: {error.at(file, None)}; repair it or set another") from error
    if not answers:
        raise LarkError(
            f"{shown} gives none of its {rows:,} problems an answer; its rows need the columns "
            f"{' or '.join(PROBLEM)}, and {ANSWER} or {SOLUTION} (with a \\boxed{{...}})"
        )
    return ReferenceAnswers(answers=answers, contradicting=contradicting, without=without)


@dataclass
class _Problem:
    id: str
    question: bytes
    prompt: list[Turn]
    answer: str | None
    repeated: bool = False  # in one list
    candidates: set[str] = field(default_factory=set)


class ProblemMerger:
    """Gives every candidate its problem and its id, and every candidate of a problem the same prompt and answer.

    Problems are told apart by the id a row brings, else by the text of the question but for case and white space; then
    the problem's id is the row number at which the question came up first (`by_row`), or a hash of the text. Where
    prompts of a problem differ otherwise (in their system turn, say), the first one holds for all its candidates: one
    problem is one prompt to the student. Held in memory is one prompt a problem and one id a row.
    """

    def __init__(self, reference: ReferenceAnswers, *, by_row: bool):
        self.reference, self.by_row = reference, by_row
        self.rows = 0
        self.problems: dict[str | bytes, _Problem] = {}
        self.ids: set[str] = set()
        self.system_turns: Counter[str | None] = Counter()
        self.counts = Counter[str]()

    def make_row(self, candidate: Candidate, *, number: int, label: str | None) -> dict[str, Any]:
        """Make the pool's row of a candidate. Raises RowError where there can be none.

        number: which row of its list it is, from 0.   label: the candidate's id, unless the problem has that already.
        """
        question = hash_question(candidate.question)
        key = candidate.problem_id or question
        problem = self.problems.get(key)
        answer = self._find_answer(candidate, question)
        if problem is None:
            problem = _Problem(
                candidate.problem_id or self._make_problem_id(number, question), question, candidate.prompt, answer
            )
        elif question != problem.question:
            message = f"asks something else than the rows of problem {problem.id} before it: give it an id of its own"
            raise RowError("problem", "different problem", message)
        elif answer is not None and problem.answer is not None and answer != problem.answer:
            message = f"{answer!r} is not the answer {problem.answer!r} of problem {problem.id}: make them equal"
            raise RowError("answer", "different answer", message)
        row = candidate.further | {
            "problem_id": problem.id,
            "candidate_id": candidate.candidate_id or _make_candidate_id(problem, candidate, label),
            "teacher": candidate.teacher,
            "messages": [*problem.prompt, {"role": "assistant", "content": candidate.trajectory}],
            "answer": problem.answer,
            "correct": candidate.correct,
        }
        if row["candidate_id"] in problem.candidates:
            message = f"problem {problem.id} has a candidate {row['candidate_id']} already: give each its own id"
            raise RowError("candidate_id", "duplicate candidate_id", message)
        if errors := normalise_row(row)[1]:
            raise errors[0]
        # Only a row that is used may speak for its problem.
        self.problems[key] = problem
        self.ids.add(problem.id)
        problem.repeated |= label in problem.candidates
        problem.candidates.add(row["candidate_id"])
        self.rows += 1
        self.counts["prompts replaced by that of the problem's first row"] += candidate.prompt != problem.prompt
        self.counts["answers ignored, as the problem's first row has none"] += (
            answer is not None and problem.answer is None
        )
        first = candidate.prompt[0]
        self.system_turns[first["content"] if first["role"] == "system" else None] += 1
        return row

    def _find_answer(self, candidate: Candidate, question: bytes) -> str | None:
        answer = candidate.answer
        if answer is None:
            return self.reference.answers.get(question)
        return format_answer(answer)

    def _make_problem_id(self, number: int, question: bytes) -> str:
        if not self.by_row:
            return question.hex()[:16]
        if str(number) not in self.ids:
            return str(number)
        self.counts["questions at a row where another was before (they get ids of their own)"] += 1
        return f"{number}-{question.hex()[:8]}"

    def summarise(self) -> dict[str, Any]:
        """Summarise the merging for the manifest."""
        problems = self.problems.values()
        answered = [problem for problem in problems if problem.answer is not None]
        counts = self.counts + Counter(
            {
                "questions repeated in a list (their candidates are joined)": sum(p.repeated for p in problems),
                "answers of which task.answers has another (the first holds)": sum(
                    problem.question in self.reference.contradicting for problem in answered
                ),
            }
        )
        return {
            "rows": self.rows,
            "problems": len(problems),
            "problems_with_answer": len(answered),
            "counts": dict(counts),  # without those that are 0
            "system_turns": [[turn, count] for turn, count in self.system_turns.most_common(10)],
        }


def _make_candidate_id(problem: _Problem, candidate: Candidate, label: str | None) -> str:
    if label and label not in problem.candidates:
        return label
    base = label or candidate.teacher or "candidate"
    count = 2 if label else 1
    while f"{base}-{count}" in problem.candidates:
        count += 1
    return f"{base}-{count}"
