"""What teachers have written, checked, as the rows of a pool."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lark.answers.checker import Checker
from lark.answers.extract import find_boxed
from lark.common.record_file import RecordFile
from lark.pool.rows import COLUMNS
from lark.tasks.problems import make_answer
from lark.teachers.teacher import Teacher

BLOCK = 64  # problems whose trajectories are checked together and in memory
SAMPLING = ("temperature", "top_p", "max_new_tokens")


@dataclass(kw_only=True)
class Figures:
    """Counts over one teacher's trajectories to these problems, in whatever command they were asked for.

    rows: of the pool.  tokens: sampled, those of failures included.  without_tokens: trajectories whose endpoint did
    not say how many.
    """

    trajectories: int = 0
    correct: int = 0
    boxed: int = 0
    truncated: int = 0
    timeouts: int = 0
    tokens: int = 0
    trajectory_tokens: int = 0
    without_tokens: int = 0
    prompt_tokens: int = 0
    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    models: set[str] = field(default_factory=set)


class Source(NamedTuple):
    """A teacher, what it has written, and the counts that reading it leaves."""

    teacher: Teacher
    file: RecordFile
    figures: Figures


def hash_prompt(messages: Any) -> str:
    """Hash what a prompt is known by in a teacher's file."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]


def make_rows(
    problems: Sequence[dict[str, Any]],
    prompts: dict[str, list[dict[str, str]]],
    sources: Sequence[Source],
    *,
    checker: Checker,
    keep: str,
    thinking: str,
) -> Iterator[dict[str, Any]]:
    """Yield the pool's rows, by problem, teacher and sample; count everything into the sources' figures."""
    for start in range(0, len(problems), BLOCK):
        found = []
        for problem in problems[start : start + BLOCK]:
            digest = hash_prompt(prompts[problem["problem_id"]])
            for source in sources:
                for sample in range(source.teacher.samples):
                    record = source.file.read((problem["problem_id"], digest, sample))
                    if (text := _count_record(record, source.figures, thinking)) is not None:
                        found.append((problem, source, record, text))
        verdicts = checker.check([make_answer(problem, text) for problem, *_, text in found])
        for (problem, source, record, text), verdict in zip(found, verdicts, strict=True):
            truncated, figure = record["finish_reason"] == "length", source.figures
            figure.correct += verdict.correct
            figure.timeouts += verdict.timed_out
            figure.boxed += find_boxed(text) is not None
            if keep == "all" or (verdict.correct if keep == "correct" else not truncated):
                figure.rows += 1
                yield _make_row(problem, prompts[problem["problem_id"]], source.teacher, record, text, verdict.correct)


def _count_record(record: dict[str, Any] | None, figure: Figures, thinking: str) -> str | None:
    """Count a record; returns the text of its trajectory, if it holds one."""
    if record is None:
        figure.failures["missing"] += 1
        return None
    figure.prompt_tokens += record.get("prompt_tokens") or 0
    figure.tokens += record.get("num_tokens") or 0
    text = None if "failure" in record else _join_text(record, thinking)
    if text is None:
        figure.failures[record.get("failure", "thinking only")] += 1
        return None
    figure.trajectories += 1
    figure.trajectory_tokens += record["num_tokens"] or 0
    figure.without_tokens += record.get("num_tokens") is None
    figure.truncated += record["finish_reason"] == "length"
    figure.models.add(record["model"] or "not said")
    return text


def _join_text(record: dict[str, Any], thinking: str) -> str | None:
    """Put reasoning and answer together; None where nothing is left of them."""
    content, reasoning = record["content"], record.get("reasoning")
    if thinking == "keep" and reasoning:
        end = f"\n</think>\n\n{content.lstrip()}" if content.strip() else ""  # else cut off while still thinking
        return f"<think>\n{reasoning.strip()}{end}"
    return content if content.strip() else None


def _make_row(
    problem: dict[str, Any],
    prompt: list[dict[str, str]],
    teacher: Teacher,
    record: dict[str, Any],
    text: str,
    correct: bool,
) -> dict[str, Any]:
    asked = {"id", "problem", *COLUMNS}
    return {
        "problem_id": problem["problem_id"],
        "candidate_id": f"{teacher.name}-{record['sample']}",
        "teacher": teacher.name,
        "messages": [*prompt, {"role": "assistant", "content": text}],
        "answer": problem["answer"],
        "correct": correct,
        **{name: value for name, value in problem.items() if name not in asked},
        "num_tokens": record["num_tokens"],
        "finish_reason": record["finish_reason"],
        "model": record["model"] or teacher.model,
        "sampling": {name: getattr(teacher, name) for name in SAMPLING},
        "seed": record["seed"],
    }
