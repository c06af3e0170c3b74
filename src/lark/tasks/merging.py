"""Candidates that come from several places, joined into problems: rows of one pool."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lark.pool.contamination import question_digest
from lark.pool.rows import RowError, normalise
from lark.tasks.conversations import Candidate, Turn
from lark.tasks.reference_answers import Golds


@dataclass
class _Problem:
    id: str
    digest: bytes
    prompt: list[Turn]
    answer: str | None
    places: set[int]  # rows at which the question stands
    asked_twice: bool = False  # in one list
    candidates: set[str] = field(default_factory=set)


class Joiner:
    """Gives every candidate its problem and its id, and every candidate of a problem the same prompt and answer.

    Problems are told apart by the id a row brings, else by the text of the question but for case and white space; then
    the problem's id is the row number at which the question came up first (`by_row`), or a hash of the text. Where
    prompts of a problem differ otherwise (in their system turn, say), the first one holds for all its candidates: one
    problem is one prompt to the student. Held in memory is one prompt a problem and one id a row.
    """

    def __init__(self, golds: Golds | None, *, by_row: bool):
        self.golds, self.by_row = golds, by_row
        self.problems: dict[str | bytes, _Problem] = {}
        self.ids: set[str] = set()
        self.system_turns: Counter[str | None] = Counter()
        self.counts = Counter[str]()

    def row(self, candidate: Candidate, *, number: int, label: str | None) -> dict[str, Any]:
        """The row of the pool. Raises RowError where there can be none.

        number: which row of its list it is, from 0.   label: the candidate's id, if the problem has none of that yet.
        """
        digest = question_digest(candidate.question)
        key = candidate.problem_id or digest
        problem = self.problems.get(key)
        answer = self._answer(candidate, digest)
        if problem is None:
            identifier = candidate.problem_id or self._new_id(number, digest)
            problem = _Problem(identifier, digest, candidate.prompt, answer, {number})
        elif digest != problem.digest:
            message = f"asks something else than the rows of problem {problem.id} before it: give it an id of its own"
            raise RowError("problem", "different problem", message)
        elif answer is not None and problem.answer is not None and answer != problem.answer:
            message = f"{answer!r} is not the answer {problem.answer!r} of problem {problem.id}: make them equal"
            raise RowError("answer", "different answer", message)
        row = candidate.further | {
            "problem_id": problem.id,
            "candidate_id": self._candidate_id(problem, candidate, label),
            "teacher": candidate.teacher,
            "messages": [*problem.prompt, {"role": "assistant", "content": candidate.trajectory}],
            "answer": problem.answer,
            "correct": candidate.correct,
        }
        _, errors = normalise(row)
        if errors:
            raise errors[0]
        self.problems[key] = problem
        self.ids.add(problem.id)
        problem.asked_twice |= label in problem.candidates
        problem.candidates.add(row["candidate_id"])
        problem.places.add(number)
        self.counts["rows"] += 1
        self.counts["prompts replaced"] += candidate.prompt != problem.prompt
        self.counts["answers ignored"] += answer is not None and problem.answer is None
        system = candidate.prompt[0]["content"] if candidate.prompt[0]["role"] == "system" else None
        self.system_turns[system] += 1
        return row

    def _answer(self, candidate: Candidate, digest: bytes) -> str | None:
        if self.golds is not None and candidate.answer is None:
            return self.golds.answers.get(digest)
        answer = candidate.answer
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        return None if answer is None else str(answer)

    def _new_id(self, number: int, digest: bytes) -> str:
        if not self.by_row:
            return digest.hex()[:16]
        if str(number) not in self.ids:
            return str(number)
        self.counts["questions out of line"] += 1
        return f"{number}-{digest.hex()[:8]}"

    def _candidate_id(self, problem: _Problem, candidate: Candidate, label: str | None) -> str:
        base = label or candidate.teacher or "candidate"
        if label and label not in problem.candidates:
            return label
        count = 2 if label else 1
        while f"{base}-{count}" in problem.candidates:
            count += 1
        return f"{base}-{count}"

    def summary(self) -> dict[str, Any]:
        """What the joining came to, for the manifest."""
        twice = [sorted(problem.places) for problem in self.problems.values() if problem.asked_twice]
        known = [p for p in self.problems.values() if p.answer is not None]
        contradicting = self.golds.contradicting if self.golds else set()
        return {
            "rows": self.counts["rows"],
            "problems": len(self.problems),
            "questions_asked_twice": len(twice),
            "questions_out_of_line": self.counts["questions out of line"],
            "prompts_replaced": self.counts["prompts replaced"],
            "answers_ignored": self.counts["answers ignored"],
            "problems_with_answer": len(known),
            "answers_contradicting": sum(p.digest in contradicting for p in known),
            "examples_asked_twice": twice[:10],
            "system_turns": [[turn, count] for turn, count in self.system_turns.most_common(10)],
        }
