"""Answers: extracted from generated text and checked against the gold answer.

Generated text is hostile input: a student that has gone astray writes megabytes of braces or a tower of exponents.
Extraction is linear in the text. What needs a computer algebra system runs in worker processes that are killed at a
time limit, because a power of large integers is one C call that no signal interrupts.
"""

import multiprocessing
import multiprocessing.context
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

from pebble import ProcessExpired, ProcessPool

from lark.answers import compile_pattern, extract_answer, parse_number

KINDS = ("math", "number", "reasoning_gym", "exact")

_WORKER_BYTES = 2 * 1024**3  # far above what a check needs; keeps a tower of exponents from taking the machine down


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One text to be checked."""

    text: str
    """What the student, or a teacher, wrote."""
    gold: str
    """The right answer."""
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


class Checker:
    """Compares the answers that texts state with the gold answers.

    Kinds:
        exact: the stripped strings are equal.
        number: both are numbers and equal (`parse_number`).
        math: math-verify, gold first, in worker processes.
        reasoning_gym: the verifier of the item's `source_dataset`, in worker processes; a score of
            1.0 is correct.

    Use it as a context manager: workers start when the first check needs them and end with the block. They are started
    by a fork server or spawned, never forked from a process that has threads or a GPU context.

    Args:
        kind: one of the four above.
        pattern: the task's own answer pattern (`extract_answer`).
        time_limit: seconds per check in a worker.
        workers: worker processes; by default one per core, at most 4.

    Raises:
        ValueError: unknown kind, broken pattern, or a time limit or number of workers that is not positive.
    """

    def __init__(
        self, kind: str, *, pattern: str | None = None, time_limit: float = 5.0, workers: int | None = None
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"task.checker={kind!r} is not known; set one of {', '.join(KINDS)}")
        if time_limit <= 0:
            raise ValueError(f"evaluation.time_limit={time_limit} must be positive (seconds per check)")
        if workers is not None and workers < 1:
            raise ValueError(f"evaluation.workers={workers} must be at least 1")
        compile_pattern(pattern)
        self.kind = kind
        self.pattern = pattern
        self.time_limit = time_limit
        self.workers = workers or min(4, os.cpu_count() or 1)
        self._pool: ProcessPool | None = None

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes, if any were started."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def validate(self, items: Sequence[Answer]) -> None:
        """Raises ValueError on the first item whose gold answer this kind cannot check; texts are not looked at.

        Costs no worker process; meant to be called before anything is generated.
        """
        for item in items:
            if self.kind == "number" and parse_number(item.gold) is None:
                raise ValueError(
                    f"task.checker='number', but the gold answer {item.gold[:80]!r} is no plain number; "
                    "set task.checker to math or exact"
                )
            if self.kind == "reasoning_gym":
                _source_dataset(item)

    def check(self, items: Sequence[Answer]) -> list[Verdict]:
        """One verdict per item, in their order.

        Raises:
            ValueError: a gold answer or a row that this kind cannot check.
        """
        answers = [extract_answer(item.text, self.pattern) for item in items]
        self.validate(items)
        if self.kind == "exact":
            return [
                Verdict(correct=answer is not None and answer.strip() == item.gold.strip(), answer=answer)
                for item, answer in zip(items, answers, strict=True)
            ]
        if self.kind == "number":
            golds = [parse_number(item.gold) for item in items]
            return [
                Verdict(correct=answer is not None and parse_number(answer) == gold, answer=answer)
                for gold, answer in zip(golds, answers, strict=True)
            ]
        return self._check_in_workers(items, answers)

    def _check_in_workers(self, items: Sequence[Answer], answers: Sequence[str | None]) -> list[Verdict]:
        # Samples of one problem often state the same answer: each distinct question is put to a worker once.
        futures: dict[tuple[Any, ...], Any] = {}
        keys: list[tuple[Any, ...] | None] = []
        for item, answer in zip(items, answers, strict=True):
            key: tuple[Any, ...] | None = None
            if answer is not None and answer.strip() != item.gold.strip():
                key = (item.gold, answer, item.source_dataset, id(item.metadata))
                if key not in futures:
                    futures[key] = self._schedule(item, answer)
            keys.append(key)
        outcomes = {key: _outcome(future) for key, future in futures.items()}
        verdicts = []
        for key, answer in zip(keys, answers, strict=True):
            correct, timed_out = (answer is not None, False) if key is None else outcomes[key]
            verdicts.append(Verdict(correct=correct, answer=answer, timed_out=timed_out))
        return verdicts

    def _schedule(self, item: Answer, answer: str) -> Any:
        if self._pool is None:
            libraries = ("math_verify",) if self.kind == "math" else ("reasoning_gym",)
            self._pool = ProcessPool(
                max_workers=self.workers,
                initializer=_start_worker,
                initargs=libraries,
                context=_process_context(libraries),  # pyright: ignore[reportArgumentType]
            )
        function: Callable[..., bool]
        if self.kind == "math":
            function, args = _math_equal, (item.gold, answer)
        else:
            entry = {"answer": item.gold, "metadata": dict(item.metadata or {})}
            function, args = _reasoning_gym_equal, (_source_dataset(item), entry, answer)
        return self._pool.schedule(function, args=args, timeout=self.time_limit)


def _source_dataset(item: Answer) -> str:
    """The item's source_dataset, if reasoning_gym has it; else ValueError."""
    remedy = "add or correct that column, or set task.checker to math, number or exact"
    if item.source_dataset is None:
        raise ValueError(
            f"task.checker='reasoning_gym', but the row with answer {item.gold[:80]!r} has no source_dataset; {remedy}"
        )
    from reasoning_gym.factory import DATASETS

    if item.source_dataset not in DATASETS:
        raise ValueError(f"source_dataset={item.source_dataset!r} is no data set of reasoning_gym; {remedy}")
    return item.source_dataset


def _outcome(future: Any) -> tuple[bool, bool]:
    """(correct, timed out) of one check in a worker."""
    try:
        return future.result(), False
    except (FutureTimeoutError, TimeoutError, ProcessExpired, MemoryError):
        return False, True


def _process_context(libraries: Sequence[str]) -> multiprocessing.context.BaseContext:
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        # a launcher's worker process (joblib) has a method of its own, which the processes started here do not know
        multiprocessing.set_start_method("spawn", force=True)
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports the library once, so a worker that replaces a killed one is there at once.
    context.set_forkserver_preload(list(libraries))
    return context


def _start_worker(*libraries: str) -> None:
    """Imports the libraries before the clock of the first check runs, and bounds the memory a check can take."""
    import importlib
    import logging

    for library in libraries:
        importlib.import_module(library)
    # math-verify warns on every call that its own time limit is off; ours replaces it.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if os.name == "posix":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = _WORKER_BYTES if hard == resource.RLIM_INFINITY else min(_WORKER_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _math_equal(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    # Both are bare LaTeX; without the box math-verify looks only for plain expressions in them.
    unlimited: Any = None  # its annotation says int, its documentation None
    wanted, found = (parse(rf"\boxed{{{text}}}", parsing_timeout=unlimited) for text in (gold, answer))
    return bool(verify(wanted, found, timeout_seconds=None))


def _reasoning_gym_equal(source_dataset: str, entry: dict[str, Any], answer: str) -> bool:
    from reasoning_gym import get_score_answer_fn

    score: Any = get_score_answer_fn(source_dataset)
    try:
        return float(score(answer=answer, entry=entry)) == 1.0
    except MemoryError:
        raise
    except Exception:  # a verifier of somebody else's may raise anything on an answer it cannot read: that one is wrong
        try:
            score(answer=entry["answer"], entry=entry)
        except (
            Exception
        ) as error:  # on the right answer too: the row is incomplete, and all answers would count as wrong
            raise ValueError(
                f"the reasoning_gym verifier of source_dataset={source_dataset!r} fails on the row itself "
                f"({type(error).__name__}: {error}); give the row the metadata reasoning_gym made it with"
            ) from error
        return False
