"""Read a few answers of the students, to problems that the two compared ones do not answer alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lark.evaluation.samples import read_rows
from lark.evaluation.verdicts import read_answers

SHOWN = 6
"""Problems, half of them such that either student is better at."""
LENGTH = 1_500  # characters of an answer, from its end, where the result is


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Hold one sample of a student, and how many of its samples for the problem are right."""

    student: str
    text: str
    is_right: bool
    right: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Hold a problem of an evaluation set with both students' answers."""

    set: str
    problem_id: str
    question: str
    gold: str
    answers: tuple[Answer, ...]


def read_disagreements(folder: Path, summary: Mapping[str, Any], labels: Mapping[str, str]) -> tuple[Disagreement, ...]:
    """Read those of a finished run on its first evaluation set; none if its samples are not at hand.

    labels: the students' names by role. The largest differences in accuracy come first.
    """
    roles, name = summary["difference_of"], next(iter(summary["sets"]), "")
    places = {role: folder / role / "samples" / name for role in roles}
    kept = {role: summary["arms"][role].get("answers", {}).get(name) for role in roles}
    if not all(kept.values()) or not all((place / "samples.jsonl").is_file() for place in places.values()):
        return ()
    gap = _compute_gaps(*(summary["arms"][role]["per_problem"][name] for role in roles))
    better = sorted((problem for problem in gap if gap[problem] > 0), key=lambda problem: (-gap[problem], problem))
    worse = sorted((problem for problem in gap if gap[problem] < 0), key=lambda problem: (gap[problem], problem))
    wanted = [*better[: SHOWN // 2], *worse[: SHOWN // 2]]
    by_role: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for role, place in places.items():
        of_role = by_role[role] = {problem: [] for problem in wanted}
        for answer in read_answers(place, kept[role]["verdicts"]):
            if answer["problem_id"] in of_role:
                of_role[answer["problem_id"]].append(answer)
    turns = {row["problem_id"]: row["messages"] for row in read_rows(places[roles[0]] / "problems.jsonl")}
    return tuple(
        Disagreement(
            set=name,
            problem_id=problem,
            question=next((turn["content"] for turn in reversed(turns[problem]) if turn["role"] == "user"), ""),
            gold=str(by_role[roles[0]][problem][0]["gold"]),
            answers=tuple(
                _pick_sample(labels[role], by_role[role][problem], is_right=(gap[problem] > 0) == (role == roles[0]))
                for role in roles
            ),
        )
        for problem in wanted
    )


def _compute_gaps(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> dict[str, float]:
    known = [(problem, a[problem], b[problem]) for problem in a.keys() & b.keys()]
    return {problem: x - y for problem, x, y in known if x is not None and y is not None}


def _pick_sample(student: str, samples: list[dict[str, Any]], *, is_right: bool) -> Answer:
    """Pick a sample of the verdict that makes the difference."""
    one = next((sample for sample in samples if sample["correct"] == is_right), samples[0])
    text = one["text"] if len(one["text"]) <= LENGTH else f"… {one['text'][-LENGTH:]}"
    right = sum(sample["correct"] for sample in samples)
    return Answer(student=student, text=text, is_right=one["correct"], right=right, samples=len(samples))
