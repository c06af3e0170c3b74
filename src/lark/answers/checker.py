"""Answers: extracted from generated text and checked against the gold answer.

Generated text is hostile input: a student that has gone astray writes megabytes of braces or a tower of exponents.
Extraction is linear in the text or bounded in time. What needs a computer algebra system, or somebody else's verifier,
runs in worker processes that are killed at a time limit, because a power of large integers is one C call that no signal
interrupts.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lark.answers.equivalence import compare_as_written, tidy_latex
from lark.answers.extract import NO_GOLD, compile_pattern, extract_answer, parse_choice
from lark.answers.quantities import is_same_quantity, parse_quantity
from lark.answers.workers import ALGEBRA, get_outcome, is_math_equal, passes_reasoning_gym, start_pool
from lark.common.errors import LarkError

CHECKED_AS_TEXT = ("exact", "reasoning_gym")
"""Kinds for which any gold answer is one; for the others `extract.NO_GOLD` is none."""
KINDS = ("math", "number", "choice", "reasoning_gym", "exact")

_GOLDS = {"math": "an answer", "number": "a plain number", "choice": "the letter of an option"}

MAX_CHARACTERS = 10_000
"""Characters of an answer that needs a worker to check, or four times the gold answer's, if that is more."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One text to be checked."""

    text: str
    """What the student, or a teacher, wrote."""
    gold: str
    """The right answer."""
    kind: str | None = None
    """How this one is checked; None: as the checker checks."""
    pattern: str | None = None
    """Where the answer stands if it is not boxed; None: the checker's own pattern."""
    source_dataset: str | None = None
    """The reasoning_gym data set the problem comes from; only that kind of check reads it."""
    metadata: Mapping[str, Any] | None = None
    """What reasoning_gym's verifier wants to know about the problem, where it wants more than the right answer."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of one check."""

    correct: bool
    answer: str | None
    """The extracted answer; None if the text has none."""
    timed_out: bool = False
    """The check was cut off at the time limit, or took its worker process down; `correct` is then False."""
    oversized: bool = False
    """The answer is too long to be checked (`MAX_CHARACTERS`); `correct` is then False."""


class Checker:
    r"""Compares the answers that texts state with the gold answers.

    Kinds:
        exact: the stripped strings are equal.
        number: both state one number and agree (`quantities.is_same_quantity`): 27.0 is 27, 50% is 50 and 0.5.
        choice: the same letter of a multiple-choice question (`extract.parse_choice`).
        math: equal numbers or numerals (`equivalence.compare_as_written`), else math-verify, gold first, in workers.
        reasoning_gym: the verifier of the item's `source_dataset`, in workers; a score of 1.0 is correct.

    Answers are found by `extract.extract_answer`. An item may have a kind and a pattern of its own, so one checker
    checks rows of several kinds.

    Use it as a context manager: workers start when the first check needs them and end with the block. They are started
    by a fork server or spawned, never forked from a process that has threads or a GPU context.

    Args:
        kind: one of the five above.
        pattern: the task's own answer pattern (`extract_answer`).
        time_limit: seconds per check in a worker.
        workers: worker processes; by default one per core, at most 4.

    Raises:
        LarkError: unknown kind, broken pattern, or a time limit or number of workers that is not positive.
    """

    def __init__(
        self, kind: str, *, pattern: str | None = None, time_limit: float = 5.0, workers: int | None = None
    ) -> None:
        if kind not in KINDS:
            raise LarkError(f"task.checker={kind!r} is not known; set one of {', '.join(KINDS)}")
        if time_limit <= 0:
            raise LarkError(f"evaluation.time_limit={time_limit} must be positive (seconds per check)")
        if workers is not None and workers < 1:
            raise LarkError(f"evaluation.workers={workers} must be at least 1")
        compile_pattern(pattern)
        self.kind = kind
        self.pattern = pattern
        self.time_limit = time_limit
        self.workers = workers or min(4, os.cpu_count() or 1)
        self._pools: dict[str, Any] = {}

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes, if any were started."""
        while self._pools:
            pool = self._pools.popitem()[1]
            pool.stop()
            pool.join()

    def validate(self, items: Sequence[Answer]) -> None:
        """Check that each item's kind can check its gold answer; texts are not looked at.

        Costs no worker process; meant to be called before anything is generated. Raises LarkError on the first.
        """
        for item in items:
            kind = item.kind or self.kind
            if kind not in KINDS:
                raise LarkError(f"checker={kind!r} of a row is not known; set one of {', '.join(KINDS)}")
            compile_pattern(item.pattern)
            if kind in _GOLDS and not _is_gold(item.gold, kind):
                raise LarkError(
                    f"task.checker={kind!r}, but the gold answer {item.gold[:80]!r} is not {_GOLDS[kind]}; correct it, "
                    "take the problem out, or set task.checker to another of " + ", ".join(KINDS)
                )
            if kind == "reasoning_gym":
                _find_source_dataset(item)

    def check(self, items: Sequence[Answer]) -> list[Verdict]:
        """Return one verdict per item, in their order.

        Raises:
            LarkError: a gold answer or a row that its kind cannot check.
        """
        self.validate(items)
        verdicts: list[Verdict | None] = []
        waiting: dict[int, tuple[Any, ...]] = {}  # item -> the question put to a worker
        futures: dict[tuple[Any, ...], Any] = {}
        for i, item in enumerate(items):
            verdict, key = self._decide(item)
            verdicts.append(verdict)
            if key is not None:  # samples of one problem often state the same answer: each question is put once
                waiting[i] = key
                if key not in futures:
                    futures[key] = self._schedule(item, key)
        outcomes = {key: get_outcome(future) for key, future in futures.items()}
        for i, key in waiting.items():
            correct, timed_out = outcomes[key]
            verdicts[i] = Verdict(correct=correct, answer=key[0], timed_out=timed_out)
        decided = [verdict for verdict in verdicts if verdict is not None]
        assert len(decided) == len(items), "every item has a verdict"
        return decided

    def _decide(self, item: Answer) -> tuple[Verdict | None, tuple[Any, ...] | None]:
        """Return the verdict on an item, or the question that a worker has to answer."""
        kind = item.kind or self.kind
        try:
            answer = extract_answer(item.text, self.pattern if item.pattern is None else item.pattern, kind)
        except TimeoutError:
            return Verdict(correct=False, answer=None, timed_out=True), None
        if answer is None:
            return Verdict(correct=False, answer=None), None
        correct = answer.strip() == item.gold.strip()
        if correct or kind == "exact":
            return Verdict(correct=correct, answer=answer), None
        if kind == "number":
            gold, stated = parse_quantity(item.gold), parse_quantity(answer, equations=True)
            assert gold is not None, "gold answers are validated"
            return Verdict(correct=stated is not None and is_same_quantity(gold, stated), answer=answer), None
        if kind == "choice":
            return Verdict(correct=parse_choice(answer) == parse_choice(item.gold), answer=answer), None
        if len(answer) > max(MAX_CHARACTERS, 4 * len(item.gold)):
            return Verdict(correct=False, answer=answer, oversized=True), None
        if kind == "math":
            equal = compare_as_written(item.gold, answer)
            if equal is not None:
                return Verdict(correct=equal, answer=answer), None
        return None, (answer, kind, item.gold, item.source_dataset, id(item.metadata))

    def _schedule(self, item: Answer, key: tuple[Any, ...]) -> Any:
        answer, kind = key[:2]
        library = ALGEBRA if kind == "math" else "reasoning_gym"
        if library not in self._pools:
            self._pools[library] = start_pool(library, self.workers)
        if kind == "math":
            return self._pools[library].schedule(
                is_math_equal, args=(tidy_latex(item.gold), tidy_latex(answer)), timeout=self.time_limit
            )
        entry = {"answer": item.gold, "metadata": dict(item.metadata or {})}
        args = (_find_source_dataset(item), entry, answer)
        return self._pools[library].schedule(passes_reasoning_gym, args=args, timeout=self.time_limit)


def _is_gold(gold: str, kind: str) -> bool:
    if kind == "math":
        return not re.match(NO_GOLD, gold)
    return (parse_quantity(gold) if kind == "number" else parse_choice(gold)) is not None


def _find_source_dataset(item: Answer) -> str:
    """Return the item's source_dataset. Raises LarkError if reasoning_gym does not have it."""
    remedy = "add or correct that column, or set task.checker to math, number or exact"
    if item.source_dataset is None:
        raise LarkError(
            f"task.checker='reasoning_gym', but the row with answer {item.gold[:80]!r} has no source_dataset; {remedy}"
        )
    from reasoning_gym.factory import DATASETS

    if item.source_dataset not in DATASETS:
        raise LarkError(f"source_dataset={item.source_dataset!r} is not a data set of reasoning_gym; {remedy}")
    return item.source_dataset
